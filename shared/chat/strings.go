package chat

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/nikolalohinski/gonja/v2/exec"
)

// stringArgument returns the only argument of a method that takes one string.
func stringArgument(method string, args *exec.VarArgs) (string, error) {
	if len(args.Args) != 1 || !args.Args[0].IsString() {
		return "", fmt.Errorf("%s: the argument is not one string", method)
	}
	return args.Args[0].String(), nil
}

// runeIndex turns a byte index into one of characters; -1 stays.
func runeIndex(s string, i int) int {
	if i < 0 {
		return i
	}
	return utf8.RuneCountInString(s[:i])
}

// strip is str.strip and its halves: white space without an argument, else the characters of the argument.
func strip(space func(string, func(rune) bool) string, cutset func(string, string) string) exec.Method[string] {
	return func(s string, _ *exec.Value, args *exec.VarArgs) (any, error) {
		if len(args.Args) == 0 || args.Args[0].IsNil() {
			return space(s, pythonSpace), nil
		}
		set, err := stringArgument("strip", args)
		return cutset(s, set), err
	}
}

// pythonSpace is str.isspace: Unicode's white space and the four separators of ASCII.
func pythonSpace(r rune) bool { return unicode.IsSpace(r) || r >= 0x1c && r <= 0x1f }

// affix is str.startswith and str.endswith, which take a string or several.
func affix(has func(s, affix string) bool) exec.Method[string] {
	return func(s string, _ *exec.Value, args *exec.VarArgs) (any, error) {
		if len(args.Args) != 1 {
			return nil, errors.New("startswith, endswith: one argument expected")
		}
		arg := args.Args[0]
		if !arg.IsList() {
			text, err := stringArgument("startswith, endswith", args)
			return has(s, text), err
		}
		for i := range arg.Len() {
			if has(s, exec.ToValue(arg.Index(i)).String()) {
				return true, nil
			}
		}
		return false, nil
	}
}

// split is str.split and, from the right, str.rsplit.
func split(fromRight bool) exec.Method[string] {
	return func(s string, _ *exec.Value, args *exec.VarArgs) (any, error) {
		var sep string
		limit := -1
		argument := func(i int, name string) *exec.Value {
			if v, ok := args.KwArgs[name]; ok {
				return v
			}
			if i < len(args.Args) {
				return args.Args[i]
			}
			return exec.AsValue(nil)
		}
		if v := argument(0, "sep"); v.IsString() {
			if sep = v.String(); sep == "" {
				return nil, errors.New("split: empty separator")
			}
		} else if !v.IsNil() {
			return nil, errors.New("split: the separator is not a string")
		}
		if v := argument(1, "maxsplit"); v.IsInteger() {
			limit = v.Integer()
		}
		var parts []string
		switch {
		case sep == "":
			parts = splitSpace(s, limit, fromRight)
		case fromRight:
			parts = rsplit(s, sep, limit)
		default:
			if limit >= 0 {
				limit++ // Go counts the pieces, Python the cuts
			}
			parts = strings.SplitN(s, sep, limit)
		}
		out := make(list, len(parts))
		for i, p := range parts {
			out[i] = p
		}
		return out, nil
	}
}

// rsplit splits at most limit times, from the right.
func rsplit(s, sep string, limit int) []string {
	all := strings.Split(s, sep)
	if limit < 0 || len(all) <= limit+1 {
		return all
	}
	head := len(all) - limit
	return append([]string{strings.Join(all[:head], sep)}, all[head:]...)
}

// replace is str.replace.
func replace(s string, _ *exec.Value, args *exec.VarArgs) (any, error) {
	a := args.Args
	if len(a) < 2 || !a[0].IsString() || !a[1].IsString() {
		return nil, errors.New("replace: two strings expected")
	}
	limit := -1
	if len(a) > 2 && a[2].IsInteger() {
		limit = a[2].Integer()
	}
	return strings.Replace(s, a[0].String(), a[1].String(), limit), nil
}

// splitSpace splits at runs of white space, at most limit times if limit is not negative.
func splitSpace(s string, limit int, fromRight bool) []string {
	if limit < 0 {
		return strings.FieldsFunc(s, pythonSpace)
	}
	trim, cut := strings.TrimLeftFunc, strings.IndexFunc
	if fromRight {
		trim, cut = strings.TrimRightFunc, strings.LastIndexFunc
	}
	var parts []string
	for s = trim(s, pythonSpace); s != ""; s = trim(s, pythonSpace) {
		i := cut(s, pythonSpace)
		if len(parts) == limit || i < 0 {
			parts = append(parts, s)
			break
		}
		if fromRight {
			_, n := utf8.DecodeRuneInString(s[i:])
			parts = append(parts, s[i+n:])
			s = s[:i]
			continue
		}
		parts = append(parts, s[:i])
		s = s[i:]
	}
	if fromRight {
		slices.Reverse(parts)
	}
	return parts
}

// splitLines is str.splitlines.
func splitLines(s string, keep bool) list {
	out := list{}
	for s != "" {
		i := strings.IndexAny(s, "\n\r\v\f\x1c\x1d\x1e\u0085\u2028\u2029")
		if i < 0 {
			return append(out, s)
		}
		_, n := utf8.DecodeRuneInString(s[i:])
		if strings.HasPrefix(s[i:], "\r\n") {
			n = 2
		}
		if keep {
			out = append(out, s[:i+n])
		} else {
			out = append(out, s[:i])
		}
		s = s[i+n:]
	}
	return out
}

// strftime formats a time by the directives of C that chat templates use; others stand as they are.
func strftime(t time.Time, format string) string {
	layouts := map[byte]string{
		'Y': "2006", 'm': "01", 'd': "02", 'H': "15", 'M': "04", 'S': "05", 'y': "06", 'I': "03", 'p': "PM",
		'B': "January", 'b': "Jan", 'A': "Monday", 'a': "Mon", 'j': "002", 'Z': "MST", 'z': "-0700",
		'F': "2006-01-02", 'T': "15:04:05",
	}
	var b strings.Builder
	for i := 0; i < len(format); i++ {
		if format[i] != '%' || i+1 == len(format) {
			b.WriteByte(format[i])
			continue
		}
		i++
		unpadded := format[i] == '-' && i+1 < len(format)
		if unpadded {
			i++
		}
		layout, ok := layouts[format[i]]
		switch {
		case format[i] == '%':
			b.WriteByte('%')
		case !ok:
			b.WriteString("%" + format[i:i+1])
		case unpadded:
			text := strings.TrimLeft(t.Format(layout), "0")
			if text == "" {
				text = "0"
			}
			b.WriteString(text)
		default:
			b.WriteString(t.Format(layout))
		}
	}
	return b.String()
}
