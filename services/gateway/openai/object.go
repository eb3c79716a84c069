package openai

import (
	"encoding/json"
	"math"
	"strconv"
	"unicode/utf8"
)

// object reads the members of one JSON object and remembers the first fault. null counts as absent.
type object struct {
	path   string // of the object inside the request, "" for the request itself
	values map[string][]byte
	err    *Error
}

// parse checks body and takes its outermost object.
func parse(body []byte) (*object, *Error) {
	if !utf8.Valid(body) { // RFC 8259, section 8.1; encoding/json lets it pass
		e := Invalid("", "The body is not valid JSON: it is not UTF-8.")
		e.Code = "invalid_json"
		return nil, e
	}
	if !json.Valid(body) {
		var v any
		e := Invalid("", "The body is not valid JSON.")
		if err := json.Unmarshal(body, &v); err != nil {
			e = Invalid("", "The body is not valid JSON: %v.", err)
		}
		e.Code = "invalid_json"
		return nil, e
	}
	body = trim(body)
	if body[0] != '{' {
		return nil, Invalid("", "The body must be a JSON object, not %s.", kind(body))
	}
	return newObject("", body), nil
}

func newObject(path string, raw []byte) *object {
	o := &object{path: path, values: make(map[string][]byte)}
	for key, value := range members(raw) {
		o.values[key] = value
	}
	return o
}

// kind names what a JSON value is, with its article.
func kind(raw []byte) string {
	switch raw[0] {
	case '{':
		return "an object"
	case '[':
		return "an array"
	case '"':
		return "a string"
	case 't', 'f':
		return "a boolean"
	case 'n':
		return "null"
	}
	return "a number"
}

// param is the full name of a member.
func (o *object) param(name string) string {
	if o.path == "" {
		return name
	}
	return o.path + "." + name
}

// fail remembers the first fault.
func (o *object) fail(e *Error) {
	if o.err == nil {
		o.err = e
	}
}

func (o *object) wrongType(param, want string, raw []byte) {
	e := Invalid(param, "Invalid type for '%s': expected %s, but got %s instead.", param, want, kind(raw))
	e.Code = "invalid_type"
	o.fail(e)
}

func (o *object) wrongValue(name, format string, args ...any) {
	e := Invalid(o.param(name), "Invalid value for '"+o.param(name)+"': "+format, args...)
	e.Code = "invalid_value"
	o.fail(e)
}

// get returns a member; ok is false when it is absent or null.
func (o *object) get(name string) (raw []byte, ok bool) {
	raw, ok = o.values[name]
	return raw, ok && raw[0] != 'n'
}

func (o *object) string(name string) (string, bool) {
	raw, ok := o.get(name)
	if !ok {
		return "", false
	}
	if raw[0] != '"' {
		o.wrongType(o.param(name), "a string", raw)
		return "", false
	}
	return text(raw), true
}

func (o *object) bool(name string, otherwise bool) bool {
	raw, ok := o.get(name)
	if !ok {
		return otherwise
	}
	if raw[0] != 't' && raw[0] != 'f' {
		o.wrongType(o.param(name), "a boolean", raw)
		return otherwise
	}
	return raw[0] == 't'
}

// float reads a number within [low, high].
func (o *object) float(name string, low, high float64) *float64 {
	raw, ok := o.get(name)
	if !ok {
		return nil
	}
	if kind(raw) != "a number" {
		o.wrongType(o.param(name), "a number", raw)
		return nil
	}
	v, err := strconv.ParseFloat(string(raw), 64)
	if err != nil || v < low || v > high {
		o.wrongValue(name, "%s is not between %g and %g.", raw, low, high)
		return nil
	}
	return &v
}

// int reads an integer within [low, high].
func (o *object) int(name string, low, high int64) *int64 {
	raw, ok := o.get(name)
	if !ok {
		return nil
	}
	v, side, whole := integer(raw)
	if !whole {
		o.wrongType(o.param(name), "an integer", raw)
		return nil
	}
	if side != 0 || v < low || v > high {
		switch {
		case high == math.MaxInt32 && (side < 0 || v < low):
			o.wrongValue(name, "%s is below the least value of %d.", raw, low)
		default:
			o.wrongValue(name, "%s is not between %d and %d.", raw, low, high)
		}
		return nil
	}
	return &v
}

// integer reads a JSON number that is whole, such as 3 or 3.0. side is -1 for a number below the range of an int64 and 1
// for one above it, which v is then the end of.
func integer(raw []byte) (v int64, side int, whole bool) {
	if kind(raw) != "a number" {
		return 0, 0, false
	}
	if v, err := strconv.ParseInt(string(raw), 10, 64); err == nil {
		return v, 0, true
	}
	f, err := strconv.ParseFloat(string(raw), 64)
	switch {
	case err == nil && f != math.Trunc(f):
		return 0, 0, false
	case f >= 1<<63:
		return math.MaxInt64, 1, true
	case f < -1<<63:
		return math.MinInt64, -1, true
	}
	return int64(f), 0, true
}

// ids reads an array of token ids.
func (o *object) ids(param string, raw []byte) []int32 {
	out := make([]int32, 0, 8)
	for _, e := range elements(raw) {
		v, _, ok := integer(e)
		if !ok {
			o.wrongType(param, "an array of token ids", e)
			return nil
		}
		if v < 0 || v > math.MaxInt32 {
			o.fail(Invalid(param, "Invalid value for '%s': %s is no token id.", param, e))
			return nil
		}
		out = append(out, int32(v))
	}
	return out
}

// within reads a member that is an object, nil when it is absent. Its faults become o's by o.fail.
func (o *object) within(name string) *object {
	raw, ok := o.get(name)
	if !ok {
		return nil
	}
	if raw[0] != '{' {
		o.wrongType(o.param(name), "an object", raw)
		return nil
	}
	return newObject(o.param(name), raw)
}
