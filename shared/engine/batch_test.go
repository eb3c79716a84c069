package engine_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"trireme.dev/shared/engine"
	"trireme.dev/shared/engine/sample"
	"trireme.dev/shared/kernel/ref"
)

// TestForwardRefuses checks that malformed batches are refused with ErrBatch and a reason.
func TestForwardRefuses(t *testing.T) {
	r := newRig(t, shapesModel, ref.New(), engine.Limits{Rows: 40, Seqs: 2})
	hidden := r.cfg.Text.Hidden
	plane := func(rows int) [][]float32 { return [][]float32{make([]float32, rows*hidden)} }
	good := func() engine.Seq { return engine.Seq{Tokens: make([]int32, 20), Blocks: r.blocks(20)} }
	change := func(f func(*engine.Seq)) []engine.Seq {
		s := good()
		f(&s)
		return []engine.Seq{s}
	}
	for _, c := range []struct {
		why  string
		seqs []engine.Seq
	}{
		{"3 sequences", []engine.Seq{good(), good(), good()}},
		{"60 rows", []engine.Seq{good(), change(func(s *engine.Seq) { s.Tokens, s.Blocks = make([]int32, 40), r.blocks(40) })[0]}},
		{"logits of 20", change(func(s *engine.Seq) { s.All = true })},
		{"0 tokens", change(func(s *engine.Seq) { s.Tokens = nil })},
		{"position -1", change(func(s *engine.Seq) { s.Pos = -1 })},
		{"rotary positions", change(func(s *engine.Seq) { s.Rope = make([][3]int32, 19) })},
		{"2 KV blocks, 3 needed", change(func(s *engine.Seq) { s.Pos = 13 })},
		{"KV block 1", change(func(s *engine.Seq) { s.Blocks[1] = s.Blocks[1][1:] })},
		{"token 1024", change(func(s *engine.Seq) { s.Tokens[19] = 1024 })},
		{"token -1", change(func(s *engine.Seq) { s.Tokens[0] = -1; s.Visual = []engine.Visual{{Row: 1, Rows: 2, Planes: plane(2)}} })},
		{"multimodal run 0", change(func(s *engine.Seq) { s.Visual = []engine.Visual{{Row: 18, Rows: 3, Planes: plane(3)}} })},
		{"multimodal run 1", change(func(s *engine.Seq) {
			s.Visual = []engine.Visual{{Row: 4, Rows: 2, Planes: plane(2)}, {Row: 5, Rows: 1, Planes: plane(1)}}
		})},
		{"0 planes", change(func(s *engine.Seq) { s.Visual = []engine.Visual{{Row: 1, Rows: 2}} })},
		{"plane of 256", change(func(s *engine.Seq) { s.Visual = []engine.Visual{{Row: 1, Rows: 2, Planes: plane(1)}} })},
	} {
		_, err := r.text.Forward(c.seqs)
		if !errors.Is(err, engine.ErrBatch) || !strings.Contains(err.Error(), c.why) {
			t.Errorf("%s: %v", c.why, err)
		}
	}
	if logits, err := r.text.Forward(nil); err != nil || len(logits) != 0 {
		t.Errorf("empty batch: %v, %v", logits, err)
	}
	if _, err := r.text.Forward([]engine.Seq{good(), good()}); err != nil {
		t.Errorf("good batch after bad ones: %v", err)
	}
}

func TestEncodeRefuses(t *testing.T) {
	r := newRig(t, shapesModel, ref.New(), engine.Limits{Rows: 1, Seqs: 1})
	dim := r.cfg.Vision.PatchDim()
	for _, c := range []struct {
		grid        engine.Grid
		pixels, out int
		why         string
	}{
		{engine.Grid{T: 1, H: 3, W: 4}, 12 * dim, 0, "merged by 2"},
		{engine.Grid{T: 0, H: 2, W: 4}, 0, 0, "merged by 2"},
		{engine.Grid{T: 1, H: 64, W: 64}, 4096 * dim, 0, "room for 1024"},
		{engine.Grid{T: 1, H: 2, W: 4}, 8*dim - 1, 0, "samples"},
		{engine.Grid{T: 1, H: 2, W: 4}, 8 * dim, 17, "room for 17"},
	} {
		err := r.enc.Encode(make([]float32, c.out), make([]float32, c.pixels), c.grid)
		if !errors.Is(err, engine.ErrGrid) || !strings.Contains(err.Error(), c.why) {
			t.Errorf("%+v: %v", c.grid, err)
		}
	}
}

