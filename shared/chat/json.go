package chat

import (
	"encoding/json"
	"fmt"
	"math"
	"sort"
	"strconv"
	"strings"
	"unicode/utf16"

	"github.com/nikolalohinski/gonja/v2/exec"
)

// jsonWriter writes values as Python's json.dumps does, with the settings of transformers' tojson filter.
type jsonWriter struct {
	strings.Builder
	ascii           bool // escape everything outside ASCII
	sortKeys        bool
	item, key       string // separators
	indent, newline string // newline is "" without indentation
}

// tojson is the filter: tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False).
func tojson(_ *exec.Evaluator, in *exec.Value, params *exec.VarArgs) *exec.Value {
	if in.IsError() {
		return in
	}
	w := &jsonWriter{item: ", ", key: ": "}
	argument := func(i int, name string) *exec.Value {
		if v, ok := params.KwArgs[name]; ok {
			return v
		}
		if i < len(params.Args) {
			return params.Args[i]
		}
		return exec.AsValue(nil)
	}
	w.ascii = argument(0, "ensure_ascii").IsTrue()
	w.sortKeys = argument(3, "sort_keys").IsTrue()
	switch indent := argument(1, "indent"); {
	case indent.IsString():
		w.indent, w.newline, w.item = indent.String(), "\n", ","
	case indent.IsInteger():
		w.indent, w.newline, w.item = strings.Repeat(" ", max(0, indent.Integer())), "\n", ","
	}
	if separators := argument(2, "separators"); separators.IsList() && separators.Len() == 2 {
		w.item, w.key = separators.Index(0).String(), separators.Index(1).String()
	}
	if err := w.write(in, 0); err != nil {
		return exec.AsValue(fmt.Errorf("tojson: %w", err))
	}
	return exec.AsSafeValue(w.String())
}

// write writes one value at a depth of nesting.
func (w *jsonWriter) write(v *exec.Value, depth int) error {
	if depth > 2*maxDepth {
		return fmt.Errorf("nested more than %d deep", 2*maxDepth)
	}
	n, isNumber := v.Interface().(json.Number)
	switch {
	case v.IsNil():
		w.WriteString("null")
	case isNumber:
		w.WriteString(n.String())
	case v.IsError():
		return v
	case v.IsBool():
		w.WriteString(strconv.FormatBool(v.Bool()))
	case v.IsString():
		w.quote(v.String())
	case v.IsInteger():
		w.WriteString(strconv.Itoa(v.Integer()))
	case v.IsFloat():
		w.WriteString(pythonFloat(v.Float()))
	case v.IsList():
		return w.items('[', ']', v.Len(), depth, func(i int) error { return w.write(exec.ToValue(v.Index(i)), depth+1) })
	case v.IsDict():
		keys := v.Keys()
		if w.sortKeys {
			sort.Slice(keys, func(i, j int) bool { return keys[i].String() < keys[j].String() })
		}
		return w.items('{', '}', len(keys), depth, func(i int) error {
			value, _ := v.GetItem(keys[i].String())
			w.quote(keys[i].String())
			w.WriteString(w.key)
			return w.write(value, depth+1)
		})
	default:
		return fmt.Errorf("%T is not JSON serializable", v.Interface())
	}
	return nil
}

// items writes n elements between brackets.
func (w *jsonWriter) items(open, end byte, n, depth int, element func(i int) error) error {
	w.WriteByte(open)
	for i := range n {
		if i > 0 {
			w.WriteString(w.item)
		}
		w.line(depth + 1)
		if err := element(i); err != nil {
			return err
		}
	}
	if n > 0 {
		w.line(depth)
	}
	w.WriteByte(end)
	return nil
}

// line begins a new line if there is indentation.
func (w *jsonWriter) line(depth int) {
	if w.newline != "" {
		w.WriteString(w.newline)
		for range depth {
			w.WriteString(w.indent)
		}
	}
}

// quote writes a string. Unlike Jinja's own tojson it escapes nothing for HTML.
func (w *jsonWriter) quote(s string) {
	w.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			w.WriteByte('\\')
			w.WriteRune(r)
		case r == '\n':
			w.WriteString(`\n`)
		case r == '\r':
			w.WriteString(`\r`)
		case r == '\t':
			w.WriteString(`\t`)
		case r == '\b':
			w.WriteString(`\b`)
		case r == '\f':
			w.WriteString(`\f`)
		case r < ' ' || w.ascii && r > '~' && r < 0x10000:
			fmt.Fprintf(w, `\u%04x`, r)
		case w.ascii && r > '~':
			high, low := utf16.EncodeRune(r)
			fmt.Fprintf(w, `\u%04x\u%04x`, high, low)
		default:
			w.WriteRune(r)
		}
	}
	w.WriteByte('"')
}

// pythonFloat returns repr(f): the shortest digits that give f, with an exponent below 1e-4 and from 1e16.
func pythonFloat(f float64) string {
	switch {
	case math.IsNaN(f):
		return "NaN"
	case math.IsInf(f, 0):
		if f > 0 {
			return "Infinity"
		}
		return "-Infinity"
	}
	if a := math.Abs(f); a != 0 && (a < 1e-4 || a >= 1e16) {
		return strconv.FormatFloat(f, 'e', -1, 64)
	}
	s := strconv.FormatFloat(f, 'f', -1, 64)
	if !strings.Contains(s, ".") {
		s += ".0"
	}
	return s
}
