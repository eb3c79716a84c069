package token

import (
	"strings"
	"testing"

	"golang.org/x/text/unicode/norm"
	"pgregory.net/rapid"
)

func TestNFC(t *testing.T) {
	// 40 marks of two classes on one letter: the cedilla (202) composes and the acute accents (230) follow it.
	zalgo := "c" + strings.Repeat("\u0301", 39) + "\u0327"
	for _, c := range []struct{ text, want string }{
		{"e\u0301", "é"},
		{"\u1112\u1161\u11ab", "한"},
		{"\u212b", "Å"},
		{zalgo, "ḉ" + strings.Repeat("\u0301", 38)},
		{zalgo + "\u1112\u1161\u11ab", "ḉ" + strings.Repeat("\u0301", 38) + "한"},
		{"가\u11a8" + zalgo, "각ḉ" + strings.Repeat("\u0301", 38)},
	} {
		if got := nfc(c.text); got != c.want {
			t.Errorf("nfc(%+q) = %+q, want %+q", c.text, got, c.want)
		}
	}
}

// TestSlowNFC compares the exact way with x/text where both may be used.
func TestSlowNFC(t *testing.T) {
	char := rapid.OneOf(
		rapid.Rune(),
		rapid.RuneFrom([]rune("aeoAcs\u0301\u0300\u0323\u0327\u0338\u0344\u0345\u0958\u09be\u09c7\u1100\u1161\u11a8가각\u0b47\u0b56\u2adcΩ")),
	)
	rapid.Check(t, func(t *rapid.T) {
		text := string(rapid.SliceOfN(char, 0, 20).Draw(t, "text"))
		want := norm.NFC.String(text)
		if got := string(compose(decompose(text))); got != want {
			t.Fatalf("nfc(%+q) = %+q, want %+q", text, got, want)
		}
	})
}