// TestWeightsThatDoNotFit checks that a wrong shape is named when the model is made, not met in a kernel.
func TestWeightsThatDoNotFit(t *testing.T) {
	r := newRig(t, shapesModel, ref.New(), engine.Limits{Rows: 1, Seqs: 1})
	lim := engine.Limits{Rows: 1, Seqs: 1}

	w := *r.w
	w.Layers = slices.Clone(w.Layers)
	w.Layers[2].Experts = slices.Clone(w.Layers[2].Experts)
	w.Layers[2].Experts[7].Up.Rows--
	_, err := engine.NewText(r.cfg, []engine.NPU{{Compute: r.c, Weights: &w}}, lim)
	if !errors.Is(err, engine.ErrModel) || !strings.Contains(err.Error(), "expert 7 up of layer 2") {
		t.Errorf("short expert: %v", err)
	}

	v := *r.w.Vision
	v.DeepStack = slices.Clone(v.DeepStack)
	v.DeepStack[1].Norm = v.DeepStack[1].Norm[1:]
	w = *r.w
	w.Vision = &v
	if _, err := engine.NewEncoder(r.cfg, &w, r.c, 64); !errors.Is(err, engine.ErrModel) || !strings.Contains(err.Error(), "DeepStack merger norm of layer 3") {
		t.Errorf("short norm: %v", err)
	}

	cfg := r.cfg
	cfg.Vision = nil
	if _, err := engine.NewEncoder(cfg, r.w, r.c, 64); !errors.Is(err, engine.ErrModel) {
		t.Errorf("encoder of a text model: %v", err)
	}
}

// TestNoAllocation checks the hot paths: a decode step, and a picture of a grid seen before.
func TestNoAllocation(t *testing.T) {
	r := newRig(t, shapesModel, serving(), engine.Limits{Rows: 64, Seqs: 8})
	var batch []engine.Seq
	for range 8 {
		batch = append(batch, engine.Seq{Tokens: []int32{5}, Pos: 20, Delta: -3, Blocks: r.blocks(32), Want: true})
	}
	forward := func() {
		if _, err := r.text.Forward(batch); err != nil {
			t.Fatal(err)
		}
	}
	if n := testing.AllocsPerRun(20, forward); n != 0 {
		t.Errorf("%v allocations a decode step", n)
	}
	grid := engine.Grid{T: 1, H: 4, W: 4}
	pixels, out := make([]float32, 16*r.cfg.Vision.PatchDim()), make([]float32, r.enc.Floats(grid))
	encode := func() {
		if err := r.enc.Encode(out, pixels, grid); err != nil {
			t.Fatal(err)
		}
	}
	if n := testing.AllocsPerRun(20, encode); n != 0 {
		t.Errorf("%v allocations a picture", n)
	}
}

// TestProfile checks that the wrapper passes every call on, with the same results, and counts it.
func TestProfile(t *testing.T) {
	cases := shapesCases(t)
	first := func(r *rig) int32 {
		s := r.start(cases[0].Input, nil, nil, sample.Params{}, 1)
		r.step(len(cases[0].Input), s)
		return s.output[0]
	}
	p := engine.NewProfile(ref.New())
	r := newRig(t, shapesModel, p, engine.Limits{Rows: 64, Seqs: 1})
	before := p.Calls()
	if got := first(r); got != cases[0].Output[0] {
		t.Errorf("token %d, want %d", got, cases[0].Output[0])
	}
	if p.Digest() != ref.Digest {
		t.Errorf("digest %q", p.Digest())
	}
	if p.Calls()-before < int64(10*r.cfg.Text.Layers) || p.Inside() <= 0 {
		t.Errorf("%d calls in %v", p.Calls()-before, p.Inside())
	}
}
