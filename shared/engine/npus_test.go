package engine_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"trireme.dev/shared/engine"
	"trireme.dev/shared/engine/sample"
	"trireme.dev/shared/kernel"
	"trireme.dev/shared/kernel/cpu"
	"trireme.dev/shared/kernel/ref"
	"trireme.dev/shared/model"
)

// group is a rig of NPUs in some slots. Each has experts in memory of its own and none but those that its table says.
type group struct {
	*rig
	slots []int // in rising order
	rnd   *rand.Rand
	copy  [][][]model.Expert // [slot][layer][expert]: all of them, in that NPU's memory; nil: no NPU
}

// newGroup has NPUs in the first slots.
func newGroup(t testing.TB, dir string, npus int, backend func() kernel.Compute, lim engine.Limits) *group {
	t.Helper()
	slots := make([]int, npus)
	for i := range slots {
		slots[i] = i
	}
	return newGroupIn(t, dir, slots, backend, lim)
}

func newGroupIn(t testing.TB, dir string, slots []int, backend func() kernel.Compute, lim engine.Limits) *group {
	t.Helper()
	r := newRig(t, dir, backend(), lim)
	count := slots[len(slots)-1] + 1
	g := &group{rig: r, slots: slots, rnd: rand.New(rand.NewPCG(uint64(len(slots)), 7)), copy: make([][][]model.Expert, count)}
	var own [][]model.Expert
	for i := range r.w.Layers {
		own = append(own, r.w.Layers[i].Experts)
	}
	members := make([]engine.NPU, count)
	for i, slot := range slots {
		c := r.c
		if i > 0 {
			c = backend()
			t.Cleanup(func() {
				if err := c.Close(); err != nil {
					t.Error(err)
				}
			})
		}
		g.copy[slot] = moved(own)
		members[slot] = engine.NPU{Compute: c, Weights: r.w}
	}
	r.text.Close()
	var err error
	if r.text, err = engine.NewText(r.cfg, members, lim); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.text.Close() })
	g.place(0)
	return g
}

// single opens a cpu backend of one thread.
func single() kernel.Compute {
	c, err := cpu.New(cpu.Options{Threads: 1})
	if err != nil {
		panic("no kernels for this machine: " + err.Error())
	}
	return c
}

// place gives each expert to a random NPU, and to each other one with the given probability; what an NPU has not is not a number.
func (g *group) place(again float64) {
	g.t.Helper()
	tables := make([][][]model.Expert, len(g.copy))
	for l, experts := range g.copy[g.slots[0]] {
		for _, n := range g.slots {
			tables[n] = append(tables[n], make([]model.Expert, len(experts)))
		}
		for e := range experts {
			first := g.slots[g.rnd.IntN(len(g.slots))]
			for _, n := range g.slots {
				if n == first || g.rnd.Float64() < again {
					tables[n][l][e] = g.copy[n][l][e]
				}
			}
		}
	}
	if err := g.text.SetExperts(tables); err != nil {
		g.t.Fatal(err)
	}
}

// spread gives sequences to NPUs at random.
func (g *group) spread(batch []engine.Seq, at map[*sequence]int, seqs []*sequence) {
	for i, s := range seqs {
		if _, ok := at[s]; !ok {
			at[s] = g.slots[g.rnd.IntN(len(g.slots))]
		}
		batch[i].NPU = at[s]
	}
}

// TestNPUs runs sequences together, with and without pictures, greedy and sampled, on one to seven NPUs, also where slots between
// them are empty, with experts anywhere, some of them on several, all of them somewhere else in each step: tokens and logits are those of one NPU, bit for bit.
func TestNPUs(t *testing.T) {
	const tokens = 5
	lim := engine.Limits{Rows: 256, Seqs: 8}
	one := newRig(t, shapesModel, single(), lim)
	cases := prepare(t, one)
	alone := make([]answer, len(cases))
	for i, c := range cases {
		s := one.start(c.Input, c.grids(), c.planes, c.params, tokens)
		for len(s.output) < tokens {
			alone[i].take(s, one.step(len(c.Input), s)[0])
		}
	}
	for _, slots := range [][]int{{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3, 4, 5, 6}, {2}, {1, 3}, {0, 5, 6, 40, 63}} {
		t.Run(fmt.Sprint(slots), func(t *testing.T) {
			g := newGroupIn(t, shapesModel, slots, single, lim)
			for _, again := range []float64{0, 0.3, 1} {
				at := map[*sequence]int{}
				var seqs []*sequence
				got := make([]answer, len(cases))
				for _, c := range cases {
					seqs = append(seqs, g.start(c.Input, c.grids(), c.planes, c.params, tokens))
				}
				for step := 0; ; step++ {
					var batch []engine.Seq
					var in []*sequence
					var of []int
					for i, s := range seqs {
						if len(s.output) < tokens && step >= i {
							batch, in, of = append(batch, g.chunk(s, 1+g.rnd.IntN(40))), append(in, s), append(of, i)
						}
					}
					if len(batch) == 0 {
						break
					}
					g.spread(batch, at, in)
					g.place(again)
					logits, err := g.text.Forward(batch)
					if err != nil {
						t.Fatal(err)
					}
					for i, s := range in {
						s.done += len(batch[i].Tokens)
						if logits[i] != nil {
							id, _, _ := s.sampler.Next(logits[i], len(s.output))
							s.output = append(s.output, id)
							got[of[i]].take(s, logits[i])
						}
					}
				}
				for i := range cases {
					alone[i].compare(t, fmt.Sprintf("%s with experts on others at %g", cases[i].Name, again), &got[i])
				}
			}
		})
	}
}

