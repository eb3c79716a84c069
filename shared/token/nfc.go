package token

import (
	"sort"
	"strings"
	"unicode/utf8"

	"golang.org/x/text/unicode/norm"
)

// nfc returns text, which is valid UTF-8, in Unicode Normalization Form C.
//
// x/text normalises to the Stream-Safe Text Format (UAX 15, section 13): it puts U+034F into runs of more than 30
// combining marks, which other implementations do not. Such text, which is rare, takes the slow and exact way.
func nfc(text string) string {
	if norm.NFC.IsNormalString(text) {
		return text
	}
	short := norm.NFC.String(text)
	if strings.Count(short, norm.GraphemeJoiner) == strings.Count(text, norm.GraphemeJoiner) {
		return short
	}
	return string(compose(decompose(text)))
}

// decompose returns text in Normalization Form D but for Hangul syllables, which stay whole: composing them again would
// change nothing, and a following vowel or final composes with them in [compose] where it may.
func decompose(text string) []rune {
	out := make([]rune, 0, len(text))
	for len(text) > 0 {
		p := norm.NFC.PropertiesString(text)
		n := p.Size()
		if d := p.Decomposition(); d != nil {
			out = append(out, []rune(string(d))...)
		} else {
			r, _ := utf8.DecodeRuneInString(text)
			out = append(out, r)
		}
		text = text[n:]
	}
	// Canonical ordering: each run of combining marks by class, equals in their order.
	for i := 0; i < len(out); {
		end := i
		for end < len(out) && combiningClass(out[end]) != 0 {
			end++
		}
		run := out[i:end]
		sort.SliceStable(run, func(a, b int) bool { return combiningClass(run[a]) < combiningClass(run[b]) })
		i = end + 1
	}
	return out
}

// compose composes decomposed text in place: a character joins the last starter if the two have a composite and nothing
// between them blocks it (UAX 15, D115 to D117).
func compose(text []rune) []rune {
	out := text[:0]
	starter := -1 // its index in out
	last := uint8(0)
	for _, r := range text {
		class := combiningClass(r)
		if starter >= 0 && (starter == len(out)-1 || last != 0 && last < class) {
			if c, ok := composite(out[starter], r); ok {
				out[starter] = c
				continue
			}
		}
		out = append(out, r)
		last = class
		if class == 0 {
			starter = len(out) - 1
		}
	}
	return out
}

// composite returns the primary composite of two characters.
func composite(a, b rune) (rune, bool) {
	pair := norm.NFC.String(string([]rune{a, b}))
	r, n := utf8.DecodeRuneInString(pair)
	return r, n == len(pair)
}

// combiningClass returns the canonical combining class of r.
func combiningClass(r rune) uint8 { return norm.NFC.PropertiesString(string(r)).CCC() }
