package hf

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"trireme.dev/shared/model"
)

// builder assembles a model's weights from the tensors of a folder. It makes the views and notes the copies, which copy
// then carries out. In a rehearsal it looks up and checks every tensor and counts what must be copied, but reads no
// data. After the first fault it goes on with empty values, and err keeps the fault.
type builder struct {
	folder    *Folder
	text      string // prefix of the language model's tensors
	vision    string // prefix of the vision encoder's tensors
	used      map[string]bool
	rehearsal bool
	memory    []model.BF16 // room for the copies
	elements  int          // taken from memory so far, or counted
	jobs      []job
	err       error
}

// newBuilder returns a builder of f's weights that copies into memory, which has room for all copies.
func newBuilder(f *Folder, memory mapping) *builder {
	b := &builder{folder: f, used: map[string]bool{}}
	if memory != nil {
		b.memory = unsafe.Slice((*model.BF16)(unsafe.Pointer(unsafe.SliceData(memory))), len(memory)/2)
	}
	// transformers 4.52 and later write model.language_model and model.visual; earlier ones and some converters
	// language_model.model and visual. A text model has plain model.
	b.text = b.firstPrefix("embed_tokens.weight", "model.language_model.", "language_model.model.", "model.")
	b.vision = b.firstPrefix("patch_embed.proj.weight", "model.visual.", "visual.")
	return b
}

// rehearse returns a builder that reads no data.
func rehearse(f *Folder) *builder {
	b := newBuilder(f, nil)
	b.rehearsal = true
	return b
}

// firstPrefix returns the first prefix under which the folder has the tensor, or the first of all.
func (b *builder) firstPrefix(tensor string, prefixes ...string) string {
	for _, p := range prefixes {
		if b.has(p + tensor) {
			return p
		}
	}
	return prefixes[0]
}

// build returns the weights, or what there is of them if b.err is set.
func (b *builder) build() *model.Weights {
	t := &b.folder.Config.Text
	w := &model.Weights{
		Embed:  b.matrix(b.text+"embed_tokens.weight", t.Vocab, t.Hidden),
		Norm:   b.vector(b.text+"norm.weight", t.Hidden),
		Layers: make([]model.Layer, t.Layers),
	}
	w.LMHead = w.Embed
	for _, name := range []string{"lm_head.weight", "language_model.lm_head.weight"} {
		if b.has(name) {
			w.LMHead = b.matrix(name, t.Vocab, t.Hidden)
			break
		}
	}
	for i := range w.Layers {
		w.Layers[i] = b.layer(b.text+"layers."+strconv.Itoa(i)+".", t.Dense[i])
	}
	if b.folder.Config.Vision != nil {
		w.Vision = b.encoder(b.folder.Config.Vision)
	}
	b.checkUnused()
	return w
}

// layer returns the decoder layer whose tensors begin with prefix.
func (b *builder) layer(prefix string, dense bool) model.Layer {
	t := &b.folder.Config.Text
	q, kv := t.Heads*t.HeadDim, t.KVHeads*t.HeadDim
	attn := prefix + "self_attn."
	l := model.Layer{
		InNorm:   b.vector(prefix+"input_layernorm.weight", t.Hidden),
		PostNorm: b.vector(prefix+"post_attention_layernorm.weight", t.Hidden),
		Q:        b.matrix(attn+"q_proj.weight", q, t.Hidden),
		K:        b.matrix(attn+"k_proj.weight", kv, t.Hidden),
		V:        b.matrix(attn+"v_proj.weight", kv, t.Hidden),
		O:        b.matrix(attn+"o_proj.weight", t.Hidden, q),
	}
	if t.QKNorm {
		l.QNorm = b.vector(attn+"q_norm.weight", t.HeadDim)
		l.KNorm = b.vector(attn+"k_norm.weight", t.HeadDim)
	}
	if dense {
		mlp := b.gated(prefix+"mlp.", t.DenseHidden)
		l.Dense = &mlp
		return l
	}
	l.Router = b.matrix(prefix+"mlp.gate.weight", t.Experts, t.Hidden)
	l.Experts = b.experts(prefix + "mlp.experts.")
	return l
}

// gated returns the gated MLP of the given width whose three matrices lie apart under prefix.
func (b *builder) gated(prefix string, width int) model.Expert {
	hidden := b.folder.Config.Text.Hidden
	return model.Expert{
		Gate: b.matrix(prefix+"gate_proj.weight", width, hidden),
		Up:   b.matrix(prefix+"up_proj.weight", width, hidden),
		Down: b.matrix(prefix+"down_proj.weight", hidden, width),
	}
}

