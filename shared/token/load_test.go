package token

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// edited returns the small tokenizer.json with one change, as parsed JSON sees it.
func edited(t testing.TB, edit func(root map[string]any)) []byte {
	t.Helper()
	data, err := os.ReadFile("testdata/shapes_tokenizer.json")
	if err != nil {
		t.Fatal(err)
	}
	var root map[string]any
	if err := json.Unmarshal(data, &root); err != nil {
		t.Fatal(err)
	}
	edit(root)
	out, err := json.Marshal(root)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// object returns the object at a path of keys.
func object(root map[string]any, keys ...string) map[string]any {
	for _, k := range keys {
		root = root[k].(map[string]any)
	}
	return root
}

func TestRefused(t *testing.T) {
	step := func(root map[string]any, i int) map[string]any {
		return object(root, "pre_tokenizer")["pretokenizers"].([]any)[i].(map[string]any)
	}
	for _, c := range []struct {
		name string
		edit func(root map[string]any)
		want error
		says string
	}{
		{"pattern", func(r map[string]any) { object(step(r, 0), "pattern")["Regex"] = `\w+|\s+` }, ErrUnsupported, `\\w+`},
		{"string pattern", func(r map[string]any) { step(r, 0)["pattern"] = map[string]any{"String": " "} }, ErrUnsupported, "regular expression"},
		{"split behaviour", func(r map[string]any) { step(r, 0)["behavior"] = "Removed" }, ErrUnsupported, "Split"},
		{"prefix space", func(r map[string]any) { step(r, 1)["add_prefix_space"] = true }, ErrUnsupported, "prefix space"},
		{"byte-level pattern", func(r map[string]any) { delete(step(r, 1), "use_regex") }, ErrUnsupported, "ByteLevel"},
		{"no pre-tokenizer", func(r map[string]any) { r["pre_tokenizer"] = nil }, ErrUnsupported, "pre-tokenizer"},
		{"normalizer", func(r map[string]any) { r["normalizer"] = map[string]any{"type": "NFKC"} }, ErrUnsupported, "NFKC"},
		{"post-processor", func(r map[string]any) { r["post_processor"] = map[string]any{"type": "TemplateProcessing"} }, ErrUnsupported, "TemplateProcessing"},
		{"decoder", func(r map[string]any) { r["decoder"] = nil }, ErrUnsupported, "decoder"},
		{"model", func(r map[string]any) { object(r, "model")["type"] = "Unigram" }, ErrUnsupported, "Unigram"},
		{"dropout", func(r map[string]any) { object(r, "model")["dropout"] = 0.1 }, ErrUnsupported, "dropout"},
		{"byte fallback", func(r map[string]any) { object(r, "model")["byte_fallback"] = true }, ErrUnsupported, "byte_fallback"},
		{"ignore merges", func(r map[string]any) { object(r, "model")["ignore_merges"] = true }, ErrUnsupported, "ignore_merges"},
		{"suffix", func(r map[string]any) { object(r, "model")["end_of_word_suffix"] = "</w>" }, ErrUnsupported, "end_of_word_suffix"},
		{"missing byte", func(r map[string]any) { delete(object(r, "model", "vocab"), "!") }, ErrUnsupported, "0x21"},
		{"no vocabulary", func(r map[string]any) { object(r, "model")["vocab"] = nil }, ErrMalformed, "empty"},
		{"negative id", func(r map[string]any) { object(r, "model", "vocab")["ĠĠĠ"] = -1 }, ErrMalformed, "-1"},
		{"huge id", func(r map[string]any) { object(r, "model", "vocab")["ĠĠĠ"] = 1 << 30 }, ErrMalformed, "1073741824"},
		{"shared id", func(r map[string]any) { object(r, "model", "vocab")["ĠĠĠ"] = 5 }, ErrMalformed, "share id 5"},
		{"merge of nothing", func(r map[string]any) { object(r, "model")["merges"] = []any{[]any{"Ġt", "nope"}} }, ErrMalformed, "nope"},
		{"merge of three", func(r map[string]any) { object(r, "model")["merges"] = []any{"a b c"} }, ErrMalformed, "a b c"},
		{"merges of both kinds", func(r map[string]any) { object(r, "model")["merges"] = []any{[]any{"h", "e"}, "h e"} }, ErrMalformed, "merges"},
		{"empty added token", func(r map[string]any) { r["added_tokens"].([]any)[0].(map[string]any)["content"] = "" }, ErrMalformed, "619"},
		{"added token's id taken", func(r map[string]any) { r["added_tokens"].([]any)[0].(map[string]any)["id"] = 0 }, ErrMalformed, "share id 0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := parse(edited(t, c.edit))
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v, want %v that says %q", err, c.want, c.says)
			}
		})
	}
	if _, err := parse([]byte(`{"model":`)); !errors.Is(err, ErrMalformed) {
		t.Errorf("cut JSON: %v", err)
	}
	if _, err := Load(t.TempDir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("empty folder: %v", err)
	}
}

