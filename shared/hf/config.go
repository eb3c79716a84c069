package hf

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"trireme.dev/shared/model"
)

// ErrUnsupported is returned by Open and ReadConfig for a model that Trireme cannot run exactly: another architecture,
// activation, rotary embedding or quantisation. The message names the file and what it asks for.
var ErrUnsupported = errors.New("unsupported model")

// ErrConfig is returned by Open and ReadConfig when a file of settings is missing a number or has an impossible one.
// The message names the file and the key.
var ErrConfig = errors.New("unusable model configuration")

// The architectures that Open reads, as "architectures" in config.json spells them.
const (
	ArchQwen3VLMoe = "Qwen3VLMoeForConditionalGeneration"
	ArchQwen3Moe   = "Qwen3MoeForCausalLM"
)

// archByType names the architecture of a config.json that has only a model_type.
var archByType = map[string]string{"qwen3_vl_moe": ArchQwen3VLMoe, "qwen3_moe": ArchQwen3Moe}

// archFile is the part of config.json that says which architecture the rest describes.
type archFile struct {
	Architectures []string `json:"architectures"`
	ModelType     string   `json:"model_type"`
}

// arch returns the architecture; its error, for one that cannot be run, wraps ErrUnsupported and names path.
func (f *archFile) arch(path string) (string, error) {
	arch := archByType[f.ModelType]
	switch {
	case len(f.Architectures) > 0:
		arch = f.Architectures[0]
	case arch == "":
		arch = f.ModelType
	}
	if arch != ArchQwen3VLMoe && arch != ArchQwen3Moe {
		return "", fmt.Errorf("%s: architecture %q is not one of %s and %s: %w", path, arch, ArchQwen3VLMoe, ArchQwen3Moe, ErrUnsupported)
	}
	return arch, nil
}

// configFile is config.json: of a multimodal model, or, with the fields of textFile at the top, of a text model.
type configFile struct {
	archFile
	TransformersVersion string           `json:"transformers_version"`
	Quantization        *json.RawMessage `json:"quantization_config"`
	ImageToken          *int             `json:"image_token_id"`
	VideoToken          *int             `json:"video_token_id"`
	VisionStart         *int             `json:"vision_start_token_id"`
	VisionEnd           *int             `json:"vision_end_token_id"`
	Text                *textFile        `json:"text_config"`
	Vision              *visionFile      `json:"vision_config"`
	textFile
}

// textFile is the language model's part. Pointers tell what is absent; the names that changed between transformers 4
// and 5 stand side by side.
type textFile struct {
	Hidden          *int      `json:"hidden_size"`
	Layers          *int      `json:"num_hidden_layers"`
	Heads           *int      `json:"num_attention_heads"`
	KVHeads         *int      `json:"num_key_value_heads"`
	HeadDim         *int      `json:"head_dim"`
	Vocab           *int      `json:"vocab_size"`
	Context         *int      `json:"max_position_embeddings"`
	RMSEps          *float64  `json:"rms_norm_eps"`
	Act             *string   `json:"hidden_act"`
	AttentionBias   bool      `json:"attention_bias"`
	UseSliding      bool      `json:"use_sliding_window"`
	RopeTheta       *float64  `json:"rope_theta"`      // transformers 4
	RopeScaling     *ropeFile `json:"rope_scaling"`    // transformers 4
	RopeParameters  *ropeFile `json:"rope_parameters"` // transformers 5
	PartialRotary   *float64  `json:"partial_rotary_factor"`
	NumExperts      *int      `json:"num_experts"`       // transformers 4
	NumLocalExperts *int      `json:"num_local_experts"` // transformers 5
	TopK            *int      `json:"num_experts_per_tok"`
	ExpertHidden    *int      `json:"moe_intermediate_size"`
	DenseHidden     *int      `json:"intermediate_size"`
	NormTopK        *bool     `json:"norm_topk_prob"`
	SparseStep      *int      `json:"decoder_sparse_step"`
	DenseLayers     []int     `json:"mlp_only_layers"`
	BOS             *int      `json:"bos_token_id"`
	EOS             idList    `json:"eos_token_id"`
	PAD             *int      `json:"pad_token_id"`
}

// ropeFile is a rotary embedding's settings.
type ropeFile struct {
	Type          string   `json:"rope_type"`
	OldType       string   `json:"type"`
	Theta         *float64 `json:"rope_theta"`
	Sections      []int    `json:"mrope_section"`
	Interleaved   *bool    `json:"mrope_interleaved"`
	PartialRotary *float64 `json:"partial_rotary_factor"`
}

