package hf_test

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"trireme.dev/shared/hf"
)

// setKey sets or, with nil, removes a key of c; dots lead into nested objects.
func setKey(c map[string]any, key string, v any) {
	for {
		head, rest, nested := strings.Cut(key, ".")
		if !nested {
			break
		}
		c, key = c[head].(map[string]any), rest
	}
	if v == nil {
		delete(c, key)
		return
	}
	c[key] = v
}

// wantError checks that err is one line, wraps sentinel and has the text.
func wantError(t *testing.T, err, sentinel error, text string) {
	t.Helper()
	switch {
	case err == nil:
		t.Fatal("no error")
	case !errors.Is(err, sentinel):
		t.Errorf("%v\ndoes not wrap: %v", err, sentinel)
	case !strings.Contains(err.Error(), text):
		t.Errorf("%v\ndoes not say: %s", err, text)
	case strings.Contains(err.Error(), "\n"):
		t.Errorf("%v\nis more than one line", err)
	}
}

// TestBadConfig changes one key of a good folder each time.
func TestBadConfig(t *testing.T) {
	dir := newTiny(24).write(t, form{v4: true, shards: 2})
	path := filepath.Join(dir, "config.json")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	yarn := map[string]any{"rope_type": "yarn", "factor": 4}
	tests := []struct {
		key      string
		value    any
		sentinel error
		text     string
	}{
		{"architectures", []string{"LlamaForCausalLM"}, hf.ErrUnsupported, `architecture "LlamaForCausalLM" is not one of`},
		{"quantization_config", map[string]any{"quant_method": "fp8"}, hf.ErrUnsupported, "quantization_config is set"},
		{"text_config", nil, hf.ErrConfig, "text_config or vision_config is missing"},
		{"vision_config", nil, hf.ErrConfig, "text_config or vision_config is missing"},
		{"image_token_id", nil, hf.ErrConfig, "image_token_id is missing"},
		{"image_token_id", 96, hf.ErrConfig, "token id 96 is beyond vocab_size 96"},
		{"text_config.hidden_size", nil, hf.ErrConfig, "text_config.hidden_size is missing"},
		{"text_config.hidden_size", -1, hf.ErrConfig, "text_config.hidden_size is -1"},
		{"text_config.hidden_size", "32", hf.ErrConfig, "cannot unmarshal string"},
		{"text_config.num_hidden_layers", 1 << 30, hf.ErrConfig, "num_hidden_layers is 1073741824"},
		{"text_config.num_key_value_heads", 3, hf.ErrConfig, "num_key_value_heads 3 does not divide"},
		{"text_config.num_attention_heads", 0, hf.ErrConfig, "num_attention_heads is 0"},
		{"text_config.head_dim", 15, hf.ErrConfig, "head_dim is 15, want an even number"},
		{"text_config.num_experts_per_tok", 5, hf.ErrConfig, "num_experts_per_tok 5 exceeds num_experts 4"},
		{"text_config.num_experts", nil, hf.ErrConfig, "text_config.num_experts is missing"},
		{"text_config.hidden_act", "gelu", hf.ErrUnsupported, `hidden_act is "gelu"`},
		{"text_config.attention_bias", true, hf.ErrUnsupported, "attention_bias is true"},
		{"text_config.use_sliding_window", true, hf.ErrUnsupported, "use_sliding_window is true"},
		{"text_config.rope_scaling", yarn, hf.ErrUnsupported, `rope_scaling has the type "yarn"`},
		{"text_config.rope_theta", nil, hf.ErrConfig, "rope_theta is there"},
		{"text_config.rope_theta", 0, hf.ErrConfig, "rope_theta is 0"},
		{"text_config.rope_scaling.mrope_section", []int{4, 4}, hf.ErrConfig, "mrope_section is [4 4], want three numbers that add up to 8"},
		{"text_config.rope_scaling.mrope_interleaved", false, hf.ErrUnsupported, "mrope_interleaved is false"},
		{"text_config.partial_rotary_factor", 0.5, hf.ErrUnsupported, "partial_rotary_factor is 0.5"},
		{"vision_config.num_position_embeddings", 8, hf.ErrConfig, "num_position_embeddings is 8, want a square number"},
		{"vision_config.deepstack_visual_indexes", []int{2, 0}, hf.ErrConfig, "deepstack_visual_indexes is [2 0]"},
		{"vision_config.deepstack_visual_indexes", []int{3}, hf.ErrConfig, "deepstack_visual_indexes is [3]"},
		{"vision_config.out_hidden_size", 64, hf.ErrConfig, "out_hidden_size is 64"},
		{"vision_config.num_heads", 16, hf.ErrConfig, "vision_config.hidden_size 16 is not a multiple"},
		{"vision_config.hidden_act", "quick_gelu", hf.ErrUnsupported, `vision_config.hidden_act is "quick_gelu"`},
		{"text_config.vocab_size", 128, hf.ErrConfig, "tensor model.language_model.embed_tokens.weight: its shape is [96 32], but config.json asks for [128 32]"},
		{"text_config.moe_intermediate_size", 20, hf.ErrConfig, "its shape is [4 24 32], but config.json asks for [4 32 20] or its transpose"},
		{"text_config.num_hidden_layers", 3, hf.ErrMissing, "tensor model.language_model.layers.2.input_layernorm.weight: missing"},
		{"text_config.num_hidden_layers", 1, hf.ErrUnsupported, "tensor model.language_model.layers.1.input_layernorm.weight"},
	}
	for _, tt := range tests {
		t.Run(tt.text, func(t *testing.T) {
			if err := os.WriteFile(path, good, 0o644); err != nil {
				t.Fatal(err)
			}
			if tt.key == "text_config.num_hidden_layers" && tt.value == 1 {
				editConfig(t, path, path, map[string]any{"vision_config.deepstack_visual_indexes": []int{0}})
			}
			editConfig(t, path, path, map[string]any{tt.key: tt.value})
			_, err := hf.Open(dir)
			wantError(t, err, tt.sentinel, tt.text)
			if err != nil && !strings.Contains(err.Error(), dir) {
				t.Errorf("%v\ndoes not name the folder", err)
			}
			if _, _, err := hf.ReadConfig(dir); !errors.Is(err, tt.sentinel) {
				t.Errorf("ReadConfig: %v", err)
			}
		})
	}
}