func TestLoadFolderOrFile(t *testing.T) {
	data, err := os.ReadFile("testdata/shapes_tokenizer.json")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "tokenizer.json"), data, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dir, filepath.Join(dir, "tokenizer.json")} {
		if _, err := Load(path); err != nil {
			t.Errorf("Load(%s): %v", path, err)
		}
	}
}

// TestMergesAsStrings: both forms of merges give the same ids.
func TestMergesAsStrings(t *testing.T) {
	want := shapes(t)
	got, err := parse(edited(t, func(root map[string]any) {
		merges := object(root, "model")["merges"].([]any)
		for i, m := range merges {
			p := m.([]any)
			merges[i] = p[0].(string) + " " + p[1].(string)
		}
	}))
	if err != nil {
		t.Fatal(err)
	}
	const text = "There are three small orange stars in the bottom left."
	if a, b := got.EncodeOrdinary(text), want.EncodeOrdinary(text); !slices.Equal(a, b) {
		t.Errorf("merges as strings give %v, as pairs %v", a, b)
	}
}

// TestAddedTokenRules has the switches of added tokens, as Hugging Face tokenizers obeys them.
func TestAddedTokenRules(t *testing.T) {
	tok, err := parse(edited(t, func(root map[string]any) {
		add := func(id int, content string, flags ...string) {
			a := map[string]any{"id": id, "content": content}
			for _, f := range flags {
				a[f] = true
			}
			root["added_tokens"] = append(root["added_tokens"].([]any), a)
		}
		add(700, "<a>")
		add(701, "<a>b")
		add(702, "<left>", "lstrip")
		add(703, "<right>", "rstrip")
		add(704, "word", "single_word")
		add(705, "é!", "normalized")
	}))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		text string
		want []int // of the added tokens, with -1 for other text
	}{
		{"<a>", []int{700}},
		{"<a>b<a>", []int{701, 700}}, // the longest
		{"x  <left> y", []int{-1, 702, -1}},
		{"x <right>  y", []int{-1, 703, -1}},
		{"<right> <left>", []int{703, 702}},
		{"sword word words", []int{-1, 704, -1}},
		{"e\u0301!", []int{705}}, // only after NFC
		{"<", []int{-1}},
	} {
		var got []int
		ids, err := tok.Encode(c.text)
		if err != nil {
			t.Fatal(err)
		}
		for _, id := range ids {
			if id >= 700 {
				got = append(got, id)
			} else if len(got) == 0 || got[len(got)-1] != -1 {
				got = append(got, -1)
			}
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("Encode(%q): %v (%v), want %v", c.text, got, ids, c.want)
		}
	}
	// Stripped white space is gone: nothing but x, the token and " y" is left.
	ids, err := tok.Encode("x  <left> y")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := tok.Decode(ids, false), "x<left> y"; got != want {
		t.Errorf("Decode = %q, want %q", got, want)
	}
	if b, _, ok := tok.Token(650); ok {
		t.Errorf("Token of an id between vocabulary and added tokens: %q", b)
	}
}
