package chat

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sort"

	"github.com/nikolalohinski/gonja/v2/exec"
)

// Values in a template are nil, bool, int, float64, string, list, and *exec.Dict, gonja's dictionary that keeps its
// order. A number that fits neither int nor float64 stays a json.Number.

// list is a list whose negative indices work as in Python; gonja's miss the one of the first element.
type list []any

// GetItem returns an element; gonja calls it for x[key].
func (l list) GetItem(key any) (*exec.Value, bool) {
	i, ok := key.(int)
	if ok && i < 0 {
		i += len(l)
	}
	if !ok || i < 0 || i >= len(l) {
		return exec.AsValue(nil), false
	}
	return exec.ToValue(l[i]), true
}

// object returns a dictionary of alternating keys and values.
func object(pairs ...any) *exec.Dict {
	d := exec.NewDict()
	for i := 0; i < len(pairs); i += 2 {
		d.Pairs = append(d.Pairs, &exec.Pair{Key: exec.AsValue(pairs[i]), Value: exec.AsValue(pairs[i+1])})
	}
	return d
}

// set sets one key.
func set(d *exec.Dict, key string, value any) {
	for _, p := range d.Pairs {
		if p.Key.String() == key {
			p.Value = exec.AsValue(value)
			return
		}
	}
	d.Pairs = append(d.Pairs, &exec.Pair{Key: exec.AsValue(key), Value: exec.AsValue(value)})
}

// get returns the value of a key, nil if v is no dictionary or has no such key.
func get(v any, key string) any {
	d, ok := v.(*exec.Dict)
	if !ok {
		return nil
	}
	for _, p := range d.Pairs {
		if p.Key.String() == key {
			return p.Value.Interface()
		}
	}
	return nil
}

// maxDepth bounds how deeply JSON from a client may nest.
const maxDepth = 128

// decode decodes one JSON value, keeping the order of keys.
func decode(data []byte) (any, error) {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	v, err := decodeNext(dec, 0)
	if err != nil {
		return nil, err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("more than one JSON value")
	}
	return v, nil
}

// decodeNext decodes the next value of a stream.
func decodeNext(dec *json.Decoder, depth int) (any, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("JSON nested more than %d deep", maxDepth)
	}
	token, err := dec.Token()
	if err != nil {
		return nil, err
	}
	switch token := token.(type) {
	case json.Number:
		return number(token), nil
	case json.Delim:
		if token == '[' {
			l := list{}
			for dec.More() {
				v, err := decodeNext(dec, depth+1)
				if err != nil {
					return nil, err
				}
				l = append(l, v)
			}
			_, err := dec.Token()
			return l, err
		}
		d := object()
		for dec.More() {
			key, err := dec.Token()
			if err != nil {
				return nil, err
			}
			v, err := decodeNext(dec, depth+1)
			if err != nil {
				return nil, err
			}
			set(d, key.(string), v)
		}
		_, err := dec.Token()
		return d, err
	}
	return token, nil
}

// number returns the value that Python's json gives a number: an int unless it has a fraction or an exponent.
func number(n json.Number) any {
	if i, err := n.Int64(); err == nil {
		return int(i)
	}
	isInt := true
	for _, c := range n {
		if c == '.' || c == 'e' || c == 'E' {
			isInt = false
		}
	}
	if f, err := n.Float64(); err == nil && !isInt {
		return f
	}
	return n
}

// convert turns a value as encoding/json decodes it into one for templates. Maps, whose order is lost, are sorted.
func convert(v any) any {
	switch v := v.(type) {
	case map[string]any:
		keys := make([]string, 0, len(v))
		for k := range v {
			keys = append(keys, k)
		}
		sort.Strings(keys)
		d := object()
		for _, k := range keys {
			set(d, k, convert(v[k]))
		}
		return d
	case []any:
		l := make(list, len(v))
		for i := range v {
			l[i] = convert(v[i])
		}
		return l
	case json.Number:
		return number(v)
	case json.RawMessage:
		if decoded, err := decode(v); err == nil {
			return decoded
		}
		return string(v)
	case float64:
		// encoding/json makes every number a float64; an integer is meant to be one.
		if i := int(v); float64(i) == v && i > -1<<53 && i < 1<<53 {
			return i
		}
	}
	return v
}