// visionFile is the vision encoder's part.
type visionFile struct {
	Depth          *int      `json:"depth"`
	Hidden         *int      `json:"hidden_size"`
	Heads          *int      `json:"num_heads"`
	MLP            *int      `json:"intermediate_size"`
	Out            *int      `json:"out_hidden_size"`
	Patch          *int      `json:"patch_size"`
	Temporal       *int      `json:"temporal_patch_size"`
	Merge          *int      `json:"spatial_merge_size"`
	Channels       *int      `json:"in_channels"`
	Positions      *int      `json:"num_position_embeddings"`
	DeepStack      []int     `json:"deepstack_visual_indexes"`
	Act            *string   `json:"hidden_act"`
	RopeParameters *ropeFile `json:"rope_parameters"`
}

// idList is a token id or a list of them.
type idList []int

// UnmarshalJSON reads a number, a list of numbers, or null for none.
func (l *idList) UnmarshalJSON(b []byte) error {
	var one *int
	if err := json.Unmarshal(b, &one); err == nil {
		if one != nil {
			*l = idList{*one}
		}
		return nil
	}
	return json.Unmarshal(b, (*[]int)(l))
}

// readJSON decodes the file at path into v. A file that is not there is an fs.ErrNotExist.
func readJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s: %w: %w", path, err, ErrConfig)
	}
	return nil
}

// settings collects the faults of one config.json while it is turned into numbers; the first one counts.
type settings struct {
	path string
	err  error
}

// fail records a fault.
func (s *settings) fail(sentinel error, format string, args ...any) {
	if s.err == nil {
		s.err = fmt.Errorf("%s: %s: %w", s.path, fmt.Sprintf(format, args...), sentinel)
	}
}

// count returns a number that must be there and lie between least and a bound that keeps products of four such
// numbers of a real model far from overflow.
func (s *settings) count(v *int, key string, least int) int {
	const most = 1 << 24
	switch {
	case v == nil:
		s.fail(ErrConfig, "%s is missing", key)
		return least
	case *v < least || *v > most:
		s.fail(ErrConfig, "%s is %d, want %d to %d", key, *v, least, most)
		return least
	}
	return *v
}

// require records a fault unless ok.
func (s *settings) require(ok bool, format string, args ...any) {
	if !ok {
		s.fail(ErrConfig, format, args...)
	}
}

// toConfig turns config.json, read from path, into a model.Config without Name and Digest.
func (c *configFile) toConfig(path string) (model.Config, error) {
	arch, err := c.arch(path)
	if err != nil {
		return model.Config{}, err
	}
	s := &settings{path: path}
	cfg := model.Config{Arch: arch}
	switch arch {
	case ArchQwen3VLMoe:
		if c.Text == nil || c.Vision == nil {
			s.fail(ErrConfig, "text_config or vision_config is missing")
			return cfg, s.err
		}
		cfg.Text = c.Text.toText(s, "text_config.", true)
		cfg.Vision = c.toVision(s, cfg.Text)
	case ArchQwen3Moe:
		cfg.Text = c.textFile.toText(s, "", false)
	}
	if c.Quantization != nil && string(*c.Quantization) != "null" {
		s.fail(ErrUnsupported, "quantization_config is set, but only unquantised weights can be run")
	}
	return cfg, s.err
}

