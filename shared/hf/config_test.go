package hf

import (
	"encoding/json"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"trireme.dev/shared/model"
)

// hubConfig is config.json of Qwen/Qwen3-VL-30B-A3B-Instruct on the hub.
const hubConfig = `{
  "architectures": ["Qwen3VLMoeForConditionalGeneration"],
  "image_token_id": 151655,
  "model_type": "qwen3_vl_moe",
  "text_config": {
    "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643, "decoder_sparse_step": 1,
    "dtype": "bfloat16", "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 262144, "mlp_only_layers": [],
    "model_type": "qwen3_vl_moe_text", "moe_intermediate_size": 768, "norm_topk_prob": true,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_interleaved": true, "mrope_section": [24, 20, 20], "rope_type": "default"},
    "rope_theta": 5000000, "use_cache": true, "vocab_size": 151936
  },
  "tie_word_embeddings": false,
  "transformers_version": "4.57.0.dev0",
  "video_token_id": 151656,
  "vision_config": {
    "deepstack_visual_indexes": [8, 16, 24], "depth": 27, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 1152,
    "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 4304, "model_type": "qwen3_vl_moe",
    "num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": 2048, "patch_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2
  },
  "vision_end_token_id": 151653,
  "vision_start_token_id": 151652
}`

func TestHubConfig(t *testing.T) {
	var c configFile
	if err := json.Unmarshal([]byte(hubConfig), &c); err != nil {
		t.Fatal(err)
	}
	got, err := c.toConfig("config.json")
	if err != nil {
		t.Fatal(err)
	}
	want := model.Config{
		Arch: ArchQwen3VLMoe,
		Text: model.Text{
			Hidden: 2048, Layers: 48, Heads: 32, KVHeads: 4, HeadDim: 128, Vocab: 151936, Context: 262144, RMSEps: 1e-6,
			QKNorm: true, Rope: model.Rope{Theta: 5e6, Sections: []int{24, 20, 20}},
			Experts: 128, TopK: 8, ExpertHidden: 768, NormTopK: true, DenseHidden: 6144, Dense: make([]bool, 48),
		},
		Vision: &model.Vision{
			Depth: 27, Hidden: 1152, Heads: 16, MLP: 4304, Out: 2048, Patch: 16, Temporal: 2, Merge: 2, Channels: 3,
			Positions: 2304, DeepStack: []int{8, 16, 24}, Theta: 1e4, LayerEps: 1e-6,
			ImageToken: 151655, VideoToken: 151656, VisionStart: 151652, VisionEnd: 151653,
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestDenseLayers(t *testing.T) {
	for _, tt := range []struct {
		settings string
		want     []bool
	}{
		{`"num_experts": 8`, []bool{false, false, false, false}},
		{`"num_local_experts": 8`, []bool{false, false, false, false}},
		{`"num_experts": 8, "mlp_only_layers": [1]`, []bool{false, true, false, false}},
		{`"num_experts": 8, "decoder_sparse_step": 2`, []bool{true, false, true, false}},
		{`"num_experts": 8, "decoder_sparse_step": 2, "mlp_only_layers": [3]`, []bool{true, false, true, true}},
		{`"num_experts": 0`, []bool{true, true, true, true}},
	} {
		var c configFile
		err := json.Unmarshal([]byte(`{"model_type": "qwen3_moe", "hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2,
			"num_key_value_heads": 1, "vocab_size": 9, "max_position_embeddings": 9, "rope_theta": 1e6, "num_experts_per_tok": 2,
			"moe_intermediate_size": 4, "intermediate_size": 16, `+tt.settings+`}`), &c)
		if err != nil {
			t.Fatal(err)
		}
		cfg, err := c.toConfig("config.json")
		if err != nil || !slices.Equal(cfg.Text.Dense, tt.want) {
			t.Errorf("%s: dense layers %v, %v; want %v", tt.settings, cfg.Text.Dense, err, tt.want)
		}
		if cfg.Text.HeadDim != 4 || cfg.Text.NormTopK || cfg.Text.RMSEps != 1e-6 {
			t.Errorf("defaults: head_dim %d, norm_topk_prob %v, rms_norm_eps %g; want 4, false, 1e-6",
				cfg.Text.HeadDim, cfg.Text.NormTopK, cfg.Text.RMSEps)
		}
	}
}

func TestMajor(t *testing.T) {
	for version, want := range map[string]int{"4.57.0.dev0": 4, "5.17.0": 5, "10": 10, "": 0, "dev": 0} {
		if got := major(version); got != want {
			t.Errorf("major(%q) = %d, want %d", version, got, want)
		}
	}
}
