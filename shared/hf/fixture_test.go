package hf_test

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"trireme.dev/shared/model"
)

// named is a tensor to be written.
type named struct {
	name  string
	dtype string
	shape []int
	data  []byte
}

// writeSafetensors writes tensors to path in the order given. pad spaces follow the header's object.
func writeSafetensors(t *testing.T, path string, tensors []named, pad int) {
	t.Helper()
	type entry struct {
		DType   string `json:"dtype"`
		Shape   []int  `json:"shape"`
		Offsets [2]int `json:"data_offsets"`
	}
	header := map[string]any{"__metadata__": map[string]string{"format": "pt"}}
	at := 0
	for _, n := range tensors {
		header[n.name] = entry{n.dtype, n.shape, [2]int{at, at + len(n.data)}}
		at += len(n.data)
	}
	b, err := json.Marshal(header)
	if err != nil {
		t.Fatal(err)
	}
	for len(b)%8 != pad%8 {
		b = append(b, ' ')
	}
	file := binary.LittleEndian.AppendUint64(nil, uint64(len(b)))
	file = append(file, b...)
	for _, n := range tensors {
		file = append(file, n.data...)
	}
	if err := os.WriteFile(path, file, 0o644); err != nil {
		t.Fatal(err)
	}
}

// The shape of the tiny model. Experts are width wide, which the tests choose: 24 fits nothing else, 16 makes
// gate_up_proj ambiguous (2I = H) and 32 also down_proj (I = H).
const (
	hidden, layers, heads, kvHeads, headDim = 32, 2, 4, 2, 16
	experts, vocab                          = 4, 96
	vHidden, vDepth, vMLP, vPatch, vSide    = 16, 3, 20, 4, 3
	vMerge, vTemporal, vChannels            = 2, 2, 3
)

var vDeepStack = []int{0, 2}

// tiny is a random model in memory: the truth that folders written from it are compared with.
type tiny struct {
	width   int // of an expert
	weights model.Weights
}

// newTiny draws a model.
func newTiny(width int) *tiny {
	rng := rand.New(rand.NewPCG(1, uint64(width)))
	number := func() model.BF16 { return model.BF16(math.Float32bits(float32(rng.NormFloat64())) >> 16) }
	matrix := func(rows, cols int) model.Matrix {
		m := model.Matrix{Data: make([]model.BF16, rows*cols), Rows: rows, Cols: cols}
		for i := range m.Data {
			m.Data[i] = number()
		}
		return m
	}
	vector := func(n int) []float32 {
		v := make([]float32, n)
		for i := range v {
			v[i] = math.Float32frombits(uint32(number()) << 16)
		}
		return v
	}
	merger := func(norm int) model.Merger {
		joined := vHidden * vMerge * vMerge
		return model.Merger{
			Norm: vector(norm), NormBias: vector(norm),
			FC1: matrix(joined, joined), FC1Bias: vector(joined), FC2: matrix(hidden, joined), FC2Bias: vector(hidden),
		}
	}

	w := model.Weights{Embed: matrix(vocab, hidden), LMHead: matrix(vocab, hidden), Norm: vector(hidden)}
	for range layers {
		l := model.Layer{
			InNorm: vector(hidden), PostNorm: vector(hidden),
			Q: matrix(heads*headDim, hidden), K: matrix(kvHeads*headDim, hidden), V: matrix(kvHeads*headDim, hidden),
			O: matrix(hidden, heads*headDim), QNorm: vector(headDim), KNorm: vector(headDim),
			Router: matrix(experts, hidden),
		}
		for range experts {
			l.Experts = append(l.Experts, model.Expert{
				Gate: matrix(width, hidden), Up: matrix(width, hidden), Down: matrix(hidden, width),
			})
		}
		w.Layers = append(w.Layers, l)
	}
	v := &model.VisionWeights{
		PatchEmbed: matrix(vHidden, vChannels*vTemporal*vPatch*vPatch), PatchBias: vector(vHidden),
		PosEmbed: matrix(vSide*vSide, vHidden), Merger: merger(vHidden),
	}
	for range vDepth {
		v.Blocks = append(v.Blocks, model.VisionBlock{
			Norm1: vector(vHidden), Norm1Bias: vector(vHidden), Norm2: vector(vHidden), Norm2Bias: vector(vHidden),
			QKV: matrix(3*vHidden, vHidden), QKVBias: vector(3 * vHidden),
			Proj: matrix(vHidden, vHidden), ProjBias: vector(vHidden),
			FC1: matrix(vMLP, vHidden), FC1Bias: vector(vMLP), FC2: matrix(vHidden, vMLP), FC2Bias: vector(vHidden),
		})
	}
	for range vDeepStack {
		v.DeepStack = append(v.DeepStack, merger(vHidden*vMerge*vMerge))
	}
	w.Vision = v
	return &tiny{width: width, weights: w}
}