// TestOtherArchitecture: a file whose keys have other types is refused for its architecture, not for them.
func TestOtherArchitecture(t *testing.T) {
	for _, tt := range []struct{ config, arch string }{
		{`{"architectures":["InternVLForConditionalGeneration"],"vision_config":{"patch_size":[14,14]}}`, "InternVLForConditionalGeneration"},
		{`{"model_type":"internvl","hidden_size":"many"}`, "internvl"},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(tt.config), 0o644); err != nil {
			t.Fatal(err)
		}
		_, err := hf.Open(dir)
		wantError(t, err, hf.ErrUnsupported, `architecture "`+tt.arch+`" is not one of`)
	}
}

// TestAmbiguousExperts is about experts as wide as the model in a folder that does not say who wrote it.
func TestAmbiguousExperts(t *testing.T) {
	dir := newTiny(32).write(t, form{v4: true})
	path := filepath.Join(dir, "config.json")
	editConfig(t, path, path, map[string]any{"transformers_version": nil})
	_, err := hf.Open(dir)
	wantError(t, err, hf.ErrUnsupported, "need a transformers_version in config.json")

	// A version that does not match the layout is caught by gate_up_proj's shape.
	editConfig(t, path, path, map[string]any{"transformers_version": "5.1.0"})
	_, err = hf.Open(dir)
	wantError(t, err, hf.ErrConfig, "gate_up_proj: its shape is [4 32 64], but config.json asks for [4 64 32]")
}

