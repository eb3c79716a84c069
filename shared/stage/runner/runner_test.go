package runner_test

import (
	"fmt"
	"slices"
	"testing"

	"trireme.dev/shared/engine"
	"trireme.dev/shared/hf"
	"trireme.dev/shared/kernel"
	"trireme.dev/shared/leaktest"
	"trireme.dev/shared/model"
	"trireme.dev/shared/npu"
	"trireme.dev/shared/sched"
	"trireme.dev/shared/stage/runner"
)

func TestMain(m *testing.M) { leaktest.VerifyTestMain(m) }

// lab is the bundled model and what is written down of a runner's work, all on its goroutine.
type lab struct {
	testing.TB
	config  model.Config
	weights *model.Weights
	compute kernel.Compute
	log     []string
}

func newLab(t testing.TB) *lab {
	f, err := hf.Open("../../../models/shapes-vl-moe")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	l := &lab{TB: t, config: f.Config}
	if l.weights, err = f.Weights(); err != nil {
		t.Fatal(err)
	}
	if l.compute, err = npu.Open(npu.Options{Threads: 1}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.compute.Close() })
	return l
}

// npus are NPUs in these slots, in rising order, of which each has the experts whose number comes to its own.
func (l *lab) npus(slots ...int) []engine.NPU {
	count := len(slots)
	npus := make([]engine.NPU, slots[count-1]+1)
	for i, n := range slots {
		npus[n] = engine.NPU{Compute: l.compute, Weights: l.weights}
		if i > 0 {
			c, err := npu.Open(npu.Options{Threads: 1})
			if err != nil {
				l.Fatal(err)
			}
			l.Cleanup(func() { c.Close() })
			npus[n].Compute = c
		}
		for _, layer := range l.weights.Layers {
			own := make([]model.Expert, len(layer.Experts))
			for e := i; e < len(own); e += count {
				own[e] = layer.Experts[e]
			}
			npus[n].Experts = append(npus[n].Experts, own)
		}
	}
	return npus
}

// Observe implements runner.Observer.
func (l *lab) Observe(float64) {}

// sequence is a prompt that is computed and then, greedily, its answer.
type sequence struct {
	npu         int
	tokens      []int32
	prompt, end int
	pos         int // computed
	blocks      [][]float32
}

func (l *lab) sequence(prompt, answer int) *sequence {
	s := &sequence{prompt: prompt, end: prompt + answer}
	for i := range prompt {
		s.tokens = append(s.tokens, int32(300+17*i%200))
	}
	for range (s.end + model.BlockTokens - 1) / model.BlockTokens {
		block, err := l.compute.Alloc(l.config.Text.BlockFloats())
		if err != nil {
			l.Fatal(err)
		}
		s.blocks = append(s.blocks, block)
	}
	return s
}

func (s *sequence) seq(n int) engine.Seq {
	end := s.pos + n
	return engine.Seq{NPU: s.npu, Tokens: s.tokens[s.pos:end], Pos: s.pos, Blocks: s.blocks, Want: end == len(s.tokens)}
}

// computed books n computed tokens.
func (s *sequence) computed(n int, logits []float32) {
	if s.pos += n; s.pos < len(s.tokens) {
		return
	}
	best := 0
	for i, x := range logits {
		if x > logits[best] {
			best = i
		}
	}
	s.tokens = append(s.tokens, int32(best))
}

// alone computes a sequence in an engine of its own, a token at a time.
func (l *lab) alone(prompt, answer int) []int32 {
	s := l.sequence(prompt, answer)
	text, err := engine.NewText(l.config, l.npus(0), engine.Limits{Rows: 1, Seqs: 1})
	if err != nil {
		l.Fatal(err)
	}
	defer text.Close()
	for s.pos < s.end {
		logits, err := text.Forward([]engine.Seq{s.seq(1)})
		if err != nil {
			l.Fatal(err)
		}
		s.computed(1, logits[0])
	}
	return s.tokens
}

// source has sequences whose prompts it computes, or that decode.
type source struct {
	*lab
	decodes bool
	all     []*sequence
	taken   []*sequence
	done    func(*sequence) // with its prompt, or its answer
	token   func()          // after each; or nil
}

func (s *source) Form(step *runner.Step) {
	s.taken = s.taken[:0]
	for _, q := range s.all {
		n := 1
		if s.decodes && !step.Token(q.npu, q.pos) {
			break
		}
		if !s.decodes {
			if n = step.Chunk(q.npu, q.pos, q.prompt-q.pos); n == 0 {
				break
			}
		}
		step.Add(q.seq(n))
		s.taken = append(s.taken, q)
	}
}

