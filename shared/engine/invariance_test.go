package engine_test

import (
	"fmt"
	"math"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"testing"

	"trireme.dev/shared/engine"
	"trireme.dev/shared/engine/sample"
)

// prepared is a golden case with its pictures encoded.
type prepared struct {
	goldenCase
	planes [][]float32
	params sample.Params
}

// prepare returns cases with and without pictures, greedy and sampled.
func prepare(t *testing.T, r *rig) []prepared {
	t.Helper()
	var out []prepared
	for i, name := range []string{"case00", "case05", "case06", "case09", "case10"} {
		for _, c := range shapesCases(t) {
			if c.Name != name {
				continue
			}
			p := prepared{goldenCase: c}
			if len(c.Grids) > 0 {
				g, ok := openTensors(t, filepath.Join(shapesGolden, name+".safetensors"))
				if !ok {
					t.Fatalf("%s has no golden tensors", name)
				}
				p.planes = append(p.planes, r.encodeGolden(t, &p.goldenCase, g))
			}
			if i%2 == 1 {
				p.params = sample.Params{Temperature: 1, TopP: 0.95, Repetition: 1.1, Seed: uint64(i)}
			}
			out = append(out, p)
		}
	}
	return out
}

// answer is what a sequence gave: its tokens and the bits of the logits each was chosen from.
type answer struct {
	ids    []int32
	logits [][]uint32
}

func (a *answer) take(s *sequence, logits []float32) {
	if logits == nil {
		return
	}
	bits := make([]uint32, len(logits))
	for i, v := range logits {
		bits[i] = math.Float32bits(v)
	}
	a.logits = append(a.logits, bits)
	a.ids = s.output
}

// compare fails the test when b is not a, bit for bit.
func (a *answer) compare(t *testing.T, what string, b *answer) {
	t.Helper()
	if !slices.Equal(a.ids, b.ids) {
		t.Errorf("%s: tokens %v, want %v", what, b.ids, a.ids)
	}
	for i := range min(len(a.logits), len(b.logits)) {
		if !slices.Equal(a.logits[i], b.logits[i]) {
			t.Errorf("%s: logits of token %d differ", what, i)
			return
		}
	}
}

// TestBatchInvariance checks that tokens and logits of a sequence are the same bits alone with its prompt in one piece,
// and in batches that it shares with others in prefill and decode, with prompts cut anywhere.
func TestBatchInvariance(t *testing.T) {
	const tokens = 6
	for name, backend := range backends {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, shapesModel, backend(), engine.Limits{Rows: 256, Seqs: 16})
			cases := prepare(t, r)
			alone := make([]answer, len(cases))
			for i, c := range cases {
				s := r.start(c.Input, c.grids(), c.planes, c.params, tokens)
				for len(s.output) < tokens {
					alone[i].take(s, r.step(len(c.Input), s)[0])
				}
			}
			rounds := 12
			if name == "ref" { // slow, and the invariance that counts is the fast backends'
				rounds = 1
			}
			for round := range rounds {
				mixed(t, r, cases, alone, tokens, rand.New(rand.NewPCG(uint64(round), 1)))
			}
		})
	}
}

// mixed runs all cases at once, each joining at a random step with a random chunk size.
func mixed(t *testing.T, r *rig, cases []prepared, alone []answer, tokens int, rnd *rand.Rand) {
	t.Helper()
	type running struct {
		s     *sequence
		of    int
		join  int
		chunk int
		got   answer
	}
	var all []*running
	for range 9 {
		i := rnd.IntN(len(cases))
		c := cases[i]
		all = append(all, &running{
			s:  r.start(c.Input, c.grids(), c.planes, c.params, tokens),
			of: i, join: rnd.IntN(6), chunk: 1 + rnd.IntN(len(c.Input)),
		})
	}
	for step := 0; ; step++ {
		var batch []engine.Seq
		var in []*running
		busy := false
		for _, a := range all {
			if len(a.s.output) == tokens {
				continue
			}
			busy = true
			if step >= a.join {
				batch, in = append(batch, r.chunk(a.s, a.chunk)), append(in, a)
			}
		}
		if !busy {
			break
		}
		logits, err := r.text.Forward(batch)
		if err != nil {
			t.Fatal(err)
		}
		for i, a := range in {
			a.s.done += len(batch[i].Tokens)
			if logits[i] != nil {
				id, _, _ := a.s.sampler.Next(logits[i], len(a.s.output))
				a.s.output = append(a.s.output, id)
				a.got.take(a.s, logits[i])
			}
		}
	}
	for _, a := range all {
		alone[a.of].compare(t, fmt.Sprintf("%s joined at step %d in chunks of %d", cases[a.of].Name, a.join, a.chunk), &a.got)
	}
}

// TestWantedRows checks that logits of the last row are the same bits whether the last layer is computed for that row
// only, for all rows, or while router logits are observed.
func TestWantedRows(t *testing.T) {
	for name, backend := range backends {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, shapesModel, backend(), engine.Limits{Rows: 64, Seqs: 64})
			c := prepare(t, r)[2]
			run := func(change func(*engine.Seq)) []float32 {
				q := r.chunk(r.start(c.Input, c.grids(), c.planes, c.params, 0), len(c.Input))
				change(&q)
				logits, err := r.text.Forward([]engine.Seq{q})
				if err != nil {
					t.Fatal(err)
				}
				return slices.Clone(logits[0])
			}
			last := run(func(*engine.Seq) {})
			vocab := r.cfg.Text.Vocab
			if len(last) != vocab {
				t.Fatalf("%d logits, want %d", len(last), vocab)
			}
			all := run(func(q *engine.Seq) { q.All = true })
			if len(all) != len(c.Input)*vocab {
				t.Fatalf("%d logits of all rows, want %d", len(all), len(c.Input)*vocab)
			}
			if !slices.Equal(all[len(all)-vocab:], last) {
				t.Error("the last of all rows differs from the only row")
			}
			r.text.Observe(func(int, []float32) {})
			if !slices.Equal(run(func(*engine.Seq) {}), last) {
				t.Error("logits differ while router logits are observed")
			}
			r.text.Observe(nil)
			if got := run(func(q *engine.Seq) { q.Want = false }); got != nil {
				t.Errorf("%d logits that nobody wanted", len(got))
			}
		})
	}
}

// TestFrames checks that a clip's frames are encoded apart from each other: attention stays inside a frame and
// positions repeat.
func TestFrames(t *testing.T) {
	for name, backend := range backends {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, shapesModel, backend(), engine.Limits{Rows: 1, Seqs: 1})
			frame, clip := engine.Grid{T: 1, H: 4, W: 6}, engine.Grid{T: 2, H: 4, W: 6}
			rnd := rand.New(rand.NewPCG(5, 5))
			pixels := make([]float32, clip.Patches()*r.cfg.Vision.PatchDim())
			for i := range pixels {
				pixels[i] = 2*rnd.Float32() - 1
			}
			encode := func(pixels []float32, g engine.Grid) [][]float32 {
				out := r.alloc(r.enc.Floats(g))
				if err := r.enc.Encode(out, pixels, g); err != nil {
					t.Fatal(err)
				}
				host := make([]float32, len(out))
				r.c.Download(host, out)
				return r.split(host)
			}
			both := encode(pixels, clip)
			first, second := encode(pixels[:len(pixels)/2], frame), encode(pixels[len(pixels)/2:], frame)
			for i := range both {
				if !slices.Equal(both[i], slices.Concat(first[i], second[i])) {
					t.Errorf("plane %d of two frames differs from the frames encoded alone", i)
				}
			}
		})
	}
}