// TestNPUsGolden generates golden answers, without pictures, on NPUs that change experts all the time.
func TestNPUsGolden(t *testing.T) {
	for _, dir := range []string{shapesModel, qwen3Moe} {
		cases := shapesCases(t)
		if dir == qwen3Moe {
			var golden struct {
				Cases []goldenCase `json:"cases"`
			}
			readJSON(t, qwen3Moe+"/golden.json", &golden)
			cases = golden.Cases
		}
		for _, npus := range []int{2, 3, 7} {
			g := newGroup(t, dir, npus, single, engine.Limits{Rows: 512, Seqs: 32})
			at := map[*sequence]int{}
			var seqs []*sequence
			var want [][]int32
			for _, c := range cases {
				if len(c.Images) > 0 || len(c.Output) > 40 {
					continue
				}
				seqs, want = append(seqs, g.start(c.Input, nil, nil, sample.Params{}, len(c.Output))), append(want, c.Output)
			}
			if len(seqs) < 2 {
				t.Fatalf("%s: only %d golden cases without pictures", dir, len(seqs))
			}
			for {
				var batch []engine.Seq
				var in []*sequence
				for i, s := range seqs {
					if len(s.output) < len(want[i]) {
						batch, in = append(batch, g.chunk(s, len(s.prompt))), append(in, s)
					}
				}
				if len(batch) == 0 {
					break
				}
				g.spread(batch, at, in)
				g.place(0.2)
				logits, err := g.text.Forward(batch)
				if err != nil {
					t.Fatal(err)
				}
				for i, s := range in {
					s.done += len(batch[i].Tokens)
					id, _, _ := s.sampler.Next(logits[i], len(s.output))
					s.output = append(s.output, id)
				}
			}
			for i, s := range seqs {
				if !slices.Equal(s.output, want[i]) {
					t.Errorf("%s on %d NPUs, case %d: ids %v\nwant %v", dir, npus, i, s.output, want[i])
				}
			}
		}
	}
}

// TestNPUsReference has the oracle's kernels do the same.
func TestNPUsReference(t *testing.T) {
	c := shapesCases(t)[0]
	g := newGroup(t, shapesModel, 3, ref.New, engine.Limits{Rows: 64, Seqs: 1})
	s := g.start(c.Input, nil, nil, sample.Params{}, len(c.Output))
	for len(s.output) < min(4, len(c.Output)) {
		g.place(0.3)
		g.step(64, s)
	}
	if !slices.Equal(s.output, c.Output[:len(s.output)]) {
		t.Errorf("ids %v, want %v", s.output, c.Output)
	}
}

// TestLoad counts what the router says.
func TestLoad(t *testing.T) {
	const rows = 20
	g := newGroup(t, shapesModel, 3, single, engine.Limits{Rows: 64, Seqs: 64})
	var batch []engine.Seq
	for i := range 3 {
		batch = append(batch, engine.Seq{NPU: i % 2, Tokens: make([]int32, rows), Blocks: g.blocks(rows), All: true})
	}
	if _, err := g.text.Forward(batch); err != nil {
		t.Fatal(err)
	}
	load := make([][]uint64, g.cfg.Text.Layers)
	for l := range load {
		load[l] = make([]uint64, g.cfg.Text.Experts)
	}
	g.text.Load(load)
	for l := range load {
		var sum uint64
		for _, v := range load[l] {
			sum += v
		}
		if want := uint64(3 * rows * g.cfg.Text.TopK); sum != want {
			t.Errorf("load of layer %d is %d, want %d", l, sum, want)
		}
	}
}

