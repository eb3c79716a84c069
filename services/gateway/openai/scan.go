package openai

import (
	"bytes"
	"encoding/json"
	"iter"
	"unicode/utf8"
)

// The functions here take valid JSON apart without copying it: a body is checked once by encoding/json and then cut
// into slices of itself, so that a picture of many megabytes inside it is looked at twice, not once for every level
// that it is nested in.

// trim returns valid JSON without the white space around it.
func trim(raw []byte) []byte { return bytes.Trim(raw, " \t\r\n") }

// members iterates over an object's members. raw must be a valid JSON object.
func members(raw []byte) iter.Seq2[string, []byte] {
	return func(yield func(string, []byte) bool) {
		rest := trim(raw[1:])
		for rest[0] != '}' {
			n := valueLen(rest)
			key := text(rest[:n])
			rest = trim(trim(rest[n:])[1:]) // the colon
			n = valueLen(rest)
			if !yield(key, rest[:n]) {
				return
			}
			if rest = trim(rest[n:]); rest[0] == ',' {
				rest = trim(rest[1:])
			}
		}
	}
}

// elements iterates over an array's elements. raw must be a valid JSON array.
func elements(raw []byte) iter.Seq2[int, []byte] {
	return func(yield func(int, []byte) bool) {
		rest := trim(raw[1:])
		for i := 0; rest[0] != ']'; i++ {
			n := valueLen(rest)
			if !yield(i, rest[:n]) {
				return
			}
			if rest = trim(rest[n:]); rest[0] == ',' {
				rest = trim(rest[1:])
			}
		}
	}
}

// valueLen is the length of the value that raw begins with.
func valueLen(raw []byte) int {
	switch raw[0] {
	case '"':
		return stringLen(raw)
	case '{', '[':
		depth := 0
		for i := 0; ; i++ {
			switch raw[i] {
			case '"':
				i += stringLen(raw[i:]) - 1
			case '{', '[':
				depth++
			case '}', ']':
				if depth--; depth == 0 {
					return i + 1
				}
			}
		}
	}
	if i := bytes.IndexAny(raw, ",]} \t\r\n"); i >= 0 {
		return i
	}
	return len(raw)
}

// stringLen is the length of the string that raw begins with, quotes included.
func stringLen(raw []byte) int {
	for at := 1; ; {
		end := at + bytes.IndexByte(raw[at:], '"')
		escapes := 0
		for raw[end-1-escapes] == '\\' {
			escapes++
		}
		if escapes%2 == 0 {
			return end + 1
		}
		at = end + 1
	}
}

// text is the value of a valid JSON string.
func text(raw []byte) string {
	inner := raw[1 : len(raw)-1]
	if bytes.IndexByte(inner, '\\') < 0 && utf8.Valid(inner) {
		return string(inner)
	}
	var s string
	if err := json.Unmarshal(raw, &s); err != nil {
		panic("BUG: a valid JSON string does not decode: " + err.Error())
	}
	return s
}