// form says how a folder is written.
type form struct {
	v4         bool   // settings and experts as transformers 4.57 writes them, as on the hub; else as 5.17 does
	shards     int    // files; 0: model.safetensors without an index
	tied       bool   // without lm_head.weight
	perExpert  bool   // experts in tensors of their own
	dtype      string // of matrices; "" is BF16
	misaligned bool   // tensor data begins at an odd address
}

// tensors lists the model's tensors under the hub's names.
func (m *tiny) tensors(f form) []named {
	var out []named
	dtype := f.dtype
	if dtype == "" {
		dtype = "BF16"
	}
	put := func(name, dtype string, shape []int, elements []model.BF16) {
		var data []byte
		for _, e := range elements {
			if dtype == "F32" {
				data = binary.LittleEndian.AppendUint32(data, uint32(e)<<16)
			} else {
				data = binary.LittleEndian.AppendUint16(data, uint16(e))
			}
		}
		out = append(out, named{name, dtype, shape, data})
	}
	matrix := func(name string, x model.Matrix) { put(name, dtype, []int{x.Rows, x.Cols}, x.Data) }
	vector := func(name string, x []float32) {
		e := make([]model.BF16, len(x))
		for i := range e {
			e[i] = model.BF16(math.Float32bits(x[i]) >> 16)
		}
		put(name, "BF16", []int{len(x)}, e)
	}
	linear := func(name string, x model.Matrix, bias []float32) {
		matrix(name+".weight", x)
		vector(name+".bias", bias)
	}

	w := &m.weights
	if !f.tied {
		matrix("lm_head.weight", w.LMHead)
	}
	matrix("model.language_model.embed_tokens.weight", w.Embed)
	for i, l := range w.Layers {
		p := fmt.Sprintf("model.language_model.layers.%d.", i)
		vector(p+"input_layernorm.weight", l.InNorm)
		m.putExperts(f, p+"mlp.experts.", l.Experts, dtype, put)
		matrix(p+"mlp.gate.weight", l.Router)
		vector(p+"post_attention_layernorm.weight", l.PostNorm)
		vector(p+"self_attn.k_norm.weight", l.KNorm)
		matrix(p+"self_attn.k_proj.weight", l.K)
		matrix(p+"self_attn.o_proj.weight", l.O)
		vector(p+"self_attn.q_norm.weight", l.QNorm)
		matrix(p+"self_attn.q_proj.weight", l.Q)
		matrix(p+"self_attn.v_proj.weight", l.V)
	}
	vector("model.language_model.norm.weight", w.Norm)

	v := w.Vision
	for i, b := range v.Blocks {
		p := fmt.Sprintf("model.visual.blocks.%d.", i)
		linear(p+"attn.proj", b.Proj, b.ProjBias)
		linear(p+"attn.qkv", b.QKV, b.QKVBias)
		linear(p+"mlp.linear_fc1", b.FC1, b.FC1Bias)
		linear(p+"mlp.linear_fc2", b.FC2, b.FC2Bias)
		vector(p+"norm1.weight", b.Norm1)
		vector(p+"norm1.bias", b.Norm1Bias)
		vector(p+"norm2.weight", b.Norm2)
		vector(p+"norm2.bias", b.Norm2Bias)
	}
	merger := func(p string, x model.Merger) {
		linear(p+"linear_fc1", x.FC1, x.FC1Bias)
		linear(p+"linear_fc2", x.FC2, x.FC2Bias)
		vector(p+"norm.weight", x.Norm)
		vector(p+"norm.bias", x.NormBias)
	}
	for i, x := range v.DeepStack {
		merger(fmt.Sprintf("model.visual.deepstack_merger_list.%d.", i), x)
	}
	merger("model.visual.merger.", v.Merger)
	put("model.visual.patch_embed.proj.weight", dtype, []int{vHidden, vChannels, vTemporal, vPatch, vPatch}, v.PatchEmbed.Data)
	vector("model.visual.patch_embed.proj.bias", v.PatchBias)
	matrix("model.visual.pos_embed.weight", v.PosEmbed)
	return out
}

// putExperts writes the experts of a layer, element by element from the definition of each layout.
func (m *tiny) putExperts(f form, p string, xs []model.Expert, dtype string, put func(string, string, []int, []model.BF16)) {
	h, i := hidden, m.width
	if f.perExpert {
		for e, x := range xs {
			put(fmt.Sprintf("%s%d.gate_proj.weight", p, e), dtype, []int{i, h}, x.Gate.Data)
			put(fmt.Sprintf("%s%d.up_proj.weight", p, e), dtype, []int{i, h}, x.Up.Data)
			put(fmt.Sprintf("%s%d.down_proj.weight", p, e), dtype, []int{h, i}, x.Down.Data)
		}
		return
	}
	var gu, down []model.BF16
	for _, x := range xs {
		if f.v4 {
			for c := range h {
				for r := range i {
					gu = append(gu, x.Gate.Data[r*h+c])
				}
				for r := range i {
					gu = append(gu, x.Up.Data[r*h+c])
				}
			}
			for c := range i {
				for r := range h {
					down = append(down, x.Down.Data[r*i+c])
				}
			}
			continue
		}
		gu = append(append(gu, x.Gate.Data...), x.Up.Data...)
		down = append(down, x.Down.Data...)
	}
	if f.v4 {
		put(p+"gate_up_proj", dtype, []int{experts, h, 2 * i}, gu)
		put(p+"down_proj", dtype, []int{experts, i, h}, down)
		return
	}
	put(p+"gate_up_proj", dtype, []int{experts, 2 * i, h}, gu)
	put(p+"down_proj", dtype, []int{experts, h, i}, down)
}