// encoder returns the vision encoder.
func (b *builder) encoder(v *model.Vision) *model.VisionWeights {
	conv := b.tensor(b.vision+"patch_embed.proj.weight", v.Hidden, v.Channels, v.Temporal, v.Patch, v.Patch)
	w := &model.VisionWeights{
		PatchEmbed: b.matrixOf(b.vision+"patch_embed.proj.weight", conv, v.Hidden, v.PatchDim()),
		PatchBias:  b.vector(b.vision+"patch_embed.proj.bias", v.Hidden),
		PosEmbed:   b.matrix(b.vision+"pos_embed.weight", v.Positions, v.Hidden),
		Blocks:     make([]model.VisionBlock, v.Depth),
		Merger:     b.merger(b.vision+"merger.", v, v.Hidden),
	}
	for i := range w.Blocks {
		p := b.vision + "blocks." + strconv.Itoa(i) + "."
		blk := &w.Blocks[i]
		blk.Norm1, blk.Norm1Bias = b.vector(p+"norm1.weight", v.Hidden), b.vector(p+"norm1.bias", v.Hidden)
		blk.Norm2, blk.Norm2Bias = b.vector(p+"norm2.weight", v.Hidden), b.vector(p+"norm2.bias", v.Hidden)
		blk.QKV, blk.QKVBias = b.linear(p+"attn.qkv.", 3*v.Hidden, v.Hidden)
		blk.Proj, blk.ProjBias = b.linear(p+"attn.proj.", v.Hidden, v.Hidden)
		blk.FC1, blk.FC1Bias = b.linear(p+"mlp.linear_fc1.", v.MLP, v.Hidden)
		blk.FC2, blk.FC2Bias = b.linear(p+"mlp.linear_fc2.", v.Hidden, v.MLP)
	}
	for i := range v.DeepStack {
		p := b.vision + "deepstack_merger_list." + strconv.Itoa(i) + "."
		w.DeepStack = append(w.DeepStack, b.merger(p, v, v.Hidden*v.Merge*v.Merge))
	}
	return w
}

// merger returns the merger under prefix whose norm has the given width.
func (b *builder) merger(prefix string, v *model.Vision, norm int) model.Merger {
	joined := v.Hidden * v.Merge * v.Merge
	m := model.Merger{
		Norm:     b.vector(prefix+"norm.weight", norm),
		NormBias: b.vector(prefix+"norm.bias", norm),
	}
	m.FC1, m.FC1Bias = b.linear(prefix+"linear_fc1.", joined, joined)
	m.FC2, m.FC2Bias = b.linear(prefix+"linear_fc2.", v.Out, joined)
	return m
}

// linear returns weight [rows, cols] and bias [rows] under prefix.
func (b *builder) linear(prefix string, rows, cols int) (model.Matrix, []float32) {
	return b.matrix(prefix+"weight", rows, cols), b.vector(prefix+"bias", rows)
}

// vector returns a norm weight or bias of n elements as float32.
func (b *builder) vector(name string, n int) []float32 {
	t := b.tensor(name, n)
	if b.rehearsal || b.err != nil {
		return nil
	}
	v, err := t.Float32s()
	if err != nil {
		b.fail(name, err)
	}
	return v
}

// matrix returns the tensor of that name and shape [rows, cols].
func (b *builder) matrix(name string, rows, cols int) model.Matrix {
	return b.matrixOf(name, b.tensor(name, rows, cols), rows, cols)
}

// matrixOf returns t, of the given name, as a matrix: a view if the file has it in aligned bf16, else a copy.
func (b *builder) matrixOf(name string, t Tensor, rows, cols int) model.Matrix {
	m := model.Matrix{Rows: rows, Cols: cols}
	if b.err != nil {
		return m
	}
	if t.DType == "BF16" {
		if view, ok := viewBF16(t); ok {
			m.Data = view
			return m
		}
	}
	m.Data = b.alloc(rows * cols)
	b.later(name, t, func() error { return narrow(m.Data, t) })
	return m
}

// tensor looks up a tensor and checks its dtype and shape.
func (b *builder) tensor(name string, shape ...int) Tensor {
	file := b.folder.index[name]
	if file == nil {
		if b.err == nil {
			b.err = fmt.Errorf("%s: tensor %s: %w", b.folder.Dir, name, ErrMissing)
		}
		return Tensor{}
	}
	b.used[name] = true
	t, _ := file.Tensor(name)
	switch {
	case !slices.Equal(t.Shape, shape):
		b.fail(name, fmt.Errorf("its shape is %v, but config.json asks for %v: %w", t.Shape, shape, ErrConfig))
	case t.DType != "BF16" && t.DType != "F16" && t.DType != "F32":
		b.fail(name, fmt.Errorf("%s, want BF16, F16 or F32: %w", t.DType, ErrDType))
	}
	return t
}

// has says whether the folder has the tensor.
func (b *builder) has(name string) bool { return b.folder.index[name] != nil }

// fail keeps the first fault, with the file and tensor it concerns.
func (b *builder) fail(name string, err error) {
	if b.err == nil {
		b.err = fmt.Errorf("%s: tensor %s: %w", b.folder.index[name].Path(), name, err)
	}
}

// checkUnused refuses a tensor among the model's own that nothing has asked for: running without it would give other
// answers than the model's. Tensors elsewhere (a speculative head, say) are left alone, and so are stored rotary
// frequencies, which old versions of transformers wrote.
func (b *builder) checkUnused() {
	for _, name := range slices.Sorted(maps.Keys(b.folder.index)) {
		ours := strings.HasPrefix(name, b.text) || (b.folder.Config.Vision != nil && strings.HasPrefix(name, b.vision))
		if ours && !b.used[name] && !strings.HasSuffix(name, "rotary_emb.inv_freq") {
			b.fail(name, fmt.Errorf("%s of this config.json has no such tensor: %w", b.folder.Config.Arch, ErrUnsupported))
		}
	}
}
