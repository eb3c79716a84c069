package sample

import (
	"math"
	"math/rand/v2"
	"slices"
	"sort"
	"testing"

	"pgregory.net/rapid"
)

var inf = float32(math.Inf(1))

// TestPhilox holds the known answers of Random123 (kat_vectors, philox4x32 10).
func TestPhilox(t *testing.T) {
	for _, c := range []struct {
		ctr  [4]uint32
		key  [2]uint32
		want [4]uint32
	}{
		{want: [4]uint32{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
		{
			[4]uint32{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, [2]uint32{0xffffffff, 0xffffffff},
			[4]uint32{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
		},
		{
			[4]uint32{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, [2]uint32{0xa4093822, 0x299f31d0},
			[4]uint32{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1},
		},
	} {
		if got := philox(c.ctr, c.key); got != c.want {
			t.Errorf("philox(%x, %x) = %x, want %x", c.ctr, c.key, got, c.want)
		}
	}
}

// TestUniform pins the draws: they were computed by a separate program, and seeded answers change when they do.
func TestUniform(t *testing.T) {
	for _, c := range []struct {
		seed          uint64
		choice, index uint32
		want          float64
	}{
		{0, 0, 0, 0.3990464708489645},
		{42, 1, 7, 0.022253272722070228},
		{math.MaxUint64, 3, 4095, 0.3530101769319405},
		{0x123456789abcdef, 0, 1, 0.6788647413070451},
	} {
		if got := Uniform(c.seed, c.choice, c.index); got != c.want {
			t.Errorf("Uniform(%d, %d, %d) = %v, want %v", c.seed, c.choice, c.index, got, c.want)
		}
	}
}

func TestExp(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 200_000 {
		x := -708 * r.Float64() * r.Float64() * r.Float64()
		got, want := exp(x), math.Exp(x)
		if math.Abs(got-want) > 4.5e-16*want { // two units in the last place: each may be off by one
			t.Fatalf("exp(%v) = %v, want %v", x, got, want)
		}
	}
	for _, c := range [][2]float64{{0, 1}, {-1000, 0}, {math.Inf(-1), 0}, {math.NaN(), 0}} {
		if got := exp(c[0]); got != c[1] {
			t.Errorf("exp(%v) = %v, want %v", c[0], got, c[1])
		}
	}
}

func TestGreedy(t *testing.T) {
	nan := float32(math.NaN())
	for _, c := range []struct {
		name   string
		logits []float32
		p      Params
		want   int32
	}{
		{"largest", []float32{1, 5, 3}, Params{}, 1},
		{"lowest id among equals", []float32{1, 5, 5, 2}, Params{}, 1},
		{"almost zero temperature", []float32{1, 5, 5, 2}, Params{Temperature: 9e-6, Seed: 3}, 1},
		{"all cut off", []float32{-inf, -inf}, Params{}, 0},
		{"not a number", []float32{nan, 1, 2, nan}, Params{}, 2},
		{"not a number, sampled", []float32{nan, 1, 2, nan}, Params{Temperature: 1}, 2},
		{"overflow, sampled", []float32{1e38, 3e38, 2e38}, Params{Temperature: 0.01}, 1},
		{"stop masked", []float32{1, 5, 3}, Params{MinTokens: 1, Stop: []int32{1, 99, -1}}, 2},
		{"bias", []float32{1, 5, 3}, Params{Bias: map[int32]float32{0: 10, 77: 100, -3: 100}}, 0},
		{"bias cannot lift a mask", []float32{1, 5, 3}, Params{MinTokens: 1, Stop: []int32{1}, Bias: map[int32]float32{1: 100}}, 2},
	} {
		if got, _, _ := New(c.p, nil, nil, nil).Next(c.logits, 0); got != c.want {
			t.Errorf("%s: token %d, want %d", c.name, got, c.want)
		}
	}
}

func TestStopOnlyMaskedUntilMinTokens(t *testing.T) {
	s := New(Params{MinTokens: 2, Stop: []int32{1}}, nil, nil, nil)
	var got []int32
	for i := range 3 {
		id, _, _ := s.Next([]float32{0, 9, 5}, i)
		got = append(got, id)
	}
	if want := []int32{2, 2, 1}; !slices.Equal(got, want) {
		t.Errorf("tokens %v, want %v", got, want)
	}
}

// TestPenalties follows vLLM's formulas by hand: repetition over prompt and output, frequency and presence over output.
func TestPenalties(t *testing.T) {
	logits := []float32{2, 2, -2, 2, -2}
	prompt, output := []int32{0, 2, 0, 500}, []int32{1, 1, 4}
	for _, c := range []struct {
		name string
		p    Params
		want []float32
	}{
		{"repetition", Params{Repetition: 2}, []float32{1, 1, -4, 2, -4}},
		{"frequency", Params{Frequency: 0.5}, []float32{2, 1, -2, 2, -2.5}},
		{"presence", Params{Presence: 0.5}, []float32{2, 1.5, -2, 2, -2.5}},
		{"all", Params{Repetition: 2, Frequency: 0.5, Presence: 0.25}, []float32{1, -0.25, -4, 2, -4.75}},
		{"after bias", Params{Repetition: 2, Bias: map[int32]float32{1: 2}}, []float32{1, 2, -4, 2, -4}},
	} {
		s := New(c.p, NewSpace(len(logits)), prompt, output)
		if got := s.adjust(logits); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
	if !slices.Equal(logits, []float32{2, 2, -2, 2, -2}) {
		t.Errorf("logits were changed: %v", logits)
	}
}

func TestLogprobs(t *testing.T) {
	logits := []float32{0, 2, 1, 2}
	sum := 1 + 2*math.Exp(2) + math.Exp(1)
	want := func(v float64) float32 { return float32(v - math.Log(sum)) }
	// Neither penalties nor the temperature show in logprobs.
	p := Params{Temperature: 0, Bias: map[int32]float32{0: 50}, Frequency: 1, TopLogprobs: 3}
	id, lp, top := New(p, nil, nil, []int32{1}).Next(logits, 1)
	if id != 0 || lp != want(0) {
		t.Errorf("token %d with logprob %v, want 0 with %v", id, lp, want(0))
	}
	if w := []TokenLogprob{{1, want(2)}, {3, want(2)}, {2, want(1)}}; !slices.Equal(top, w) {
		t.Errorf("top %v, want %v", top, w)
	}
	if _, lp, top := New(Params{TopLogprobs: -1}, nil, nil, nil).Next(logits, 0); lp != 0 || top != nil {
		t.Errorf("logprob %v and top %v without logprobs", lp, top)
	}
	if _, _, top := New(Params{TopLogprobs: 20}, nil, nil, nil).Next(logits, 0); len(top) != 4 {
		t.Errorf("%d top logprobs of 4 tokens", len(top))
	}
}

// kept says by sorting everything which tokens the truncations leave.
func kept(scores []float32, p Params) map[int32]bool {
	ids := make([]int32, len(scores))
	largest := math.Inf(-1)
	for i, v := range scores {
		ids[i] = int32(i)
		largest = max(largest, float64(v/p.Temperature))
	}
	prob := func(id int32) float64 { return math.Exp(float64(scores[id]/p.Temperature) - largest) }
	sort.Slice(ids, func(a, b int) bool { return before(scores, ids[a], ids[b]) })
	for len(ids) > 0 && prob(ids[len(ids)-1]) < float64(p.MinP) {
		ids = ids[:len(ids)-1]
	}
	if k := p.TopK; k > 0 && k < len(ids) {
		for k < len(ids) && scores[ids[k]] == scores[ids[p.TopK-1]] {
			k++
		}
		ids = ids[:k]
	}
	if p.TopP > 0 && p.TopP < 1 {
		total := 0.0
		for _, id := range ids {
			total += prob(id)
		}
		sum := 0.0
		for i, id := range ids {
			if sum += prob(id); sum >= float64(p.TopP)*total*(1-1e-12) {
				ids = ids[:i+1]
				break
			}
		}
	}
	out := map[int32]bool{}
	for _, id := range ids {
		out[id] = true
	}
	return out
}

// TestTruncation compares which tokens can be drawn with a plain implementation that sorts the vocabulary.
func TestTruncation(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 40).Draw(t, "vocab")
		scores := make([]float32, n)
		for i := range scores {
			scores[i] = float32(rapid.IntRange(-20, 20).Draw(t, "score")) / 4 // with ties
		}
		p := Params{
			Temperature: rapid.Float32Range(0.25, 2).Draw(t, "temperature"),
			TopK:        rapid.IntRange(-1, n+1).Draw(t, "top k"),
			TopP:        rapid.Float32Range(0.05, 1).Draw(t, "top p"),
			MinP:        rapid.SampledFrom([]float32{0, 0.013, 0.21, 1}).Draw(t, "min p"),
		}
		sp := NewSpace(n)
		sp.draw(scores, &p, 0.5)
		want := kept(scores, p)
		for id, w := range sp.weights {
			if (w > 0) != want[int32(id)] {
				t.Fatalf("token %d of weight %v, kept %v: %v %+v", id, w, want[int32(id)], scores, p)
			}
		}
	})
}

// TestDistribution draws often and compares frequencies with probabilities (chi squared; the seeds are fixed).
func TestDistribution(t *testing.T) {
	logits := []float32{0, 1, 2, 1.5, -1, 0.5}
	const draws = 20_000
	counts := make([]float64, len(logits))
	sp := NewSpace(len(logits))
	for i := range draws {
		id, _, _ := New(Params{Temperature: 0.8, Seed: 7, Choice: uint32(i), TopLogprobs: -1}, sp, nil, nil).Next(logits, 0)
		counts[id]++
	}
	total := 0.0
	for _, v := range logits {
		total += math.Exp(float64(v) / 0.8)
	}
	chi := 0.0
	for i, v := range logits {
		want := draws * math.Exp(float64(v)/0.8) / total
		chi += (counts[i] - want) * (counts[i] - want) / want
	}
	if chi > 20.5 { // 99.9% of 5 degrees of freedom
		t.Errorf("chi squared %.1f over counts %v", chi, counts)
	}
}

// TestRebuilt checks that a sampler rebuilt from the token log at any point goes on as the first one would have.
func TestRebuilt(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const vocab, steps = 50, 24
		p := Params{
			Temperature: rapid.SampledFrom([]float32{0, 0.7, 1.5}).Draw(t, "temperature"),
			TopK:        rapid.SampledFrom([]int{0, 5, 20}).Draw(t, "top k"),
			TopP:        rapid.SampledFrom([]float32{1, 0.9, 0.4}).Draw(t, "top p"),
			Presence:    rapid.Float32Range(-2, 2).Draw(t, "presence"),
			Frequency:   rapid.Float32Range(-2, 2).Draw(t, "frequency"),
			Repetition:  rapid.Float32Range(0.5, 2).Draw(t, "repetition"),
			Seed:        rapid.Uint64().Draw(t, "seed"),
			Choice:      rapid.Uint32().Draw(t, "choice"),
			MinTokens:   rapid.IntRange(0, 10).Draw(t, "min tokens"),
			Stop:        []int32{1, 2},
			TopLogprobs: 5,
		}
		r := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "logits"), 0))
		logits := make([][]float32, steps)
		for i := range logits {
			logits[i] = make([]float32, vocab)
			for j := range logits[i] {
				logits[i][j] = float32(r.NormFloat64() * 3)
			}
		}
		prompt := []int32{3, 4, 4, 30}
		type step struct {
			id  int32
			lp  float32
			top []TokenLogprob
		}
		whole, output := New(p, NewSpace(vocab), prompt, nil), []int32{}
		var first []step
		for i := range steps {
			id, lp, top := whole.Next(logits[i], i)
			first = append(first, step{id, lp, slices.Clone(top)})
			output = append(output, id)
		}
		shared := NewSpace(vocab) // a space that has seen other sequences
		New(Params{Temperature: 1}, shared, nil, nil).Next(logits[0], 0)
		for from := range steps {
			again := New(p, shared, prompt, output[:from])
			id, lp, top := again.Next(logits[from], from)
			if id != first[from].id || lp != first[from].lp || !slices.Equal(top, first[from].top) {
				t.Fatalf("step %d: %d %v %v, first %+v", from, id, lp, top, first[from])
			}
		}
	})
}

func TestWrongIndexPanics(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	New(Params{}, nil, nil, []int32{1}).Next([]float32{1, 2}, 0)
}

func TestNoAllocation(t *testing.T) {
	const vocab = 4096
	r := rand.New(rand.NewPCG(1, 1))
	logits := make([]float32, vocab)
	for i := range logits {
		logits[i] = float32(r.NormFloat64() * 4)
	}
	for name, p := range map[string]Params{
		"greedy":  {},
		"top k":   {Temperature: 1, TopK: 50, TopLogprobs: 20},
		"top p":   {Temperature: 1, TopP: 0.9, MinP: 0.01},
		"penalty": {Temperature: 1, Repetition: 1.1, Presence: 1, MinTokens: 5, Stop: []int32{1}},
	} {
		s := New(p, NewSpace(vocab), []int32{1, 2, 3}, nil)
		s.Next(logits, 0)
		if n := testing.AllocsPerRun(100, func() { s.Next(logits, s.Len()) }); n != 0 {
			t.Errorf("%s: %v allocations a token", name, n)
		}
	}
}
