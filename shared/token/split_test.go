package token

import (
	"strings"
	"testing"

	"github.com/dlclark/regexp2/v2"
	"pgregory.net/rapid"
)

// words cuts text with the scanner.
func (s splitter) words(text string) []string {
	var out []string
	for len(text) > 0 {
		n := s.next(text)
		out = append(out, text[:n])
		text = text[n:]
	}
	return out
}

// oracle cuts text with the regular expression itself.
func oracle(t testing.TB, re *regexp2.Regexp, text string) []string {
	t.Helper()
	var out []string
	m, err := re.FindStringMatch(text)
	for ; m != nil && err == nil; m, err = re.FindNextMatch(m) {
		out = append(out, m.String())
	}
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// alphabetForSplit has every class of character, and those at which the alternatives meet.
var alphabetForSplit = []string{
	"a", "Z", "é", "世", "ß", "s", "S", "ſ", "t", "T", "re", "RE", "ve", "m", "ll", "lL", "d", "'", "'", "’",
	"0", "9", "٣", "Ⅷ", "½", " ", " ", " ", "\t", "\r", "\n", "\r\n", "\u0085", "\u00a0", "\u2003", "\u2028", "\u3000",
	".", "!", "?", "_", "-", "$", "😀", "\u0301", "\u0903", "\u200d", "\ufeff", "\u0000", "\u007f", "\U000e0100", "ा",
}

func TestSplitAgainstRegexp(t *testing.T) {
	for pattern, s := range patterns {
		t.Run(pattern, func(t *testing.T) {
			re := regexp2.MustCompile(pattern, regexp2.None)
			piece := rapid.SampledFrom(alphabetForSplit)
			rapid.Check(t, func(rt *rapid.T) {
				text := strings.Join(rapid.SliceOfN(piece, 0, 24).Draw(rt, "text"), "")
				compareSplit(rt, s.words(text), oracle(t, re, text), text)
			})
			rapid.Check(t, func(rt *rapid.T) {
				text := rapid.String().Draw(rt, "any text")
				compareSplit(rt, s.words(text), oracle(t, re, text), text)
			})
		})
	}
}

// fataler is what testing and rapid have in common here.
type fataler interface{ Fatalf(string, ...any) }

func compareSplit(t fataler, got, want []string, text string) {
	if strings.Join(got, "|") != strings.Join(want, "|") || len(got) != len(want) {
		t.Fatalf("splitting %q\n got %q\nwant %q", text, got, want)
	}
}

func TestSplit(t *testing.T) {
	s := patterns[`(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`]
	for _, c := range []struct {
		text string
		want []string
	}{
		{"it's 12:30", []string{"it", "'s", " ", "1", "2", ":", "3", "0"}},
		{"a  b", []string{"a", " ", " b"}},
		{"a  ", []string{"a", "  "}},
		{"a \n \n b", []string{"a", " \n \n", " b"}},
		{"...\r\n\nx", []string{"...\r\n\n", "x"}},
		{" !?a", []string{" !?", "a"}},
		{"\ta", []string{"\ta"}},
		{"I'LL 'tis", []string{"I", "'LL", " '", "tis"}},
	} {
		compareSplit(t, s.words(c.text), c.want, c.text)
	}
}

func TestUnknownPattern(t *testing.T) {
	if _, err := newSplitter(`\w+`); err == nil {
		t.Error("a pattern that the scanner cannot stand in for was taken")
	}
}