// TestNPURefusals are the mistakes that only several NPUs make possible.
func TestNPURefusals(t *testing.T) {
	g := newGroup(t, shapesModel, 2, single, engine.Limits{Rows: 8, Seqs: 2})
	seq := func(npu int) engine.Seq { return engine.Seq{NPU: npu, Tokens: []int32{1}, Blocks: g.blocks(1)} }
	for _, batch := range [][]engine.Seq{{seq(2)}, {seq(-1)}, {seq(0), seq(0), seq(0)}} {
		if _, err := g.text.Forward(batch); !errors.Is(err, engine.ErrBatch) {
			t.Errorf("%d sequences on NPU %d: %v", len(batch), batch[0].NPU, err)
		}
	}
	if _, err := g.text.Forward([]engine.Seq{seq(0), seq(1), seq(0), seq(1)}); err != nil {
		t.Errorf("two sequences on each NPU: %v", err)
	}
	lacking := [][][]model.Expert{moved(g.copy[0]), moved(g.copy[0])}
	lacking[0][3][5], lacking[1][3][5] = model.Expert{}, model.Expert{}
	if err := g.text.SetExperts(lacking); !errors.Is(err, engine.ErrModel) {
		t.Errorf("an expert that no NPU has: %v", err)
	}
	if err := g.text.SetExperts(g.copy[:1]); !errors.Is(err, engine.ErrModel) {
		t.Errorf("experts of one NPU of two: %v", err)
	}
	gaps := newGroupIn(t, shapesModel, []int{1, 3}, single, engine.Limits{Rows: 8, Seqs: 2})
	for _, npu := range []int{0, 2, 4} {
		if _, err := gaps.text.Forward([]engine.Seq{seq(npu)}); !errors.Is(err, engine.ErrBatch) {
			t.Errorf("a sequence on NPU %d, which is not there: %v", npu, err)
		}
	}
	gaps.copy[2] = g.copy[0]
	if err := gaps.text.SetExperts(gaps.copy); !errors.Is(err, engine.ErrModel) {
		t.Errorf("experts on an NPU that is not there: %v", err)
	}
	if _, err := engine.NewText(g.cfg, make([]engine.NPU, 3), engine.Limits{Rows: 8, Seqs: 2}); err == nil {
		t.Error("a model on no NPU")
	}
	c := single()
	defer c.Close()
	_, err := engine.NewText(g.cfg, []engine.NPU{{Compute: c, Weights: g.w}, {Compute: ref.New(), Weights: g.w}}, engine.Limits{Rows: 8, Seqs: 2})
	if err == nil {
		t.Error("two kernel sets make one model")
	}
}

// TestNPUsAllocateNothing counts what a step allocates once it has run.
func TestNPUsAllocateNothing(t *testing.T) {
	for _, npus := range []int{1, 3} {
		g := newGroup(t, shapesModel, npus, single, engine.Limits{Rows: 32, Seqs: 16})
		g.place(0.3)
		var batch []engine.Seq
		for i := range 6 {
			batch = append(batch, engine.Seq{NPU: i % npus, Tokens: []int32{int32(i + 5)}, Pos: 20, Blocks: g.blocks(32), Want: true})
		}
		least := 1.0
		for range 20 { // a worker's scratch grows when it first needs it
			least = min(least, testing.AllocsPerRun(5, func() {
				if _, err := g.text.Forward(batch); err != nil {
					t.Fatal(err)
				}
			}))
		}
		if least > 0 {
			t.Errorf("%d NPUs: %v allocations a step", npus, least)
		}
	}
}

// TestMeters: each NPU's meter is told of the sequences there, one that only serves experts of nothing.
func TestMeters(t *testing.T) {
	var meters []*meter
	g := newGroup(t, shapesModel, 3, func() kernel.Compute {
		m := &meter{Compute: single()}
		meters = append(meters, m)
		return m
	}, engine.Limits{Rows: 32, Seqs: 4})
	batch := []engine.Seq{
		{NPU: 2, Tokens: []int32{1, 2, 3}, Blocks: g.blocks(3), Want: true},
		{NPU: 0, Tokens: []int32{4}, Pos: 20, Blocks: g.blocks(21), Want: true},
		{NPU: 2, Tokens: []int32{5}, Pos: 10, Blocks: g.blocks(11), Want: true},
	}
	if _, err := g.text.Forward(batch); err != nil {
		t.Fatal(err)
	}
	for npu, want := range [][]kernel.Work{{{Decoding: 1, Context: 21}}, nil, {{Prompt: 3, Pairs: 6, Decoding: 1, Context: 11}}} {
		if !slices.Equal(meters[npu].works, want) || meters[npu].open {
			t.Errorf("NPU %d is told of %+v, want %+v", npu, meters[npu].works, want)
		}
	}
}