// TestBadFiles damages files of a good folder.
func TestBadFiles(t *testing.T) {
	const shard = "model-00002-of-00003.safetensors"
	rewrite := func(name string, change func(string) string) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			b, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, name), []byte(change(string(b))), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	remove := func(name string) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			if err := os.Remove(filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	index := "model.safetensors.index.json"
	tests := []struct {
		name     string
		damage   func(*testing.T, string)
		sentinel error
		text     string
	}{
		{"no config", remove("config.json"), fs.ErrNotExist, "config.json: no such file"},
		{"config is not JSON", rewrite("config.json", func(s string) string { return s[:40] }), hf.ErrConfig, "config.json: unexpected end of JSON input"},
		{"generation_config is not JSON", rewrite("generation_config.json", func(string) string { return "[]" }), hf.ErrConfig, "generation_config.json: json: cannot unmarshal"},
		{"end token out of range", rewrite("generation_config.json", func(string) string { return `{"eos_token_id": 96}` }), hf.ErrConfig, "eos_token_id 96 is beyond"},
		{"no index", remove(index), hf.ErrMissing, "neither model.safetensors nor model.safetensors.index.json: missing"},
		{"empty index", rewrite(index, func(string) string { return `{"weight_map": {}}` }), hf.ErrMissing, "weight_map: missing"},
		{"index leads out of the folder", rewrite(index, func(s string) string { return strings.ReplaceAll(s, shard, "../x.safetensors") }), hf.ErrConfig, `"../x.safetensors" is not the name of a file in the folder`},
		{"missing shard", remove(shard), hf.ErrMissing, shard + ": weight file named in model.safetensors.index.json: missing"},
		{"tensor in another file", rewrite(index, func(s string) string { return strings.Replace(s, "00001-of", "00003-of", 1) }), hf.ErrMissing, "model-00003-of-00003.safetensors: tensor "},
		{"tensor not in the index", rewrite(index, dropFirstTensor), hf.ErrMissing, ": missing"},
		{"cut shard", rewrite(shard, func(s string) string { return s[:len(s)-100] }), hf.ErrDamaged, shard + ": the tensors need "},
		{"shard cut in the header", rewrite(shard, func(s string) string { return s[:100] }), hf.ErrDamaged, shard + ": the header needs "},
		{"empty shard", rewrite(shard, func(string) string { return "" }), hf.ErrDamaged, shard + ": 0 bytes are too few"},
		{"longer shard", rewrite(shard, func(s string) string { return s + "xy" }), hf.ErrDamaged, shard + ": 2 bytes after the last tensor"},
		{"pointer of Git LFS", rewrite(shard, func(string) string { return "version https://git-lfs.github.com/spec/v1\noid sha256:00\n" }), hf.ErrDamaged, "git lfs pull"},
		{"other shape", rewrite(shard, func(s string) string { return strings.Replace(s, `"shape":[16]`, `"shape":[61]`, 1) }), hf.ErrDamaged, "does not fit bytes"},
		{"integers", rewrite(shard, func(s string) string { return strings.ReplaceAll(s, `"BF16"`, `"U16" `) }), hf.ErrDType, "U16, want BF16, F16 or F32"},
		{"shard is a folder", func(t *testing.T, dir string) {
			remove(shard)(t, dir)
			if err := os.Mkdir(filepath.Join(dir, shard), 0o755); err != nil {
				t.Fatal(err)
			}
		}, hf.ErrDamaged, shard + ": not a regular file"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := newTiny(24).write(t, form{v4: true, shards: 3})
			tt.damage(t, dir)
			_, err := hf.Open(dir)
			wantError(t, err, tt.sentinel, tt.text)
			if err != nil && !strings.Contains(err.Error(), dir) {
				t.Errorf("%v\ndoes not name the folder", err)
			}
		})
	}
}

// dropFirstTensor removes one tensor from an index.
func dropFirstTensor(s string) string {
	var c map[string]any
	if err := json.Unmarshal([]byte(s), &c); err != nil {
		panic(err)
	}
	delete(c["weight_map"].(map[string]any), "model.language_model.layers.1.self_attn.k_norm.weight")
	b, err := json.Marshal(c)
	if err != nil {
		panic(err)
	}
	return string(b)
}

// TestInexactMatrix is about a float32 matrix with a value between two of bf16.
func TestInexactMatrix(t *testing.T) {
	dir := newTiny(24).write(t, form{dtype: "F32"})
	path := filepath.Join(dir, "model.safetensors")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-4] = 1 // the lowest byte of the last element of the last matrix, pos_embed
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	_, err = open(t, dir).Weights()
	wantError(t, err, hf.ErrDType, path+": tensor model.visual.pos_embed.weight: F32, and ")
}
