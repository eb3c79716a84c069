package engine_test

import (
	"reflect"
	"testing"

	"trireme.dev/shared/engine"
	"trireme.dev/shared/engine/sample"
	"trireme.dev/shared/kernel"
	"trireme.dev/shared/kernel/cpu"
)

// meter notes what it is told.
type meter struct {
	kernel.Compute
	works []kernel.Work
	open  bool
}

func (m *meter) Begin(w kernel.Work) {
	if m.open {
		panic("a stretch in a stretch")
	}
	m.works, m.open = append(m.works, w), true
}

func (m *meter) End() { m.open = false }

// A meter is told of every piece of a picture and of what each step is made of: prompts, their pictures, and sequences
// that decode.
func TestMeter(t *testing.T) {
	c, err := cpu.New(cpu.Options{Threads: 1})
	if err != nil {
		t.Fatal(err)
	}
	m := &meter{Compute: c}
	r := newRig(t, shapesModel, m, engine.Limits{Rows: 512, Seqs: 8})
	var picture *goldenCase
	for _, x := range shapesCases(t) {
		if len(x.Images) == 1 {
			picture = &x
			break
		}
	}
	grid := picture.grids()[0]
	out := r.alloc(r.enc.Floats(grid))
	if err := r.enc.Encode(out, make([]float32, grid.Patches()*r.cfg.Vision.PatchDim()), grid); err != nil {
		t.Fatal(err)
	}
	pieces := len(r.w.Vision.Blocks) + 1
	if len(m.works) != pieces || m.open {
		t.Errorf("told of %d pieces of a picture, there are %d", len(m.works), pieces)
	}
	for _, w := range m.works {
		if w != (kernel.Work{Tokens: r.enc.Tokens(grid), Parts: pieces}) {
			t.Errorf("a piece of a picture is %+v", w)
		}
	}
	m.works = nil
	seen := r.start(picture.Input, []engine.Grid{grid}, [][]float32{out}, sample.Params{}, 4)
	text := r.start([]int32{1, 2, 3, 4, 5, 6, 7}, nil, nil, sample.Params{}, 4)
	r.step(100, text) // all of it
	r.step(len(seen.prompt)-2, seen, text)
	r.step(100, seen, text)
	r.step(1, seen, text)
	long := len(seen.prompt)
	want := []kernel.Work{
		{Prompt: 7, Pairs: 28},
		{Prompt: long - 2, Visual: r.enc.Tokens(grid), Pairs: (long - 2) * (long - 1) / 2, Decoding: 1, Context: 8},
		{Prompt: 2, Pairs: 2*(long-2) + 3, Decoding: 1, Context: 9},
		{Decoding: 2, Context: long + 1 + 10},
	}
	if !reflect.DeepEqual(m.works, want) || m.open {
		t.Errorf("told of steps of\n%+v, want\n%+v", m.works, want)
	}
	if _, err := r.text.Forward([]engine.Seq{{}}); err == nil || len(m.works) != len(want) {
		t.Errorf("a malformed batch: %v, told of %d steps", err, len(m.works)-len(want))
	}
}
