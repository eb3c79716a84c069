package e2e

import (
	bits "encoding/binary"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// A model with damaged weights gives no numbers: the client is told that, with logprobs and without, and no process ends.
func TestModelWithoutNumbers(t *testing.T) {
	t.Parallel()
	const norm = "model.language_model.norm.weight"
	dir := copyModel(t)
	files, err := filepath.Glob(filepath.Join(dir, "*.safetensors"))
	if err != nil {
		t.Fatal(err)
	}
	damaged := 0
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		begin := 8 + int(bits.LittleEndian.Uint64(data))
		var header map[string]struct {
			DType string `json:"dtype"`
			At    [2]int `json:"data_offsets"`
		}
		if err := json.Unmarshal(data[8:begin], &header); err != nil {
			t.Fatal(err)
		}
		if header[norm].DType != "BF16" {
			continue
		}
		for i := begin + header[norm].At[0]; i < begin+header[norm].At[1]; i += 2 {
			bits.LittleEndian.PutUint16(data[i:], 0x7fc0) // NaN
			damaged++
		}
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if damaged == 0 {
		t.Fatalf("the model has no %s of BF16", norm)
	}
	c := start(t, "--model", dir, "--log-level", "error")
	children := c.children()
	for _, with := range []string{`"logprobs":true,"top_logprobs":2`, `"logprobs":true,"stream":true`, `"n":1`, `"stream":true`} {
		status, answer := c.post(t, "/v1/chat/completions", `{"messages":[{"role":"user","content":"hi"}],"max_tokens":3,`+with+`}`)
		if status != 500 || !strings.Contains(answer, "the model gave NaN for token 1 of the answer, in prefill") || !strings.Contains(answer, `"model_gave_nan"`) {
			t.Errorf("with %s: %d %s", with, status, answer)
		}
	}
	if now := c.children(); !slices.Equal(now, children) {
		t.Errorf("the processes were %v, and are %v", children, now)
	}
	c.expectNoMemory(t)
}
