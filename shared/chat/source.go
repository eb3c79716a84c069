package chat

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// translate rewrites the source of a template, as Jinja2 reads it under transformers (trim_blocks, lstrip_blocks), into
// one that gonja reads alike: white space control is applied and gone, comments and the generation tags (which mark the
// assistant's tokens for training) are left out, and conditional expressions are written with and and or.
func translate(source string) (string, error) {
	source = strings.NewReplacer("\r\n", "\n", "\r", "\n").Replace(source)
	source = strings.TrimSuffix(source, "\n")
	s := scanner{rest: source, lineStart: true}
	for {
		tag, ok, err := s.next()
		if err != nil {
			return "", err
		}
		if !ok {
			break
		}
		switch tag.kind {
		case '{':
			code, err := rewrite(tag.code, true)
			if err != nil {
				return "", err
			}
			s.tag("{{ " + code + " }}")
		case '%':
			if err := s.statement(tag.code); err != nil {
				return "", err
			}
		}
	}
	s.data(s.rest)
	return s.out.String(), nil
}

// scanner goes through a template.
type scanner struct {
	rest      string // what is to be read, white space that the last tag takes already gone
	lineStart bool   // rest begins a line, as far as lstrip_blocks is concerned
	out       strings.Builder
}

// tag is one {{ }}, {% %} or {# #}.
type tag struct {
	kind byte   // '{', '%' or '#'
	code string // what stands in it, trimmed
}

// next writes the data before the next tag and returns the tag; ok is false when there is none.
func (s *scanner) next() (t tag, ok bool, err error) {
	begin := 0
	for {
		i := strings.IndexByte(s.rest[begin:], '{')
		if i < 0 || begin+i+1 == len(s.rest) {
			return tag{}, false, nil
		}
		begin += i
		if t.kind = s.rest[begin+1]; t.kind == '{' || t.kind == '%' || t.kind == '#' {
			break
		}
		begin++
	}
	data, body := s.rest[:begin], s.rest[begin+2:]
	control := byte(0)
	if body != "" && (body[0] == '-' || body[0] == '+' && t.kind != '{') {
		control, body = body[0], body[1:]
	}
	switch {
	case control == '-':
		data = strings.TrimRightFunc(data, pythonSpace)
	case control == 0 && t.kind != '{':
		data = s.stripLine(data)
	}
	s.data(data)

	end, err := endOfTag(body, t.kind)
	if err != nil {
		return tag{}, false, err
	}
	t.code, s.rest = body[:end], body[end+2:]
	s.lineStart = false
	switch {
	case strings.HasSuffix(t.code, "-"):
		t.code = t.code[:len(t.code)-1]
		trimmed := strings.TrimLeftFunc(s.rest, pythonSpace)
		s.lineStart = strings.HasSuffix(s.rest[:len(s.rest)-len(trimmed)], "\n")
		s.rest = trimmed
	case strings.HasSuffix(t.code, "+") && t.kind != '{':
		t.code = t.code[:len(t.code)-1]
	case t.kind != '{' && strings.HasPrefix(s.rest, "\n"):
		s.rest = s.rest[1:]
		s.lineStart = true
	}
	t.code = strings.TrimFunc(t.code, pythonSpace)
	return t, true, nil
}

// stripLine is lstrip_blocks: white space between the beginning of a line and a block goes.
func (s *scanner) stripLine(data string) string {
	line := strings.LastIndexByte(data, '\n') + 1
	if (line > 0 || s.lineStart) && strings.TrimFunc(data[line:], pythonSpace) == "" {
		return data[:line]
	}
	return data
}

// data writes literal text. Text that could join with the next tag's brace is written as a string.
func (s *scanner) data(text string) {
	if !strings.HasSuffix(text, "{") {
		s.out.WriteString(text)
		return
	}
	s.out.WriteString(text[:len(text)-1])
	s.out.WriteString("{{ '{' }}")
}

func (s *scanner) tag(text string) { s.out.WriteString(text) }

// statement writes one {% %}.
func (s *scanner) statement(code string) error {
	name := code
	if i := strings.IndexFunc(code, pythonSpace); i >= 0 {
		name = code[:i]
	}
	switch name {
	case "generation", "endgeneration":
		return nil
	case "raw":
		return s.raw()
	case "set":
		target, value, assigned := strings.Cut(code[len(name):], "=")
		if assigned && !strings.ContainsAny(target, "(|'\"") {
			value, err := rewrite(value, true)
			if err != nil {
				return err
			}
			s.tag("{% set " + strings.TrimSpace(target) + " = " + value + " %}")
			return nil
		}
	}
	code, err := rewrite(code, false)
	if err != nil {
		return err
	}
	s.tag("{% " + code + " %}")
	return nil
}

// endRaw is the end of a raw block.
var endRaw = regexp.MustCompile(`\{%([-+]?)\s*endraw\s*([-+]?)%\}`)

// raw writes the text of a raw block as a string.
func (s *scanner) raw() error {
	m := endRaw.FindStringSubmatchIndex(s.rest)
	if m == nil {
		return errors.New("raw block without end")
	}
	text := s.rest[:m[0]]
	switch s.rest[m[2]:m[3]] {
	case "-":
		text = strings.TrimRightFunc(text, pythonSpace)
	case "":
		text = s.stripLine(text)
	}
	if text != "" {
		s.tag("{{ " + quoteLiteral(text) + " }}")
	}
	control := s.rest[m[4]:m[5]]
	s.rest = s.rest[m[1]:]
	s.lineStart = false
	switch {
	case control == "-":
		s.rest = strings.TrimLeftFunc(s.rest, pythonSpace)
	case control == "" && strings.HasPrefix(s.rest, "\n"):
		s.rest = s.rest[1:]
		s.lineStart = true
	}
	return nil
}

// quoteLiteral writes text as a Jinja string.
func quoteLiteral(text string) string {
	return "'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`, "\n", `\n`).Replace(text) + "'"
}

// endOfTag returns where the end of a tag stands in body.
func endOfTag(body string, kind byte) (int, error) {
	if kind == '#' {
		if i := strings.Index(body, "#}"); i >= 0 {
			return i, nil
		}
		return 0, errors.New("unclosed comment")
	}
	end := "%}"
	if kind == '{' {
		end = "}}"
	}
	depth := 0
	for i := 0; i < len(body); i++ {
		switch c := body[i]; {
		case c == '\'' || c == '"':
			n, err := stringLength(body[i:])
			if err != nil {
				return 0, err
			}
			i += n - 1
		case depth == 0 && strings.HasPrefix(body[i:], end):
			return i, nil
		case c == '{' || c == '(' || c == '[':
			depth++
		case c == '}' || c == ')' || c == ']':
			depth--
		}
	}
	return 0, fmt.Errorf("unclosed tag {%c %.40s", kind, body)
}

// stringLength returns the length of the string literal at the beginning of text.
func stringLength(text string) (int, error) {
	for i := 1; i < len(text); i++ {
		switch text[i] {
		case '\\':
			i++
		case text[0]:
			return i + 1, nil
		}
	}
	return 0, fmt.Errorf("unclosed string %.40s", text)
}
