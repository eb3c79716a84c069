package modelcmd_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"trireme.dev/services/trireme/modelcmd"
)

const (
	bundled = "../../../models/shapes-vl-moe"
	golden  = "../../../shared/testdata/golden/shapes-vl-moe"
	family  = "../../../shared/testdata/families/qwen3_moe"
)

// tokenize runs the command over input.
func tokenize(c modelcmd.Tokenize, input string) (string, error) {
	var out bytes.Buffer
	err := c.Run(modelcmd.Streams{In: strings.NewReader(input), Out: &out, Err: &bytes.Buffer{}})
	return out.String(), err
}

// TestTokenizeGolden tokenises the prompts of all golden cases, which hold special tokens, and turns the ids back.
func TestTokenizeGolden(t *testing.T) {
	b, err := os.ReadFile(filepath.Join(golden, "cases.json"))
	if err != nil {
		t.Fatal(err)
	}
	var cases []struct {
		Prompt string `json:"prompt"`
		IDs    []int  `json:"input_ids"`
	}
	if err := json.Unmarshal(b, &cases); err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, c := range cases { // cases whose pictures were resized have no prompt
		if c.Prompt != "" {
			cases[n] = c
			n++
		}
	}
	if cases = cases[:n]; n != 20 {
		t.Fatalf("%d golden cases with a prompt, want 20", n)
	}
	alone := t.TempDir() // with tokenizer.json only
	if b, err = os.ReadFile(filepath.Join(bundled, "tokenizer.json")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(alone, "tokenizer.json"), b, 0o644); err != nil {
		t.Fatal(err)
	}

	var texts strings.Builder
	for _, c := range cases {
		b, err := json.Marshal(c.Prompt)
		if err != nil {
			t.Fatal(err)
		}
		texts.Write(append(b, '\n'))
	}
	ids, err := tokenize(modelcmd.Tokenize{Dir: alone}, texts.String())
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSuffix(ids, "\n"), "\n")
	if len(lines) != len(cases) {
		t.Fatalf("%d lines for %d texts", len(lines), len(cases))
	}
	for i, line := range lines {
		var got []int
		if err := json.Unmarshal([]byte(line), &got); err != nil || !slices.Equal(got, cases[i].IDs) {
			t.Errorf("case %d: %s, %v; want %v", i, line, err, cases[i].IDs)
		}
	}
	back, err := tokenize(modelcmd.Tokenize{Dir: bundled, Decode: true}, ids)
	if err != nil {
		t.Fatal(err)
	}
	for i, line := range strings.Split(strings.TrimSuffix(back, "\n"), "\n") {
		var got string
		if err := json.Unmarshal([]byte(line), &got); err != nil || got != cases[i].Prompt {
			t.Errorf("case %d comes back as %s, %v; want %q", i, line, err, cases[i].Prompt)
		}
	}
}

func TestTokenizeLines(t *testing.T) {
	tests := []struct {
		name   string
		decode bool
		in     string
		out    string
		fault  string
	}{
		{"nothing", false, "", "", ""},
		{"empty text", false, `""`, "[]\n", ""},
		{"empty lines", false, "\n\"\"\n  \n\"<|im_end|>\"", "[]\n[621]\n", ""},
		{"no JSON", false, "\"\"\nhello\n", "[]\n", "line 2: want a JSON string"},
		{"two values", false, `"a" "b"`, "", "line 1: want a JSON string"},
		{"ids for texts", false, "[1]", "", "line 1: want a JSON string"},
		{"no ids", true, "[]", "\"\"\n", ""},
		{"special tokens stay", true, "[621, 198]\n", "\"<|im_end|>\\n\"\n", ""},
		{"texts for ids", true, "[]\n\"a\"\n", "\"\"\n", "line 2: want a JSON array of token ids"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			out, err := tokenize(modelcmd.Tokenize{Dir: bundled, Decode: tt.decode}, tt.in)
			if out != tt.out {
				t.Errorf("wrote %q, want %q", out, tt.out)
			}
			if (err == nil) != (tt.fault == "") || err != nil && !strings.Contains(err.Error(), tt.fault) {
				t.Errorf("error %v, want %q", err, tt.fault)
			}
		})
	}
	if _, err := tokenize(modelcmd.Tokenize{Dir: t.TempDir()}, ""); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a folder without tokenizer: %v", err)
	}
}