func (s *source) Computed(seqs []engine.Seq, logits [][]float32, err error) {
	if err != nil {
		s.Error(err)
	}
	for i, q := range s.taken {
		n := len(seqs[i].Tokens)
		if s.decodes {
			s.log = append(s.log, "token")
		} else {
			s.log = append(s.log, fmt.Sprint("chunk ", n))
		}
		q.computed(n, logits[i])
		if s.token != nil {
			s.token()
		}
		if q.pos == q.end || !s.decodes && q.pos == q.prompt {
			s.all = slices.DeleteFunc(s.all, func(o *sequence) bool { return o == q })
			s.done(q)
		}
	}
}

// Sequences decode in every step while a long prompt is computed beside them, in chunks of what the budget leaves, and pieces
// of other work between; what comes out is what each gives alone. It is so on one NPU, where chunks have what decoding leaves, and
// with each sequence on an NPU of its own, whichever slots these are in.
func TestDecodingGoesOn(t *testing.T) {
	for _, c := range []struct {
		slots []int
		chunk string
	}{{[]int{0}, "chunk 23"}, {[]int{0, 1}, "chunk 24"}, {[]int{3}, "chunk 23"}, {[]int{1, 4, 9}, "chunk 24"}} {
		t.Run(fmt.Sprint(c.slots), func(t *testing.T) { decodingGoesOn(t, c.slots, c.chunk) })
	}
}

func decodingGoesOn(t *testing.T, slots []int, chunk string) {
	l := newLab(t)
	r := runner.New()
	short, long := l.sequence(10, 12), l.sequence(200, 3)
	short.npu, long.npu = slots[0], slots[len(slots)-1]
	want := map[*sequence][]int32{short: l.alone(10, 12), long: l.alone(200, 3)}
	ended := make(chan *sequence, 2)
	decode := &source{lab: l, decodes: true, done: func(q *sequence) { ended <- q }}
	prompts := &source{lab: l, done: func(q *sequence) { decode.all = append(decode.all, q) }}
	pieces := 0
	r.AddPrompts("prefill", prompts, 64, 4) // before the ones that decode: the runner sees to the order
	r.AddDecoding("decode", decode, 4)
	r.AddPieces(func() bool {
		if pieces == 0 {
			return false
		}
		pieces--
		l.log = append(l.log, "piece")
		return pieces > 0
	})
	var names []string
	err := r.Start(l.config, l.npus(slots...), sched.Mixed{Tokens: 24, Least: 8}, func(roles string) runner.Observer {
		names = append(names, roles)
		return l
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"prefill", "decode", "prefill+decode"}; !slices.Equal(names, want) {
		t.Errorf("steps are of %q, want %q", names, want)
	}
	decode.token = func() {
		if short.pos == 13 { // it decodes
			prompts.all = append(prompts.all, long)
			pieces = 5
			l.log = append(l.log, "long")
		}
	}
	r.Do(func() { prompts.all = append(prompts.all, short) })
	for range 2 {
		q := <-ended
		if !slices.Equal(q.tokens, want[q]) {
			t.Errorf("a prompt of %d tokens goes on with %v, alone with %v", q.prompt, q.tokens[q.prompt:], want[q][q.prompt:])
		}
	}
	r.Stop()
	order := []string{"long", "piece"}
	for range 4 {
		order = append(order, "token", chunk, "piece")
	}
	at := slices.Index(l.log, "long")
	if got := l.log[at:min(at+len(order), len(l.log))]; !slices.Equal(got, order) {
		t.Errorf("beside a long prompt and other work: %v, want %v", got, order)
	}
}

// What is asked of a runner that has been stopped is not done, and nobody waits for it.
func TestStopped(t *testing.T) {
	l := newLab(t)
	r := runner.New()
	if err := r.Start(l.config, l.npus(0), sched.Mixed{}, nil); err != nil {
		t.Fatal(err)
	}
	done := make(chan bool)
	if !r.Do(func() { close(done) }) {
		t.Error("a runner that runs does nothing")
	}
	<-done
	r.Stop()
	refused := false
	for range 1000 { // there is room for some in its inbox
		refused = refused || !r.Do(func() { t.Error("a stopped runner does something") })
	}
	if !refused {
		t.Error("a stopped runner takes all that is asked of it")
	}
}
