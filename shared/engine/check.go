package engine

import (
	"fmt"

	"trireme.dev/shared/model"
)

// shapes collects the first weight that has another shape than its model says.
type shapes struct{ err error }

func (s *shapes) fail(format string, args ...any) {
	if s.err == nil {
		s.err = fmt.Errorf("%w: %s", ErrModel, fmt.Sprintf(format, args...))
	}
}

func (s *shapes) matrix(name string, layer int, m model.Matrix, rows, cols int) {
	if m.Rows != rows || m.Cols != cols || len(m.Data) != rows*cols {
		s.fail("%s of layer %d is [%d, %d] over %d elements, want [%d, %d]", name, layer, m.Rows, m.Cols, len(m.Data), rows, cols)
	}
}

func (s *shapes) vector(name string, layer int, v []float32, n int) {
	if len(v) != n {
		s.fail("%s of layer %d has %d elements, want %d", name, layer, len(v), n)
	}
}

func (s *shapes) optional(name string, layer int, v []float32, n int) {
	if v != nil {
		s.vector(name, layer, v, n)
	}
}

// expert checks one gated MLP. Experts without data here (Down.Data nil) live on another NPU.
func (s *shapes) expert(name string, layer int, e *model.Expert, hidden, inner int) {
	if e.Down.Data == nil {
		return
	}
	s.matrix(name+" gate", layer, e.Gate, inner, hidden)
	s.matrix(name+" up", layer, e.Up, inner, hidden)
	s.matrix(name+" down", layer, e.Down, hidden, inner)
}

// checkText returns ErrModel when w does not have the shapes of t.
func checkText(t *model.Text, w *model.Weights) error {
	var s shapes
	if t.KVHeads <= 0 || t.Heads%t.KVHeads != 0 || t.HeadDim%2 != 0 || t.TopK > t.Experts {
		s.fail("%d query heads over %d of %d, top %d of %d experts", t.Heads, t.KVHeads, t.HeadDim, t.TopK, t.Experts)
	}
	if n := t.Rope.Sections; n != nil && (len(n) != 3 || n[0]+n[1]+n[2] != t.HeadDim/2) {
		s.fail("rotary sections %v for heads of %d", n, t.HeadDim)
	}
	if t.Layers <= 0 || len(w.Layers) != t.Layers || len(t.Dense) != t.Layers {
		s.fail("%d layers of weights and %d of configuration, want %d", len(w.Layers), len(t.Dense), t.Layers)
		return s.err
	}
	s.matrix("embedding", 0, w.Embed, t.Vocab, t.Hidden)
	s.matrix("lm_head", t.Layers, w.LMHead, t.Vocab, t.Hidden)
	s.vector("final norm", t.Layers, w.Norm, t.Hidden)
	query, kv := t.Heads*t.HeadDim, t.KVHeads*t.HeadDim
	for i := range w.Layers {
		l := &w.Layers[i]
		s.vector("input norm", i, l.InNorm, t.Hidden)
		s.vector("post-attention norm", i, l.PostNorm, t.Hidden)
		s.matrix("q_proj", i, l.Q, query, t.Hidden)
		s.matrix("k_proj", i, l.K, kv, t.Hidden)
		s.matrix("v_proj", i, l.V, kv, t.Hidden)
		s.matrix("o_proj", i, l.O, t.Hidden, query)
		s.optional("q_proj bias", i, l.QBias, query)
		s.optional("k_proj bias", i, l.KBias, kv)
		s.optional("v_proj bias", i, l.VBias, kv)
		if t.QKNorm {
			s.vector("q_norm", i, l.QNorm, t.HeadDim)
			s.vector("k_norm", i, l.KNorm, t.HeadDim)
		}
		if t.Dense[i] {
			if l.Dense == nil {
				s.fail("layer %d has no MLP", i)
				continue
			}
			s.expert("mlp", i, l.Dense, t.Hidden, t.DenseHidden)
			continue
		}
		s.matrix("router", i, l.Router, t.Experts, t.Hidden)
		s.experts(t, i, l.Experts)
	}
	return s.err
}