// toText turns the language model's part into numbers; prefix stands before keys in messages, vl is true for
// Qwen3-VL.
func (t *textFile) toText(s *settings, prefix string, vl bool) model.Text {
	key := func(k string) string { return prefix + k }
	out := model.Text{
		Hidden:  s.count(t.Hidden, key("hidden_size"), 1),
		Layers:  s.count(t.Layers, key("num_hidden_layers"), 1),
		Heads:   s.count(t.Heads, key("num_attention_heads"), 1),
		KVHeads: s.count(t.KVHeads, key("num_key_value_heads"), 1),
		Vocab:   s.count(t.Vocab, key("vocab_size"), 1),
		Context: s.count(t.Context, key("max_position_embeddings"), 1),
		RMSEps:  1e-6,
		QKNorm:  true,
	}
	s.require(out.Layers <= 1<<12, "%s is %d, want at most %d", key("num_hidden_layers"), out.Layers, 1<<12)
	out.HeadDim = out.Hidden / out.Heads
	if t.HeadDim != nil {
		out.HeadDim = s.count(t.HeadDim, key("head_dim"), 2)
	}
	s.require(out.HeadDim > 0 && out.HeadDim%2 == 0, "%s is %d, want an even number", key("head_dim"), out.HeadDim)
	s.require(out.Heads%out.KVHeads == 0, "%s %d does not divide %s %d",
		key("num_key_value_heads"), out.KVHeads, key("num_attention_heads"), out.Heads)
	if t.RMSEps != nil {
		out.RMSEps = float32(*t.RMSEps)
		s.require(out.RMSEps > 0 && out.RMSEps < 1, "%s is %g", key("rms_norm_eps"), *t.RMSEps)
	}
	if t.Act != nil && *t.Act != "silu" {
		s.fail(ErrUnsupported, "%s is %q, but only silu can be run", key("hidden_act"), *t.Act)
	}
	if t.AttentionBias {
		s.fail(ErrUnsupported, "%s is true, but attention with biases cannot be run", key("attention_bias"))
	}
	if t.UseSliding {
		s.fail(ErrUnsupported, "%s is true, but sliding-window attention cannot be run", key("use_sliding_window"))
	}
	t.toExperts(s, &out, prefix, vl)
	out.Rope = t.toRope(s, prefix, out.HeadDim, vl)
	return out
}

// toExperts fills in the mixture-of-experts numbers of out.
func (t *textFile) toExperts(s *settings, out *model.Text, prefix string, vl bool) {
	experts := t.NumExperts
	if experts == nil {
		experts = t.NumLocalExperts
	}
	out.Experts = s.count(experts, prefix+"num_experts", 0)
	s.require(out.Experts <= 1<<16, "%snum_experts is %d, want at most %d", prefix, out.Experts, 1<<16)
	// transformers reads norm_topk_prob in Qwen3-MoE only, where its default is false; the router of Qwen3-VL-MoE
	// always divides by the sum (modeling_qwen3_vl_moe.py, Qwen3VLMoeTextTopKRouter).
	out.NormTopK = vl || (t.NormTopK != nil && *t.NormTopK)

	step := 1
	if t.SparseStep != nil {
		step = s.count(t.SparseStep, prefix+"decoder_sparse_step", 1)
	}
	out.Dense = make([]bool, out.Layers)
	sparse := 0
	for i := range out.Dense { // Qwen3VLMoeTextDecoderLayer.__init__
		out.Dense[i] = out.Experts == 0 || (i+1)%step != 0 || slices.Contains(t.DenseLayers, i)
		if !out.Dense[i] {
			sparse++
		}
	}
	if sparse > 0 {
		out.TopK = s.count(t.TopK, prefix+"num_experts_per_tok", 1)
		out.ExpertHidden = s.count(t.ExpertHidden, prefix+"moe_intermediate_size", 1)
		s.require(out.TopK <= out.Experts, "%snum_experts_per_tok %d exceeds num_experts %d", prefix, out.TopK, out.Experts)
	}
	if sparse < out.Layers {
		out.DenseHidden = s.count(t.DenseHidden, prefix+"intermediate_size", 1)
	} else if t.DenseHidden != nil {
		out.DenseHidden = *t.DenseHidden
	}
}

// toRope reads the rotary settings of either form.
func (t *textFile) toRope(s *settings, prefix string, headDim int, vl bool) model.Rope {
	r, key := t.RopeParameters, prefix+"rope_parameters"
	if r == nil {
		r, key = t.RopeScaling, prefix+"rope_scaling"
	}
	if r == nil {
		r = &ropeFile{}
	}
	theta := r.Theta
	if theta == nil {
		theta = t.RopeTheta
	}
	var out model.Rope
	switch {
	case theta == nil:
		s.fail(ErrConfig, "neither %srope_parameters.rope_theta nor %srope_theta is there", prefix, prefix)
	case *theta <= 1:
		s.fail(ErrConfig, "rope_theta is %g, want more than 1", *theta)
	default:
		out.Theta = *theta
	}
	kind := r.Type
	if kind == "" {
		kind = r.OldType
	}
	switch kind {
	case "", "default":
	case "mrope":
		if !vl {
			s.fail(ErrUnsupported, "%s has the type mrope in a text model", key)
		}
	default:
		s.fail(ErrUnsupported, "%s has the type %q, but only default can be run", key, kind)
	}
	for _, p := range []*float64{t.PartialRotary, r.PartialRotary} {
		if p != nil && *p != 1 {
			s.fail(ErrUnsupported, "partial_rotary_factor is %g, but only 1 can be run", *p)
		}
	}
	if !vl {
		return out
	}
	if r.Interleaved != nil && !*r.Interleaved {
		s.fail(ErrUnsupported, "%s.mrope_interleaved is false, but only interleaved sections can be run", key)
	}
	out.Sections = r.Sections
	if out.Sections == nil {
		out.Sections = []int{24, 20, 20} // the default of Qwen3VLMoeTextRotaryEmbedding
	}
	sum := 0
	for _, n := range out.Sections {
		s.require(n >= 0, "%s.mrope_section is %v", key, out.Sections)
		sum += n
	}
	s.require(len(out.Sections) == 3 && sum == headDim/2,
		"%s.mrope_section is %v, want three numbers that add up to %d", key, out.Sections, headDim/2)
	return out
}

