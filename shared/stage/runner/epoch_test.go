package runner_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"
	"time"

	"trireme.dev/shared/engine"
	"trireme.dev/shared/model"
	"trireme.dev/shared/npu"
	"trireme.dev/shared/sched"
	"trireme.dev/shared/sched/placement"
	"trireme.dev/shared/stage/runner"
)

// open has an NPU in each of so many slots.
func (l *lab) open(slots int) []engine.NPU {
	npus := make([]engine.NPU, slots)
	for i := range npus {
		c, err := npu.Open(npu.Options{Threads: 1})
		if err != nil {
			l.Fatal(err)
		}
		l.Cleanup(func() { c.Close() })
		npus[i] = engine.NPU{Compute: c, Weights: l.weights}
	}
	return npus
}

// spread are the NPUs of a set, with each expert on one of them or on two.
func (l *lab) spread(npus []engine.NPU, set placement.Set, rnd *rand.Rand) []engine.NPU {
	on := make([]engine.NPU, len(npus))
	var slots []int
	for n := range set.All() {
		on[n], slots = npus[n], append(slots, n)
	}
	for _, layer := range l.weights.Layers {
		for _, n := range slots {
			on[n].Experts = append(on[n].Experts, make([]model.Expert, len(layer.Experts)))
		}
		for e, x := range layer.Experts {
			for range 2 {
				on[slots[rnd.IntN(len(slots))]].Experts[len(on[slots[0]].Experts)-1][e] = x
			}
		}
	}
	return on
}

func tables(npus []engine.NPU) [][][]model.Expert {
	list := make([][][]model.Expert, len(npus))
	for i, n := range npus {
		list[i] = n.Experts
	}
	return list
}

