package engine_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"trireme.dev/shared/engine"
	"trireme.dev/shared/engine/sample"
	"trireme.dev/shared/kernel/ref"
	"trireme.dev/shared/model"
)

// moved copies a table of experts to fresh memory.
func moved(from [][]model.Expert) [][]model.Expert {
	again := func(m model.Matrix) model.Matrix {
		m.Data = slices.Clone(m.Data)
		return m
	}
	to := make([][]model.Expert, len(from))
	for i := range from {
		for _, x := range from[i] {
			to[i] = append(to[i], model.Expert{Gate: again(x.Gate), Up: again(x.Up), Down: again(x.Down)})
		}
	}
	return to
}

// clobber overwrites experts that nobody may read any more.
func clobber(table [][]model.Expert) {
	for _, layer := range table {
		for _, x := range layer {
			for _, m := range []model.Matrix{x.Gate, x.Up, x.Down} {
				for i := range m.Data {
					m.Data[i] = 0x7fc0 // not a number
				}
			}
		}
	}
}

// TestExpertsMove gives the engine other memory for its experts between steps, and makes the old memory useless at once; in
// the middle of a step it gives it a table of rubbish, which that step must not see: the answer stays the reference's.
func TestExpertsMove(t *testing.T) {
	r := newRig(t, shapesModel, ref.New(), engine.Limits{Rows: 64, Seqs: 1})
	original := make([][]model.Expert, len(r.w.Layers))
	for i := range r.w.Layers {
		original[i] = r.w.Layers[i].Experts
	}
	set := func(table [][]model.Expert) {
		if err := r.text.SetExperts([][][]model.Expert{table}); err != nil {
			t.Fatal(err)
		}
	}
	rubbish := moved(original)
	clobber(rubbish)
	r.text.Observe(func(layer int, _ []float32) {
		if layer == 3 {
			set(rubbish)
		}
	})
	c := shapesCases(t)[0]
	s := r.start(c.Input, nil, nil, sample.Params{}, len(c.Output))
	for len(s.output) < len(c.Output) {
		table := moved(original)
		set(table)
		r.step(64, s)
		clobber(table)
	}
	if !slices.Equal(s.output, c.Output) {
		t.Errorf("with experts that move: %v, want %v", s.output, c.Output)
	}

	short := moved(original)
	short[4] = short[4][1:]
	if err := r.text.SetExperts([][][]model.Expert{short}); !errors.Is(err, engine.ErrModel) || !strings.Contains(err.Error(), "layer 4") {
		t.Errorf("an expert too few: %v", err)
	}
	if err := r.text.SetExperts([][][]model.Expert{short[:4]}); !errors.Is(err, engine.ErrModel) {
		t.Errorf("layers too few: %v", err)
	}
}
