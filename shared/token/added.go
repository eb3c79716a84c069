package token

import (
	"sort"
	"strings"
	"unicode"
	"unicode/utf8"
)

// addedToken is one entry of tokenizer.json's added_tokens.
type addedToken struct {
	ID         int32  `json:"id"`
	Content    string `json:"content"`
	SingleWord bool   `json:"single_word"` // only where no word character stands beside it
	LeftStrip  bool   `json:"lstrip"`      // takes the white space before it
	RightStrip bool   `json:"rstrip"`      // takes the white space after it
	Normalized bool   `json:"normalized"`  // is looked for in normalised text
	Special    bool   `json:"special"`
}

// added finds added tokens in text: the leftmost first, the longest of those that begin at one place.
type added struct {
	byFirst [256][]addedToken // longest first
	any     bool
}

// newAdded builds the finder. No content is empty.
func newAdded(tokens []addedToken) added {
	a := added{any: len(tokens) > 0}
	for _, t := range tokens {
		a.byFirst[t.Content[0]] = append(a.byFirst[t.Content[0]], t)
	}
	for _, list := range a.byFirst {
		sort.SliceStable(list, func(i, j int) bool { return len(list[i].Content) > len(list[j].Content) })
	}
	return a
}

// each calls yield for the pieces of text in order: an added token with its id, or other text, never empty, with id -1.
func (a *added) each(text string, yield func(piece string, id int32)) {
	begin, at := 0, 0
	for a.any && at < len(text) {
		t := a.at(text[at:])
		if t == nil {
			at++
			continue
		}
		start, end := at, at+len(t.Content)
		at = end
		if t.SingleWord && (wordBefore(text[:start]) || wordAfter(text[end:])) {
			continue
		}
		if t.LeftStrip {
			start = begin + len(strings.TrimRightFunc(text[begin:start], unicode.IsSpace))
		}
		if t.RightStrip {
			end = len(text) - len(strings.TrimLeftFunc(text[end:], unicode.IsSpace))
			at = end
		}
		if start > begin {
			yield(text[begin:start], -1)
		}
		yield(text[start:end], t.ID)
		begin = end
	}
	if begin < len(text) {
		yield(text[begin:], -1)
	}
}

// at returns the added token at the beginning of text, nil if there is none.
func (a *added) at(text string) *addedToken {
	list := a.byFirst[text[0]]
	for i := range list {
		if strings.HasPrefix(text, list[i].Content) {
			return &list[i]
		}
	}
	return nil
}

// wordBefore says whether text ends with a word character.
func wordBefore(text string) bool {
	r, n := utf8.DecodeLastRuneInString(text)
	return n > 0 && wordRune(r)
}

// wordAfter says whether text begins with a word character.
func wordAfter(text string) bool {
	r, n := utf8.DecodeRuneInString(text)
	return n > 0 && wordRune(r)
}

// wordRune is \w of Unicode regular expressions (UTS 18, Annex C).
func wordRune(r rune) bool {
	return unicode.In(r, unicode.L, unicode.M, unicode.Nd, unicode.Nl, unicode.Pc, unicode.Join_Control, unicode.Other_Alphabetic)
}
