package token

import (
	"os"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

// FuzzRoundTrip: decoding what was encoded gives the text in NFC, whether or not added tokens are recognised, and the
// stream gives the same.
func FuzzRoundTrip(f *testing.F) {
	tok := shapes(f)
	for _, seed := range []string{
		"", "Describe the image.", "it's 12:30\r\n\r\n  and\tthat’s  all ", "e\u0301 \u212b 한 한 😀👨‍👩‍👧", "\x00\x7f\ufeff\u0085",
		"<|im_start|>user\nHi<|im_end|>", "c" + strings.Repeat("\u0301", 50) + "\u0327", "'ſ 'S \u1680\u2003",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if !utf8.ValidString(text) {
			t.Skip("not UTF-8")
		}
		want := nfc(text)
		if got := tok.Decode(tok.EncodeOrdinary(text), false); got != want {
			t.Fatalf("%q came back from EncodeOrdinary as %q", want, got)
		}
		ids, err := tok.Encode(text)
		if err != nil {
			t.Fatal(err)
		}
		// Normalisation does not reach across an added token, so then only the parts are in NFC.
		got := tok.Decode(ids, false)
		if nfc(got) != want {
			t.Fatalf("%q came back from Encode as %q", want, got)
		}
		if !strings.Contains(text, "<|") && !slices.Equal(ids, tok.EncodeOrdinary(text)) {
			t.Fatalf("Encode and EncodeOrdinary differ on %q", text)
		}
		s := tok.Stream(false)
		var b strings.Builder
		for _, id := range ids {
			b.WriteString(s.Push(id))
		}
		if b.WriteString(s.Flush()); b.String() != got {
			t.Fatalf("stream gave %q, Decode %q", b.String(), got)
		}
	})
}

// FuzzParse: a hostile tokenizer.json gives an error or a tokenizer that works, never a panic.
func FuzzParse(f *testing.F) {
	data, err := os.ReadFile("testdata/shapes_tokenizer.json")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(`{}`))
	f.Add([]byte(`{"model":{"vocab":{"a":0},"merges":["a a"]}}`))
	f.Add([]byte(`{"pre_tokenizer":{"type":"Sequence","pretokenizers":[null,null]}}`))
	f.Add([]byte(`{"normalizer":{"type":"Sequence","normalizers":[null]},"added_tokens":[{"id":-1,"content":"x"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		tok, err := parse(data)
		if err != nil {
			return
		}
		const text = "The 2 stars<|im_end|> aren’t\nred."
		if got := tok.Decode(tok.EncodeOrdinary(text), false); got != text {
			t.Fatalf("%q came back as %q", text, got)
		}
		if _, err := tok.Encode(text); err != nil {
			t.Fatal(err)
		}
	})
}
