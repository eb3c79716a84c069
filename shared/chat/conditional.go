package chat

import (
	"fmt"
	"strings"
)

// rewrite returns code with each conditional expression "a if c else b" inside brackets, which gonja cannot parse, as
// "((c) and [a] or [b])[0]", which evaluates the same things. Those at the top are rewritten only if top is set: there
// "if" may also be the statement or the filter of a loop.
func rewrite(code string, top bool) (string, error) {
	r := rewriter{rest: code}
	out, err := r.group(0, top)
	if err != nil {
		return "", err
	}
	if r.rest != "" {
		return "", fmt.Errorf("unbalanced %q in %.60q", r.rest[:1], code)
	}
	return strings.TrimSpace(out), nil
}

// rewriter reads the tokens of one expression.
type rewriter struct{ rest string }

// group reads to the closing bracket, or to the end if there is none, and returns what it read, rewritten.
func (r *rewriter) group(closing byte, expression bool) (string, error) {
	var out strings.Builder
	segment := []string{} // tokens since the last comma
	flush := func() {
		if expression {
			out.WriteString(conditional(segment))
		} else {
			out.WriteString(strings.Join(segment, ""))
		}
		segment = segment[:0]
	}
	for r.rest != "" {
		c := r.rest[0]
		switch {
		case closing != 0 && c == closing:
			flush()
			r.rest = r.rest[1:]
			return out.String(), nil
		case c == ')' || c == ']' || c == '}':
			return "", fmt.Errorf("unexpected %q", c)
		case c == '(' || c == '[' || c == '{':
			r.rest = r.rest[1:]
			end := map[byte]byte{'(': ')', '[': ']', '{': '}'}[c]
			inner, err := r.group(end, true)
			if err != nil {
				return "", err
			}
			segment = append(segment, string(c)+inner+string(end))
		case c == ',':
			flush()
			out.WriteByte(',')
			r.rest = r.rest[1:]
		case closing == '}' && c == ':':
			flush()
			out.WriteByte(':')
			r.rest = r.rest[1:]
		default:
			token, err := r.token()
			if err != nil {
				return "", err
			}
			segment = append(segment, token)
			// A keyword argument's value is an expression of its own.
			if token == "=" && closing == ')' {
				flushed := strings.Join(segment, "")
				segment = segment[:0]
				out.WriteString(flushed)
			}
		}
	}
	if closing != 0 {
		return "", fmt.Errorf("missing %q", closing)
	}
	flush()
	return out.String(), nil
}

// token reads a string, a word, white space, or a run of other characters.
func (r *rewriter) token() (string, error) {
	n := 1
	switch c := r.rest[0]; {
	case c == '\'' || c == '"':
		var err error
		if n, err = stringLength(r.rest); err != nil {
			return "", err
		}
	case wordByte(c):
		for n < len(r.rest) && wordByte(r.rest[n]) {
			n++
		}
	case strings.HasPrefix(r.rest, "==") || strings.HasPrefix(r.rest, "!=") || strings.HasPrefix(r.rest, "<=") || strings.HasPrefix(r.rest, ">="):
		n = 2
	}
	token := r.rest[:n]
	r.rest = r.rest[n:]
	return token, nil
}

// wordByte says whether c belongs to a name or a number.
func wordByte(c byte) bool {
	return c == '_' || c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= 0x80
}

// conditional returns the tokens of one expression with its conditional, if it has one, rewritten.
func conditional(tokens []string) string {
	at := func(word string, from int) int {
		for i := from; i < len(tokens); i++ {
			if tokens[i] == word {
				return i
			}
		}
		return -1
	}
	all := strings.Join(tokens, "")
	i := at("if", 0)
	if i < 0 {
		return all
	}
	yes, condition, no := strings.Join(tokens[:i], ""), tokens[i+1:], "none"
	if j := at("else", i); j >= 0 {
		no = conditional(tokens[j+1:])
		condition = tokens[i+1 : j]
	}
	return fmt.Sprintf("((%s) and [%s] or [%s])[0]", strings.Join(condition, ""), strings.TrimSpace(yes), strings.TrimSpace(no))
}
