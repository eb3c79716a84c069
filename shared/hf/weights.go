package hf

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"trireme.dev/shared/model"
)

// builder assembles a model's weights from the tensors of a folder: views, and places in objects for what is copied.
// It runs twice, with the same result: as a plan, to look up and check every tensor, size the objects and note the
// copies without reading data, and again with the objects' memory. After the first fault it goes on with empty values,
// and err keeps the fault.
type builder struct {
	folder *Folder
	parts  Parts
	pack   bool // experts are copied, each into an object of its own
	wanted Experts
	text   string          // prefix of the language model's tensors
	vision string          // prefix of the vision encoder's tensors
	used   map[string]bool // tensors, by the plan

	planning bool
	plan     *builder  // that has planned, unless planning
	objects  [][]byte  // their memory, unless planning; nil: of an expert that is not wanted
	sizes    []int64   // bytes of the objects so far
	of       []owner   // and whose they are
	key      *[32]byte // of the set; nil: not computed yet
	within   bool      // the last object takes what comes next
	apart    bool      // no views: it belongs to an expert that is packed
	at       int       // the layer that is built
	number   int       // and the expert; -1: none
	jobs     []job     // in order of their objects
	views    [][]byte
	progress func(done, total int64) // of fill, or nil
	err      error
}

// owner says what an object holds: an expert of a layer, or what lies beside them (expert -1).
type owner struct{ layer, expert int }

func newBuilder(f *Folder, parts Parts, pack bool, wanted Experts) *builder {
	b := &builder{folder: f, parts: parts, pack: pack, wanted: wanted, used: map[string]bool{}, number: -1}
	// transformers 4.52 and later write model.language_model and model.visual; earlier ones and some converters
	// language_model.model and visual. A text model has plain model.
	b.text = b.firstPrefix("embed_tokens.weight", "model.language_model.", "language_model.model.", "model.")
	b.vision = b.firstPrefix("patch_embed.proj.weight", "model.visual.", "visual.")
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

// build returns the weights of the builder's parts, or what there is of them if b.err is set.
func (b *builder) build() *model.Weights {
	w := &model.Weights{}
	if b.parts&Text != 0 {
		b.language(w)
	}
	if v := b.folder.Config.Vision; v != nil && b.parts&Vision != 0 {
		w.Vision = b.encoder(v)
	}
	if b.parts == All && b.planning {
		b.checkUnused()
	}
	return w
}

// language adds the language model.
func (b *builder) language(w *model.Weights) {
	t := &b.folder.Config.Text
	b.object()
	w.Embed = b.matrix(b.text+"embed_tokens.weight", t.Vocab, t.Hidden)
	w.Norm = b.vector(b.text+"norm.weight", t.Hidden)
	w.LMHead = w.Embed
	for _, name := range []string{"lm_head.weight", "language_model.lm_head.weight"} {
		if b.has(name) {
			w.LMHead = b.matrix(name, t.Vocab, t.Hidden)
			break
		}
	}
	w.Layers = make([]model.Layer, t.Layers)
	for i := range w.Layers {
		b.object()
		b.at = i
		w.Layers[i] = b.layer(b.text+"layers."+strconv.Itoa(i)+".", t.Dense[i])
	}
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
	b.object()
	conv := b.tensor(b.vision+"patch_embed.proj.weight", v.Hidden, v.Channels, v.Temporal, v.Patch, v.Patch)
	w := &model.VisionWeights{
		PatchEmbed: b.matrixOf(b.vision+"patch_embed.proj.weight", conv, v.Hidden, v.PatchDim()),
		PatchBias:  b.vector(b.vision+"patch_embed.proj.bias", v.Hidden),
		PosEmbed:   b.matrix(b.vision+"pos_embed.weight", v.Positions, v.Hidden),
		Blocks:     make([]model.VisionBlock, v.Depth),
		Merger:     b.merger(b.vision+"merger.", v, v.Hidden),
	}
	for i := range w.Blocks {
		b.object()
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
		b.object()
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
	if b.planning || b.err != nil {
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
	if view, ok := viewBF16(t); ok && t.DType == "BF16" && !b.apart {
		b.views = append(b.views, t.Data)
		m.Data = view
		return m
	}
	room := b.alloc(rows * cols)
	if m.Data = b.data(room); !b.planning {
		return m
	}
	b.later(name, t, func(data memory) error {
		if t.DType == "BF16" {
			return b.folder.index[name].read(bytesOf(data(room)), t)
		}
		return narrow(data(room), t)
	})
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
	if b.planning {
		b.used[name] = true
	}
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