// checkExperts returns ErrModel when a table of experts does not have the shapes of t.
func checkExperts(t *model.Text, table [][]model.Expert) error {
	var s shapes
	if len(table) != t.Layers {
		s.fail("experts of %d layers, want %d", len(table), t.Layers)
		return s.err
	}
	for i, experts := range table {
		if !t.Dense[i] {
			s.experts(t, i, experts)
		}
	}
	return s.err
}

// experts checks those of one layer.
func (s *shapes) experts(t *model.Text, layer int, experts []model.Expert) {
	if len(experts) != t.Experts {
		s.fail("layer %d has %d experts, want %d", layer, len(experts), t.Experts)
		return
	}
	for j := range experts {
		s.expert(fmt.Sprintf("expert %d", j), layer, &experts[j], t.Hidden, t.ExpertHidden)
	}
}

// checkVision returns the side of the learned position square, or ErrModel when w does not have the shapes of v.
func checkVision(v *model.Vision, w *model.VisionWeights) (side int, err error) {
	var s shapes
	for side*side < v.Positions {
		side++
	}
	if side*side != v.Positions {
		s.fail("%d learned positions are no square", v.Positions)
	}
	if v.Heads <= 0 || v.Hidden%v.Heads != 0 || v.Hidden/v.Heads%4 != 0 {
		s.fail("%d heads over a width of %d", v.Heads, v.Hidden)
	}
	if len(w.Blocks) != v.Depth || len(w.DeepStack) != len(v.DeepStack) {
		s.fail("%d blocks and %d DeepStack mergers, want %d and %d", len(w.Blocks), len(w.DeepStack), v.Depth, len(v.DeepStack))
		return side, s.err
	}
	s.matrix("patch embedding", 0, w.PatchEmbed, v.Hidden, v.PatchDim())
	s.vector("patch embedding bias", 0, w.PatchBias, v.Hidden)
	s.matrix("position embedding", 0, w.PosEmbed, v.Positions, v.Hidden)
	for i := range w.Blocks {
		b := &w.Blocks[i]
		s.vector("norm1", i, b.Norm1, v.Hidden)
		s.vector("norm1 bias", i, b.Norm1Bias, v.Hidden)
		s.vector("norm2", i, b.Norm2, v.Hidden)
		s.vector("norm2 bias", i, b.Norm2Bias, v.Hidden)
		s.matrix("qkv", i, b.QKV, 3*v.Hidden, v.Hidden)
		s.vector("qkv bias", i, b.QKVBias, 3*v.Hidden)
		s.matrix("proj", i, b.Proj, v.Hidden, v.Hidden)
		s.vector("proj bias", i, b.ProjBias, v.Hidden)
		s.matrix("fc1", i, b.FC1, v.MLP, v.Hidden)
		s.vector("fc1 bias", i, b.FC1Bias, v.MLP)
		s.matrix("fc2", i, b.FC2, v.Hidden, v.MLP)
		s.vector("fc2 bias", i, b.FC2Bias, v.Hidden)
	}
	joined := v.Hidden * v.Merge * v.Merge
	s.merger("merger", v.Depth, &w.Merger, v.Hidden, joined, v.Out)
	for i := range w.DeepStack {
		if after := v.DeepStack[i]; after < 0 || after >= v.Depth {
			s.fail("DeepStack tap %d after block %d of %d", i, after, v.Depth)
		}
		s.merger("DeepStack merger", v.DeepStack[i], &w.DeepStack[i], joined, joined, v.Out)
	}
	return side, s.err
}

func (s *shapes) merger(name string, layer int, m *model.Merger, norm, joined, out int) {
	s.vector(name+" norm", layer, m.Norm, norm)
	s.vector(name+" norm bias", layer, m.NormBias, norm)
	s.matrix(name+" fc1", layer, m.FC1, joined, joined)
	s.vector(name+" fc1 bias", layer, m.FC1Bias, joined)
	s.matrix(name+" fc2", layer, m.FC2, out, joined)
	s.vector(name+" fc2 bias", layer, m.FC2Bias, out)
}
