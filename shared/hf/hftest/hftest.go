// Package hftest writes model folders of any size for tests and benchmarks: the architecture of Qwen3-30B-A3B with
// made-up weights, laid out as on the hub, each matrix of each expert a tensor of its own. The model says nothing, but
// it can be loaded and run. It is no part of a running system.
package hftest

import (
	"bufio"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
)

// Shape is the size of a model. Its other widths follow from these.
type Shape struct {
	Layers, Experts      int
	Hidden, ExpertHidden int // a multiple of 64, a multiple of 8
	Vocab                int
	TopK                 int    // experts that a token is sent to; 0: 8, or all if there are fewer
	Seed                 uint64 // models of different seeds have different weights
}

// ExpertBytes is the size of one expert, three matrices in bf16.
func (s Shape) ExpertBytes() int64 { return 3 * 2 * int64(s.Hidden) * int64(s.ExpertHidden) }

// Bytes is the size of all experts together, which is most of the model.
func (s Shape) Bytes() int64 { return int64(s.Layers) * int64(s.Experts) * s.ExpertBytes() }

type tensor struct {
	name  string
	shape []int
	ones  bool // a norm
}

func (t tensor) bytes() int {
	n := 2
	for _, d := range t.shape {
		n *= d
	}
	return n
}

// Write makes the folder dir with config.json and one weight file for each layer.
func Write(dir string, s Shape) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	const headDim = 64
	heads := s.Hidden / headDim
	config := map[string]any{
		"architectures": []string{"Qwen3MoeForCausalLM"}, "model_type": "qwen3_moe", "dtype": "bfloat16", "hidden_act": "silu",
		"hidden_size": s.Hidden, "num_hidden_layers": s.Layers, "num_attention_heads": heads, "num_key_value_heads": 1,
		"head_dim": headDim, "vocab_size": s.Vocab, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
		"num_experts": s.Experts, "num_experts_per_tok": cmp.Or(s.TopK, min(8, s.Experts)), "moe_intermediate_size": s.ExpertHidden,
		"norm_topk_prob": true, "intermediate_size": 4 * s.Hidden, "decoder_sparse_step": 1, "mlp_only_layers": []int{},
		"rope_theta": 1e6, "tie_word_embeddings": false, "attention_bias": false, "use_sliding_window": false,
		"transformers_version": "4.57.0",
	}
	if err := writeJSON(filepath.Join(dir, "config.json"), config); err != nil {
		return err
	}
	index := map[string]string{}
	rng := rand.New(rand.NewPCG(7, s.Seed))
	for part := range s.Layers + 1 {
		var all []tensor
		if part == 0 {
			all = []tensor{
				{"model.embed_tokens.weight", []int{s.Vocab, s.Hidden}, false},
				{"lm_head.weight", []int{s.Vocab, s.Hidden}, false},
				{"model.norm.weight", []int{s.Hidden}, true},
			}
		} else {
			all = layer(fmt.Sprintf("model.layers.%d.", part-1), s, heads, headDim)
		}
		file := fmt.Sprintf("model-%05d-of-%05d.safetensors", part+1, s.Layers+1)
		if err := writeFile(filepath.Join(dir, file), all, rng); err != nil {
			return err
		}
		for _, t := range all {
			index[t.name] = file
		}
	}
	return writeJSON(filepath.Join(dir, "model.safetensors.index.json"), map[string]any{"weight_map": index})
}

func layer(p string, s Shape, heads, headDim int) []tensor {
	all := []tensor{
		{p + "input_layernorm.weight", []int{s.Hidden}, true},
		{p + "post_attention_layernorm.weight", []int{s.Hidden}, true},
		{p + "self_attn.q_proj.weight", []int{heads * headDim, s.Hidden}, false},
		{p + "self_attn.k_proj.weight", []int{headDim, s.Hidden}, false},
		{p + "self_attn.v_proj.weight", []int{headDim, s.Hidden}, false},
		{p + "self_attn.o_proj.weight", []int{s.Hidden, heads * headDim}, false},
		{p + "self_attn.q_norm.weight", []int{headDim}, true},
		{p + "self_attn.k_norm.weight", []int{headDim}, true},
		{p + "mlp.gate.weight", []int{s.Experts, s.Hidden}, false},
	}
	for e := range s.Experts {
		x := fmt.Sprintf("%smlp.experts.%d.", p, e)
		all = append(all,
			tensor{x + "gate_proj.weight", []int{s.ExpertHidden, s.Hidden}, false},
			tensor{x + "up_proj.weight", []int{s.ExpertHidden, s.Hidden}, false},
			tensor{x + "down_proj.weight", []int{s.Hidden, s.ExpertHidden}, false})
	}
	return all
}

// writeFile writes a safetensors file: 8 bytes of length, the JSON header, the data in the header's order.
func writeFile(path string, all []tensor, rng *rand.Rand) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
	}()
	header := map[string]any{}
	at := 0
	for _, t := range all {
		header[t.name] = map[string]any{"dtype": "BF16", "shape": t.shape, "data_offsets": []int{at, at + t.bytes()}}
		at += t.bytes()
	}
	text, err := json.Marshal(header)
	if err != nil {
		return err
	}
	for len(text)%8 != 0 {
		text = append(text, ' ')
	}
	w := bufio.NewWriterSize(f, 1<<20)
	head := binary.LittleEndian.AppendUint64(nil, uint64(len(text)))
	_, _ = w.Write(append(head, text...)) // Flush tells
	var word [8]byte
	for _, t := range all {
		for n := t.bytes(); n > 0; n -= len(word) {
			v := uint64(0x3f80_3f80_3f80_3f80) // ones
			if !t.ones {
				// Numbers of either sign between 2^-5 and 2^-4: sign, exponent 122, seven random bits.
				v = rng.Uint64()&0x807f_807f_807f_807f | 0x3d00_3d00_3d00_3d00
			}
			binary.LittleEndian.PutUint64(word[:], v)
			_, _ = w.Write(word[:min(n, len(word))])
		}
	}
	if err := w.Flush(); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}

func writeJSON(path string, v any) error {
	data, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, data, 0o644)
}
