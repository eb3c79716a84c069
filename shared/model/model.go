// Package model says what a model is: layers, shapes, experts, bytes per token. It holds pure values: it reads no
// files (shared/hf does), computes nothing (shared/kernel does) and knows no backend.
package model

import "fmt"

// BF16 is a bfloat16 in its 16-bit form: the upper half of the float32 of the same value.
type BF16 uint16

// Config describes one model. All counts are of elements unless named otherwise.
type Config struct {
	Name   string   // served name, by default the folder's last path element
	Arch   string   // first entry of "architectures" in config.json, e.g. Qwen3VLMoeForConditionalGeneration
	Digest [32]byte // names the model by content: its numbers, and names, shapes and samples of its tensors (shared/hf, digest)
	Text   Text
	Vision *Vision // nil: the model takes text only
}

// Text describes the language model: a decoder with grouped-query attention and mixture-of-experts layers.
type Text struct {
	Hidden  int // width of the residual stream
	Layers  int
	Heads   int // query heads
	KVHeads int // key and value heads; divides Heads
	HeadDim int
	Vocab   int // rows of the embedding, which may exceed the tokenizer's ids
	Context int // tokens, prompt and answer together (max_position_embeddings)
	RMSEps  float32
	QKNorm  bool // RMSNorm of each query and key head before the rotary embedding (Qwen3)
	Rope    Rope

	Experts      int // 0: no mixture-of-experts layer
	TopK         int // experts a token is sent to
	ExpertHidden int // moe_intermediate_size
	NormTopK     bool
	DenseHidden  int    // intermediate_size, of the layers with Dense[i]
	Dense        []bool // [Layers]: the layer has one ordinary MLP instead of experts
}

// Rope is a rotary position embedding. With Sections nil it is the ordinary one-dimensional form. Otherwise it is
// Qwen3-VL's interleaved M-RoPE over positions (t, h, w): frequency i takes its position from axis 1 when i%3 == 1 and
// i < 3*Sections[1], from axis 2 when i%3 == 2 and i < 3*Sections[2], else from axis 0
// (transformers, modeling_qwen3_vl_moe.py, apply_interleaved_mrope).
type Rope struct {
	Theta    float64
	Sections []int // nil or three numbers that add up to HeadDim/2
}

// Vision describes the vision encoder (a ViT with learned, interpolated positions and DeepStack taps).
type Vision struct {
	Depth     int
	Hidden    int
	Heads     int
	MLP       int // intermediate_size
	Out       int // width of a merged token; equals Text.Hidden
	Patch     int // pixels, side of a patch
	Temporal  int // frames in a patch
	Merge     int // patches, side of the square merged into one token
	Channels  int
	Positions int // rows of the learned position table, a square number
	DeepStack []int
	Theta     float64 // base of the vision rotary embedding
	LayerEps  float32 // epsilon of every LayerNorm (1e-6 in modeling_qwen3_vl_moe.py)

	ImageToken, VideoToken int // placeholder ids in the prompt
	VisionStart, VisionEnd int
}

// PatchDim is the number of samples of one patch: Channels*Temporal*Patch*Patch.
func (v *Vision) PatchDim() int { return v.Channels * v.Temporal * v.Patch * v.Patch }

// Levels is the number of planes of an MM object: the merged embeddings and one for each DeepStack tap.
func (v *Vision) Levels() int { return 1 + len(v.DeepStack) }

// BlockTokens is the number of tokens in one KV block.
const BlockTokens = 16

// BlockFloats is the number of float32 in one KV block in mode exact. Layout: [Layers][key, value][BlockTokens]
// [KVHeads][HeadDim]. It depends on the model only, never on NPU counts.
func (t *Text) BlockFloats() int { return t.Layers * 2 * BlockTokens * t.KVHeads * t.HeadDim }

// KVBytesPerToken is the size of one token's keys and values of all layers in mode exact, in bytes.
func (t *Text) KVBytesPerToken() int { return t.BlockFloats() / BlockTokens * 4 }

// Matrix is a weight matrix [Rows, Cols], row-major bf16: y = x W^T for an input of Cols and an output of Rows.
// Data lies in device memory and belongs to whoever loaded it; it stays mapped as long as the model is in use.
type Matrix struct {
	Data       []BF16
	Rows, Cols int
}

// Rowspan returns rows [from, to) of m, sharing its data.
func (m Matrix) Rowspan(from, to int) Matrix {
	if from < 0 || from > to || to > m.Rows {
		panic(fmt.Sprintf("BUG: rows %d to %d of a matrix of %d", from, to, m.Rows))
	}
	return Matrix{Data: m.Data[from*m.Cols : to*m.Cols], Rows: to - from, Cols: m.Cols}
}

// Weights holds every tensor of a model. Norms and biases are float32 (widened once at load); a nil bias is absent.
type Weights struct {
	Embed  Matrix    // [Vocab, Hidden]
	LMHead Matrix    // [Vocab, Hidden]; the same data as Embed when the folder has no lm_head.weight
	Norm   []float32 // [Hidden]
	Layers []Layer
	Vision *VisionWeights // nil exactly when Config.Vision is nil
}

// Layer holds one decoder layer.
type Layer struct {
	InNorm, PostNorm    []float32 // [Hidden]: input_layernorm, post_attention_layernorm
	Q, K, V, O          Matrix    // [Heads*HeadDim, Hidden], [KVHeads*HeadDim, Hidden] twice, [Hidden, Heads*HeadDim]
	QBias, KBias, VBias []float32 // nil: none
	QNorm, KNorm        []float32 // [HeadDim]; nil unless Text.QKNorm

	Router  Matrix   // [Experts, Hidden]; empty in a dense layer
	Experts []Expert // [Experts]; empty in a dense layer
	Dense   *Expert  // nil in a mixture-of-experts layer
}

// Expert is one gated MLP: Down(silu(Gate x) * Up x). Gate and Up may be halves of one matrix.
type Expert struct {
	Gate, Up Matrix // [ExpertHidden, Hidden]
	Down     Matrix // [Hidden, ExpertHidden]
}

// VisionWeights holds the vision encoder.
type VisionWeights struct {
	PatchEmbed Matrix // [Hidden, PatchDim]: the Conv3d kernel, flattened channel, frame, row, column
	PatchBias  []float32
	PosEmbed   Matrix // [Positions, Hidden]
	Blocks     []VisionBlock
	Merger     Merger
	DeepStack  []Merger // one for each of Vision.DeepStack
}

// VisionBlock is one pre-norm transformer block. All biases are present.
type VisionBlock struct {
	Norm1, Norm1Bias, Norm2, Norm2Bias  []float32 // [Hidden]
	QKV, Proj, FC1, FC2                 Matrix    // [3*Hidden, Hidden], [Hidden, Hidden], [MLP, Hidden], [Hidden, MLP]
	QKVBias, ProjBias, FC1Bias, FC2Bias []float32
}

// Merger joins Merge*Merge patches into one token. The main merger normalises before joining (Norm has Hidden
// elements), DeepStack mergers after it (Norm has Hidden*Merge*Merge).
type Merger struct {
	Norm, NormBias   []float32
	FC1, FC2         Matrix // [Hidden*Merge*Merge]^2, [Out, Hidden*Merge*Merge]
	FC1Bias, FC2Bias []float32
}
