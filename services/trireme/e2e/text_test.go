package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/openai/openai-go/v3"

	"trireme.dev/shared/token"
)

// A model that takes no pictures needs no encoder, and nobody has to know that: the usual topology runs without one, and the
// reference answers come out. The reference has no tokenizer; the bundled model's is put beside it, which knows all of its ids.
func TestTextModel(t *testing.T) {
	t.Parallel()
	const family, bundled = root + "/shared/testdata/families/qwen3_moe", root + "/models/shapes-vl-moe"
	dir := filepath.Join(t.TempDir(), "text")
	if err := os.CopyFS(dir, os.DirFS(family)); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} {
		data, err := os.ReadFile(filepath.Join(bundled, file))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, file), data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	tokenizer, err := token.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(dir, "golden.json"))
	if err != nil {
		t.Fatal(err)
	}
	var golden struct {
		Cases []struct {
			Input  []int64 `json:"input_ids"`
			Output []int   `json:"output_ids"`
		} `json:"cases"`
	}
	if err := json.Unmarshal(data, &golden); err != nil || len(golden.Cases) == 0 {
		t.Fatalf("%d cases, %v", len(golden.Cases), err)
	}
	c := start(t, "--model", dir)
	for _, p := range c.children() {
		if p.role == "encoder" {
			t.Errorf("encoder %d runs", p.pid)
		}
	}
	for i, g := range golden.Cases {
		p := openai.CompletionNewParams{
			Model: "text", Prompt: openai.CompletionNewParamsPromptUnion{OfArrayOfTokens: g.Input},
			MaxTokens: openai.Int(int64(len(g.Output))), Temperature: openai.Float(0),
		}
		p.SetExtraFields(map[string]any{"ignore_eos": true})
		client := c.client()
		got, err := client.Completions.New(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		if want := tokenizer.Decode(g.Output, true); got.Choices[0].Text != want {
			t.Errorf("case %d: %q, want %q", i, got.Choices[0].Text, want)
		}
	}
}
