package token

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"unicode/utf8"

	"pgregory.net/rapid"
)

// shapes returns the small tokenizer of the demo model.
func shapes(t testing.TB) *Tokenizer {
	t.Helper()
	tok, err := Load("testdata/shapes_tokenizer.json")
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

// qwen3 returns the real Qwen3 tokenizer, or skips: its 11 MB are not part of the repository.
func qwen3(t testing.TB) *Tokenizer {
	t.Helper()
	dir := os.Getenv("TRIREME_QWEN3_TOKENIZER")
	if dir == "" {
		// The folder beside the repository, whose root is two folders up.
		dir = filepath.Join("..", "..", "..", "shared", "tokenizers", "qwen3")
	}
	tok, err := Load(dir)
	if errors.Is(err, os.ErrNotExist) {
		t.Skipf("SKIPPED: no Qwen3 tokenizer.json in %s (set TRIREME_QWEN3_TOKENIZER to its folder)", dir)
	}
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

type vector struct {
	Text string `json:"text"`
	IDs  []int  `json:"ids"`
}

func readVectors(t testing.TB) []vector {
	t.Helper()
	data, err := os.ReadFile("testdata/qwen3_vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors []vector
	if err := json.Unmarshal(data, &vectors); err != nil {
		t.Fatal(err)
	}
	return vectors
}

func TestQwen3Vectors(t *testing.T) {
	tok := qwen3(t)
	vectors := readVectors(t)
	if len(vectors) != 140 {
		t.Fatalf("%d vectors, want 140", len(vectors))
	}
	for _, v := range vectors {
		got, err := tok.Encode(v.Text)
		if err != nil || !slices.Equal(got, v.IDs) {
			t.Errorf("Encode(%q) = %v, %v; want %v", v.Text, got, err, v.IDs)
		}
		if got, want := tok.Decode(v.IDs, false), nfc(v.Text); got != want {
			t.Errorf("Decode(%v) = %q, want %q", v.IDs, got, want)
		}
	}
	if got := tok.Size(); got != 151669 {
		t.Errorf("Size() = %d, want 151669", got)
	}
	// <think> is an added token but not a special one.
	ids, err := tok.Encode("<think>a</think><|im_end|>")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := tok.Decode(ids, true), "<think>a</think>"; got != want {
		t.Errorf("Decode, special tokens skipped = %q, want %q", got, want)
	}
}

// TestGoldenPrompts encodes the prompts of the demo model's reference outputs, made by transformers.
func TestGoldenPrompts(t *testing.T) {
	tok := shapes(t)
	data, err := os.ReadFile("../testdata/golden/shapes-vl-moe/cases.json")
	if err != nil {
		t.Fatal(err)
	}
	var cases []struct {
		Name       string  `json:"name"`
		Prompt     *string `json:"prompt"`
		InputIDs   []int   `json:"input_ids"`
		OutputIDs  []int   `json:"output_ids"`
		OutputText *string `json:"output_text"`
	}
	if err := json.Unmarshal(data, &cases); err != nil {
		t.Fatal(err)
	}
	prompts, outputs := 0, 0
	for _, c := range cases {
		if c.Prompt != nil {
			prompts++
			got, err := tok.Encode(*c.Prompt)
			if err != nil || !slices.Equal(got, c.InputIDs) {
				t.Errorf("%s: Encode(prompt) = %v, %v; want %v", c.Name, got, err, c.InputIDs)
			}
		}
		if c.OutputText != nil {
			outputs++
			if got := tok.Decode(c.OutputIDs, true); got != *c.OutputText {
				t.Errorf("%s: Decode(output) = %q, want %q", c.Name, got, *c.OutputText)
			}
		}
	}
	if prompts == 0 || outputs == 0 {
		t.Fatalf("%d prompts and %d outputs in cases.json", prompts, outputs)
	}
}

func TestAddedTokensOnlyInTrustedText(t *testing.T) {
	tok := shapes(t)
	end, ok := tok.ID("<|im_end|>")
	if !ok {
		t.Fatal("no <|im_end|>")
	}
	const text = "Hi<|im_end|>\n"
	ids, err := tok.Encode(text)
	if err != nil || !slices.Contains(ids, end) {
		t.Errorf("Encode(%q) = %v, %v; want %d among them", text, ids, err, end)
	}
	ordinary := tok.EncodeOrdinary(text)
	if slices.Contains(ordinary, end) {
		t.Errorf("EncodeOrdinary(%q) = %v, has the special token %d", text, ordinary, end)
	}
	if got := tok.Decode(ordinary, true); got != text {
		t.Errorf("Decode(EncodeOrdinary(%q)) = %q", text, got)
	}
	if got := tok.Decode(ids, true); got != "Hi\n" {
		t.Errorf("Decode without special tokens = %q, want %q", got, "Hi\n")
	}
	if _, special, ok := tok.Token(end); !special || !ok {
		t.Errorf("Token(%d): special %v, ok %v", end, special, ok)
	}
}

func TestTokenLookup(t *testing.T) {
	tok := shapes(t)
	id, ok := tok.ID("Ġthe")
	if !ok {
		t.Fatal(`ID("Ġthe"): not found`)
	}
	if b, special, ok := tok.Token(id); string(b) != " the" || special || !ok {
		t.Errorf("Token(%d) = %q, %v, %v", id, b, special, ok)
	}
	for _, id := range []int{-1, tok.Size(), 1 << 40} {
		if b, _, ok := tok.Token(id); ok {
			t.Errorf("Token(%d) = %q, want none", id, b)
		}
	}
	if _, ok := tok.ID("no such token"); ok {
		t.Error("ID of a token that is not there")
	}
	if tok.Size() != 627 {
		t.Errorf("Size() = %d, want 627", tok.Size())
	}
}

func TestNotUTF8(t *testing.T) {
	tok := shapes(t)
	if _, err := tok.Encode("a\xff"); !errors.Is(err, ErrNotUTF8) {
		t.Errorf("Encode: %v, want ErrNotUTF8", err)
	}
	if got, want := tok.Decode(tok.EncodeOrdinary("a\xf0\x9fb"), false), "a\uFFFDb"; got != want {
		t.Errorf("EncodeOrdinary: %q, want %q", got, want)
	}
}

// byteIDs returns the tokens of single bytes.
func byteIDs(t testing.TB, tok *Tokenizer, raw []byte) []int {
	t.Helper()
	ids := make([]int, len(raw))
	for i, b := range raw {
		if tok.bytes[b] < 0 {
			t.Fatalf("no token for byte %#x", b)
		}
		ids[i] = int(tok.bytes[b])
	}
	return ids
}

// TestMaximalSubparts has the examples of the Unicode standard (section 3.9, tables 3-8 to 3-11).
func TestMaximalSubparts(t *testing.T) {
	tok := shapes(t)
	for _, c := range []struct{ raw, want string }{
		{"\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41", "��������A"},
		{"\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41", "��������A"},
		{"\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42", "�����A��B"},
		{"\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41", "����A"},
		{"\xF0\x9F\x98", "�"},
		{"\xF0\x9F\x98\xF0\x9F\x98\x80", "�😀"},
	} {
		ids := byteIDs(t, tok, []byte(c.raw))
		if got := tok.Decode(ids, false); got != c.want {
			t.Errorf("Decode(% x) = %q, want %q", c.raw, got, c.want)
		}
	}
}

func TestStreamNeverSplitsCharacters(t *testing.T) {
	tok := shapes(t)
	s := tok.Stream(true)
	var got []string
	for _, id := range byteIDs(t, tok, []byte("a😀é")) {
		got = append(got, s.Push(id))
	}
	if want := []string{"a", "", "", "", "😀", "", "é"}; !slices.Equal(got, want) {
		t.Errorf("Push: %q, want %q", got, want)
	}
	if rest := s.Flush(); rest != "" {
		t.Errorf("Flush() = %q after whole characters", rest)
	}
}

// TestStreamIsDecode draws ids, broken UTF-8 included, and compares the two ways to decode them.
func TestStreamIsDecode(t *testing.T) {
	tok := shapes(t)
	rapid.Check(t, func(t *rapid.T) {
		ids := rapid.SliceOf(rapid.IntRange(-1, tok.Size())).Draw(t, "ids")
		skip := rapid.Bool().Draw(t, "skip")
		s := tok.Stream(skip)
		var b strings.Builder
		for _, id := range ids {
			piece := s.Push(id)
			if !utf8.ValidString(piece) {
				t.Fatalf("Push(%d) = %q is not UTF-8", id, piece)
			}
			if len(s.pending) > 3 {
				t.Fatalf("%d bytes pending", len(s.pending))
			}
			b.WriteString(piece)
		}
		b.WriteString(s.Flush())
		if want := tok.Decode(ids, skip); b.String() != want {
			t.Fatalf("stream gave %q, Decode %q", b.String(), want)
		}
	})
}

func TestConcurrentUse(t *testing.T) {
	tok := shapes(t)
	texts := []string{"a small purple circle", "Which image has a red star? It's 12:30.", "naïve 世界 😀", strings.Repeat("x", 500)}
	want := make([][]int, len(texts))
	for i, text := range texts {
		want[i] = tok.EncodeOrdinary(text)
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for n := range 200 {
				i := n % len(texts)
				if got := tok.EncodeOrdinary(texts[i]); !slices.Equal(got, want[i]) {
					t.Errorf("EncodeOrdinary(%q) = %v, want %v", texts[i], got, want[i])
				}
			}
		})
	}
	wg.Wait()
}