// An instance grows and shrinks, and its experts change places, while prompts are computed and sequences decode, which go over to
// others when their NPU leaves: each gives what it gives alone on one NPU. The load is that of all epochs.
func TestNPUsComeAndGo(t *testing.T) {
	l := newLab(t)
	const slots = 7
	rnd := rand.New(rand.NewPCG(1, 2))
	npus := l.open(slots)
	r := runner.New()

	kinds := [][2]int{{10, 30}, {70, 12}, {33, 21}, {150, 4}, {20, 50}}
	want := make([][]int32, len(kinds))
	for i, k := range kinds {
		want[i] = l.alone(k[0], k[1])
	}
	// The runner's goroutine has these.
	var set placement.Set
	started, ended, rows := 0, 0, 0
	kind := map[*sequence]int{}
	var decode, prompts *source
	more, over := true, make(chan bool)
	choose := func() int {
		at := rnd.IntN(set.Len())
		for n := range set.All() {
			if at--; at < 0 {
				return n
			}
		}
		panic("BUG: no NPU")
	}
	begin := func() {
		k := started % len(kinds)
		started++
		q := l.sequence(kinds[k][0], kinds[k][1])
		q.npu, kind[q] = choose(), k
		prompts.all = append(prompts.all, q)
	}
	decode = &source{lab: l, decodes: true, done: func(q *sequence) {
		ended++
		rows += q.end
		if w := want[kind[q]]; !slices.Equal(q.tokens, w) {
			t.Errorf("sequence %d goes on with %v, alone with %v", ended, q.tokens[q.prompt:], w[q.prompt:])
		}
		delete(kind, q)
		if more {
			begin()
		} else if len(kind) == 0 {
			close(over)
		}
	}}
	prompts = &source{lab: l, done: func(q *sequence) { decode.all = append(decode.all, q) }}
	r.AddPrompts("prefill", prompts, 64, 4)
	r.AddDecoding("decode", decode, 16)

	set = placement.First(1)
	err := r.Start(l.config, l.spread(npus, set, rnd), sched.Mixed{}, func(string) runner.Observer { return l })
	if err != nil {
		t.Fatal(err)
	}
	r.Do(func() {
		for range 12 {
			begin()
		}
	})
	// between has the runner compute for a while: so many more sequences end.
	between := func(sequences int) {
		for at := -1; ; time.Sleep(time.Millisecond) {
			n := make(chan int)
			r.Do(func() { n <- ended })
			if now := <-n; at < 0 {
				at = now
			} else if now >= at+sequences {
				return
			}
		}
	}
	shuffle := rand.New(rand.NewPCG(3, 4)) // of this goroutine
	present := set
	for i, next := range []placement.Set{
		placement.Of(0, 1), placement.Of(0, 1, 2, 6), placement.Of(0, 2, 6), placement.Of(2, 6), placement.Of(2),
		placement.Of(2, 3, 4), placement.Of(0, 1, 5), placement.Of(0),
	} {
		between(3)
		on := l.spread(npus, next, shuffle)
		n, err := prepared(r, on)
		if err != nil {
			t.Fatal(err)
		}
		if join := next &^ present; join != 0 && n.Warm <= 0 {
			t.Errorf("NPUs {%v} join without a first row", join)
		}
		between(1)
		if i%2 == 1 { // experts of the present NPUs change places while the next ones are there already
			if err := r.SetExperts(tables(l.spread(npus, present, shuffle))); err != nil {
				t.Fatal(err)
			}
			between(1)
		}
		not := errors.New("not yet")
		if _, err := r.Switch(n, func() error { return not }); !errors.Is(err, not) {
			t.Errorf("switching where it is refused: %v", err)
		}
		_, err = r.Switch(n, func() error {
			set = next
			for q := range kind {
				if !next.Has(q.npu) {
					q.npu = choose()
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		present = next
		if err := r.SetExperts(tables(l.spread(npus, next, shuffle))); err != nil {
			t.Fatal(err)
		}
	}
	between(3)
	r.Do(func() { more = false })
	<-over
	load := r.Load()
	for layer, experts := range load {
		var sum uint64
		for _, n := range experts {
			sum += n
		}
		k := uint64(l.config.Text.TopK)
		// Of the last layer only rows count whose logits are wanted.
		if layer < len(load)-1 && sum != uint64(rows)*k {
			t.Errorf("layer %d has had %d rows for experts, want %d", layer, sum, uint64(rows)*k)
		}
	}
	unused, err := prepared(r, l.spread(npus, placement.Of(1, 2), shuffle))
	if err != nil {
		t.Fatal(err)
	}
	r.Stop()
	if _, err := r.Switch(unused, nil); !errors.Is(err, runner.ErrStopped) {
		t.Errorf("a runner that has been stopped switches: %v", err)
	}
	unused.Close()
}

// steady is sequences that compute the same token again and again, and counts what steps allocate.
type steady struct {
	seqs    []engine.Seq
	mallocs []uint64 // before each of the last steps; nil: they are not counted
	counted chan []uint64
	stats   runtime.MemStats
	took    []time.Duration // of steps, if there is room
	last    time.Time
}

func (s *steady) Form(step *runner.Step) {
	for _, q := range s.seqs {
		if step.Token(q.NPU, q.Pos) {
			step.Add(q)
		}
	}
}

func (s *steady) Computed([]engine.Seq, [][]float32, error) {
	now := time.Now()
	if len(s.took) < cap(s.took) {
		s.took = append(s.took, now.Sub(s.last))
	}
	s.last = now
	if s.mallocs == nil {
		return
	}
	runtime.ReadMemStats(&s.stats)
	if s.mallocs = append(s.mallocs, s.stats.Mallocs); len(s.mallocs) == cap(s.mallocs) {
		s.counted <- s.mallocs
		s.mallocs = nil
	}
}

// steady has n sequences on the NPUs of a set.
func (l *lab) steady(n int, set placement.Set) *steady {
	s := &steady{counted: make(chan []uint64)}
	var slots []int
	for slot := range set.All() {
		slots = append(slots, slot)
	}
	for i := range n {
		q := l.sequence(1, 31)
		s.seqs = append(s.seqs, engine.Seq{NPU: slots[i%len(slots)], Tokens: []int32{int32(i + 5)}, Pos: 20, Blocks: q.blocks, Want: true})
	}
	return s
}

// Steps of a later epoch allocate nothing either.
func TestStepsAllocateNothing(t *testing.T) {
	l := newLab(t)
	rnd := rand.New(rand.NewPCG(5, 6))
	npus := l.open(4)
	s := l.steady(6, placement.Of(1))
	r := runner.New()
	r.AddDecoding("decode", s, 16)
	if err := r.Start(l.config, l.spread(npus, placement.Of(1), rnd), sched.Mixed{}, func(string) runner.Observer { return l }); err != nil {
		t.Fatal(err)
	}
	defer r.Stop()
	for _, set := range []placement.Set{placement.Of(1), placement.Of(0, 1, 3)} {
		if set.Len() > 1 {
			n, err := prepared(r, l.spread(npus, set, rnd))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := r.Switch(n, func() error { s.seqs[0].NPU, s.seqs[1].NPU = 0, 3; return nil }); err != nil {
				t.Fatal(err)
			}
		}
		fewest := ^uint64(0)
		for range 10 { // workers' scratch grows when it is first needed
			r.Do(func() { s.mallocs = make([]uint64, 0, 20) })
			r.Wake()
			counts := <-s.counted
			for i := range counts[1:] {
				fewest = min(fewest, counts[i+1]-counts[i])
			}
		}
		if fewest > 0 {
			t.Errorf("a step on NPUs {%v} allocates %d times", set, fewest)
		}
	}
}

// BenchmarkSwitch grows and shrinks a runner between two and three NPUs under decoding sequences. Reported are how long steps wait for
// Switch, how long Prepare takes, the mean step without anything beside it, while Prepare runs, and the first one of an epoch. Each
// NPU has one thread: with more NPUs than cores, Prepare takes its time from steps.
func BenchmarkSwitch(b *testing.B) {
	for _, batch := range []int{1, 32} {
		b.Run(fmt.Sprintf("batch=%d", batch), func(b *testing.B) {
			l := newLab(b)
			rnd := rand.New(rand.NewPCG(7, 8))
			npus := l.open(3)
			two, three := placement.First(2), placement.First(3)
			s := l.steady(batch, two)
			r := runner.New()
			r.AddDecoding("decode", s, 64)
			r.AddPrompts("prefill", &source{lab: l}, 2048, 32) // as much scratch as an instance with both has
			if err := r.Start(l.config, l.spread(npus, two, rnd), sched.Mixed{}, func(string) runner.Observer { return l }); err != nil {
				b.Fatal(err)
			}
			defer r.Stop()
			collect := func(n int) { r.Do(func() { s.took, s.last = make([]time.Duration, 0, n), time.Now() }) }
			collected := func() []time.Duration {
				c := make(chan []time.Duration)
				r.Do(func() { c <- s.took; s.took = nil })
				return <-c
			}
			var pause, prepare, warm time.Duration
			var quiet, beside, first []time.Duration
			i := 0
			for b.Loop() {
				set := []placement.Set{three, two}[i%2]
				i++
				collect(1 << 12)
				time.Sleep(100 * time.Millisecond)
				quiet = append(quiet, collected()...)
				collect(1 << 12)
				start := time.Now()
				n, err := prepared(r, l.spread(npus, set, rnd))
				if err != nil {
					b.Fatal(err)
				}
				prepare += time.Since(start)
				warm += n.Warm
				beside = append(beside, collected()...)
				p, err := r.Switch(n, func() error { s.took, s.last = make([]time.Duration, 0, 1), time.Now(); return nil })
				if err != nil {
					b.Fatal(err)
				}
				pause += p
				time.Sleep(20 * time.Millisecond)
				first = append(first, collected()...)
			}
			mean := func(all []time.Duration) float64 {
				var sum time.Duration
				for _, d := range all {
					sum += d
				}
				return float64(sum.Microseconds()) / float64(max(1, len(all)))
			}
			b.ReportMetric(float64(pause.Nanoseconds())/1e3/float64(i), "µs-pause")
			b.ReportMetric(float64(prepare.Microseconds())/float64(i), "µs-prepare")
			b.ReportMetric(float64(warm.Microseconds())/float64((i+1)/2), "µs-warm")
			b.ReportMetric(mean(quiet), "µs-step")
			b.ReportMetric(mean(beside), "µs-step-beside")
			b.ReportMetric(mean(first), "µs-first-step")
		})
	}
}

// prepared makes the next epoch, whose weights come when its scratch is there.
func prepared(r *runner.Runner, npus []engine.NPU) (*runner.Next, error) {
	bare := make([]engine.NPU, len(npus))
	for slot, n := range npus {
		bare[slot].Compute = n.Compute
	}
	next, err := r.Reserve(bare)
	if err != nil {
		return nil, err
	}
	if err := next.Load(npus); err != nil {
		next.Close()
		return nil, err
	}
	return next, nil
}