// write writes the model as a folder and returns its path.
func (m *tiny) write(t *testing.T, f form) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "tiny")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	config := configV5
	if f.v4 {
		config = configV4
	}
	put := func(name, content string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	put("config.json", fmt.Sprintf(config, m.width))
	put("generation_config.json", generationHub)

	pad := 0
	if f.misaligned {
		pad = 3
	}
	all := m.tensors(f)
	if f.shards == 0 {
		writeSafetensors(t, filepath.Join(dir, "model.safetensors"), all, pad)
		return dir
	}
	index := map[string]string{}
	for i := range f.shards {
		name := fmt.Sprintf("model-%05d-of-%05d.safetensors", i+1, f.shards)
		part := all[i*len(all)/f.shards : (i+1)*len(all)/f.shards]
		for _, n := range part {
			index[n.name] = name
		}
		writeSafetensors(t, filepath.Join(dir, name), part, pad)
	}
	b, err := json.Marshal(map[string]any{"metadata": map[string]any{"total_size": 1}, "weight_map": index})
	if err != nil {
		t.Fatal(err)
	}
	put("model.safetensors.index.json", string(b))
	return dir
}

// configV4 has every key of the config.json of Qwen/Qwen3-VL-30B-A3B-Instruct on the hub, with smaller numbers. The
// verb is the width of an expert.
const configV4 = `{
  "architectures": ["Qwen3VLMoeForConditionalGeneration"],
  "image_token_id": 92,
  "model_type": "qwen3_vl_moe",
  "text_config": {
    "attention_bias": false,
    "attention_dropout": 0.0,
    "bos_token_id": 88,
    "decoder_sparse_step": 1,
    "dtype": "bfloat16",
    "eos_token_id": 89,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_vl_moe_text",
    "moe_intermediate_size": %d,
    "norm_topk_prob": true,
    "num_attention_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_interleaved": true, "mrope_section": [4, 2, 2], "rope_type": "default"},
    "rope_theta": 5000000,
    "use_cache": true,
    "vocab_size": 96
  },
  "tie_word_embeddings": false,
  "transformers_version": "4.57.0.dev0",
  "video_token_id": 93,
  "vision_config": {
    "deepstack_visual_indexes": [0, 2],
    "depth": 3,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 16,
    "in_channels": 3,
    "initializer_range": 0.02,
    "intermediate_size": 20,
    "model_type": "qwen3_vl_moe",
    "num_heads": 2,
    "num_position_embeddings": 9,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2
  },
  "vision_end_token_id": 91,
  "vision_start_token_id": 90
}`

// configV5 says the same in the form that transformers 5.17 writes.
const configV5 = `{
  "architectures": ["Qwen3VLMoeForConditionalGeneration"],
  "dtype": "bfloat16",
  "image_token_id": 92,
  "model_type": "qwen3_vl_moe",
  "text_config": {
    "attention_bias": false,
    "bos_token_id": 88,
    "decoder_sparse_step": 1,
    "dtype": "bfloat16",
    "eos_token_id": 89,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_vl_moe_text",
    "moe_intermediate_size": %d,
    "norm_topk_prob": true,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "pad_token_id": null,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
      "mrope_interleaved": true, "mrope_section": [4, 2, 2], "rope_theta": 5000000.0, "rope_type": "default"
    },
    "sliding_window": null,
    "tie_word_embeddings": true,
    "vocab_size": 96
  },
  "tie_word_embeddings": true,
  "transformers_version": "5.17.0",
  "video_token_id": 93,
  "vision_config": {
    "deepstack_visual_indexes": [0, 2],
    "depth": 3,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 16,
    "in_channels": 3,
    "intermediate_size": 20,
    "model_type": "qwen3_vl_moe_vision",
    "num_heads": 2,
    "num_position_embeddings": 9,
    "out_hidden_size": 32,
    "patch_size": 4,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"},
    "spatial_merge_size": 2,
    "temporal_patch_size": 2
  },
  "vision_end_token_id": 91,
  "vision_start_token_id": 90
}`

// generationHub has the keys of the generation_config.json of Qwen3-VL-30B-A3B-Instruct on the hub.
const generationHub = `{
  "bos_token_id": 88, "pad_token_id": 88, "do_sample": true, "eos_token_id": [89, 88],
  "top_p": 0.8, "top_k": 20, "temperature": 0.7, "repetition_penalty": 1.0, "transformers_version": "4.56.0"
}`