// toVision turns the vision encoder's part into numbers.
func (c *configFile) toVision(s *settings, text model.Text) *model.Vision {
	v := c.Vision
	key := func(k string) string { return "vision_config." + k }
	out := &model.Vision{
		Depth:     s.count(v.Depth, key("depth"), 1),
		Hidden:    s.count(v.Hidden, key("hidden_size"), 1),
		Heads:     s.count(v.Heads, key("num_heads"), 1),
		MLP:       s.count(v.MLP, key("intermediate_size"), 1),
		Out:       s.count(v.Out, key("out_hidden_size"), 1),
		Patch:     s.count(v.Patch, key("patch_size"), 1),
		Temporal:  s.count(v.Temporal, key("temporal_patch_size"), 1),
		Merge:     s.count(v.Merge, key("spatial_merge_size"), 1),
		Channels:  s.count(v.Channels, key("in_channels"), 1),
		Positions: s.count(v.Positions, key("num_position_embeddings"), 1),
		DeepStack: v.DeepStack,
		Theta:     10000, // the default of Qwen3VLMoeVisionRotaryEmbedding
		LayerEps:  1e-6,

		ImageToken:  s.count(c.ImageToken, "image_token_id", 0),
		VideoToken:  s.count(c.VideoToken, "video_token_id", 0),
		VisionStart: s.count(c.VisionStart, "vision_start_token_id", 0),
		VisionEnd:   s.count(c.VisionEnd, "vision_end_token_id", 0),
	}
	if v.Act != nil && *v.Act != "gelu_pytorch_tanh" {
		s.fail(ErrUnsupported, "%s is %q, but only gelu_pytorch_tanh can be run", key("hidden_act"), *v.Act)
	}
	if r := v.RopeParameters; r != nil {
		if r.Type != "" && r.Type != "axial" && r.Type != "default" {
			s.fail(ErrUnsupported, "%s is %q, but only axial can be run", key("rope_parameters.rope_type"), r.Type)
		}
		if r.Theta != nil {
			out.Theta = *r.Theta
			s.require(out.Theta > 1, "%s is %g, want more than 1", key("rope_parameters.rope_theta"), out.Theta)
		}
	}
	s.require(out.Out == text.Hidden, "%s is %d, want text_config.hidden_size %d", key("out_hidden_size"), out.Out, text.Hidden)
	s.require(out.Depth <= 1<<12, "%s is %d, want at most %d", key("depth"), out.Depth, 1<<12)
	s.require(out.Hidden%out.Heads == 0 && out.Hidden/out.Heads%4 == 0,
		"%s %d is not a multiple of 4 times %s %d", key("hidden_size"), out.Hidden, key("num_heads"), out.Heads)
	side := 1
	for side*side < out.Positions {
		side++
	}
	s.require(side*side == out.Positions, "%s is %d, want a square number", key("num_position_embeddings"), out.Positions)
	last := -1
	for _, i := range out.DeepStack {
		s.require(i > last && i < out.Depth, "%s is %v, want rising numbers below %d", key("deepstack_visual_indexes"), out.DeepStack, out.Depth)
		last = i
	}
	s.require(len(out.DeepStack) <= text.Layers, "%s has more entries than the language model has layers", key("deepstack_visual_indexes"))
	for _, id := range []int{out.ImageToken, out.VideoToken, out.VisionStart, out.VisionEnd} {
		s.require(id < text.Vocab, "token id %d is beyond vocab_size %d", id, text.Vocab)
	}
	return out
}

// major returns the first number of a version such as 4.57.0.dev0, or 0.
func major(version string) int {
	first, _, _ := strings.Cut(version, ".")
	n, err := strconv.Atoi(first)
	if err != nil {
		return 0
	}
	return n
}
