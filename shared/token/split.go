package token

import (
	"fmt"
	"unicode"
	"unicode/utf8"
)

// splitter cuts text into words as the pre-tokenizer's regular expression does, without a regular expression engine:
//
//	(?i:'s|'t|'re|'ve|'m|'ll|'d)          contraction
//	[^\r\n\p{L}\p{N}]?\p{L}+              letters, with one leading character that is no line break
//	\p{N}                                 one digit (or up to digits)
//	 ?[^\s\p{L}\p{N}]+[\r\n]*             punctuation, with one leading space and trailing line breaks
//	\s*[\r\n]+                            white space to its last line break
//	\s+(?!\S)                             white space but for the last character before a word
//	\s+
type splitter struct {
	digits int  // the most numbers in one word
	marks  bool // \p{M} counts as a letter, but not as what a leading character must not be
}

// patterns are the regular expressions that splitter can stand in for.
var patterns = map[string]splitter{
	// Qwen2, Qwen2.5, Qwen3, Qwen3-VL
	`(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`: {digits: 1},
	// The same with numbers in threes (cl100k and its descendants)
	`(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`: {digits: 3},
	// Qwen3.5: combining marks belong to letters
	`(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`: {digits: 1, marks: true},
}

// newSplitter returns the scanner for pattern, or an error that wraps [ErrUnsupported].
func newSplitter(pattern string) (splitter, error) {
	s, ok := patterns[pattern]
	if !ok {
		return splitter{}, fmt.Errorf("%w: pre-tokenizer pattern %q", ErrUnsupported, pattern)
	}
	return s, nil
}

// class is what the pattern sees in a character. Every character has exactly one.
type class uint8

const (
	other   class = iota // punctuation, symbols, controls; marks unless they count as letters
	letter               // \p{L}
	mark                 // \p{M} where marks count as letters, else marks are other
	number               // \p{N}
	newline              // \r \n
	space                // the rest of \s
)

// asciiClass is the class of each ASCII character.
var asciiClass = func() (c [utf8.RuneSelf]class) {
	for r := range rune(utf8.RuneSelf) {
		c[r] = classify(r)
	}
	return c
}()

// classify returns the class of r with marks apart.
func classify(r rune) class {
	switch {
	case r == '\r' || r == '\n':
		return newline
	case unicode.IsSpace(r):
		return space
	case unicode.IsLetter(r):
		return letter
	case unicode.IsNumber(r):
		return number
	case unicode.IsMark(r):
		return mark
	}
	return other
}

// classAt returns the class and length of the character at the beginning of text, which is not empty.
func (s splitter) classAt(text string) (class, int) {
	if c := text[0]; c < utf8.RuneSelf {
		return asciiClass[c], 1
	}
	r, n := utf8.DecodeRuneInString(text)
	c := classify(r)
	if c == mark && !s.marks {
		c = other
	}
	return c, n
}

// next returns the length of the first word of text, which is not empty. Words follow each other without gaps.
func (s splitter) next(text string) int {
	if n := contraction(text); n > 0 {
		return n
	}
	c, size := s.classAt(text)
	switch c {
	case letter:
		return size + s.letters(text[size:])
	case number:
		return s.numbers(text, size)
	}
	// From here on the first character may lead a run of letters, unless it is a line break.
	if c != newline {
		if n := s.letters(text[size:]); n > 0 {
			return size + n
		}
	}
	switch {
	case c == mark:
		return size
	case c == other:
		return size + s.punctuation(text[size:])
	case text[0] == ' ' && len(text) > 1:
		if c, n := s.classAt(text[1:]); c == other {
			return 1 + n + s.punctuation(text[1+n:])
		}
	}
	return s.blank(text)
}

// letters returns the length of the run of letters (and marks, where they count) at the beginning of text.
func (s splitter) letters(text string) int {
	n := 0
	for n < len(text) {
		c, size := s.classAt(text[n:])
		if c != letter && c != mark {
			break
		}
		n += size
	}
	return n
}

// numbers returns the length of the word that begins with a number of size bytes.
func (s splitter) numbers(text string, size int) int {
	n := size
	for count := 1; count < s.digits && n < len(text); count++ {
		c, size := s.classAt(text[n:])
		if c != number {
			break
		}
		n += size
	}
	return n
}

// punctuation returns the length of the rest of a word of punctuation, its trailing line breaks included.
func (s splitter) punctuation(text string) int {
	n := 0
	for n < len(text) {
		c, size := s.classAt(text[n:])
		if c != other {
			break
		}
		n += size
	}
	for n < len(text) && (text[n] == '\r' || text[n] == '\n') {
		n++
	}
	return n
}

// blank returns the length of the first word of text that begins with white space followed by neither a letter it could
// lead nor, for a space, punctuation.
func (s splitter) blank(text string) int {
	n, lineEnd, last := 0, 0, 0
	for n < len(text) {
		c, size := s.classAt(text[n:])
		if c != space && c != newline {
			break
		}
		last = n
		n += size
		if c == newline {
			lineEnd = n
		}
	}
	switch {
	case lineEnd > 0: // \s*[\r\n]+
		return lineEnd
	case n == len(text) || last == 0: // \s+(?!\S) at the end, or \s+ of one character
		return n
	}
	return last // \s+(?!\S): the last character leads the next word
}

// contraction returns the length of the English contraction at the beginning of text, 0 if there is none. Case is folded
// as in Unicode: U+017F (long s) is an s.
func contraction(text string) int {
	if len(text) < 2 || text[0] != '\'' {
		return 0
	}
	switch text[1] | 0x20 {
	case 's', 't', 'm', 'd':
		return 2
	case 'r', 'v':
		if len(text) > 2 && text[2]|0x20 == 'e' {
			return 3
		}
	case 'l':
		if len(text) > 2 && text[2]|0x20 == 'l' {
			return 3
		}
	}
	const longS = "'\u017f"
	if len(text) >= len(longS) && text[:len(longS)] == longS {
		return len(longS)
	}
	return 0
}
