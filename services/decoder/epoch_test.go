package decoder_test

import (
	"errors"
	"testing"

	"trireme.dev/services/decoder"
	"trireme.dev/shared/sched/placement"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/stagetest"
	"trireme.dev/shared/wire"
)

func together(t *testing.T) *rig { return newRig(t, stagetest.Long) }

// prepare prepares NPUs for a stage, by number in each slot, with the experts spread evenly over them.
func (r *rig) prepare(s *stage.Stage, numbers ...int) *stage.Epoch {
	r.Helper()
	var set placement.Set
	for slot, n := range numbers {
		if n >= 0 {
			set = set.With(slot)
		}
	}
	e, err := s.Prepare(r.Context(), numbers, stage.Layout(&s.Model.Text, set), stage.AttachOptions{})
	if err != nil {
		r.Fatal(err)
	}
	return e
}

// swap has a stage go on with these NPUs.
func (r *rig) swap(s *stage.Stage, numbers ...int) {
	r.Helper()
	e := r.prepare(s, numbers...)
	if _, err := e.Switch(); err != nil {
		r.Fatal(err)
	}
	if err := e.Release(); err != nil {
		r.Fatal(err)
	}
}

// join has a stage get one more NPU of the node.
func (r *rig) join(s *stage.Stage) int {
	r.Helper()
	n, err := s.HBM.JoinAny(r.Context(), 1)
	if err != nil {
		r.Fatal(err)
	}
	return n[0]
}

// An instance grows while it decodes, new sequences come to the NPU that has joined, and it shrinks again when those have ended. All
// answers are what they are on one NPU, in one memory domain and with one for each NPU.
func TestInstanceGrowsAndShrinks(t *testing.T) {
	for name, newRig := range map[string]func(*testing.T) *rig{
		"one domain": together, "apart": apart,
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			s, stop := r.decoder(decoder.Config{Slots: 2})
			defer stop()
			spec := r.Model.Random(prompt(t, "case01"), 300, 1)
			r.deaf(true) // so that the sequences before the change are there behind it
			requests := []wire.Request{r.start(spec), r.start(spec)}
			for _, req := range requests {
				r.gateway.Tokens(req.ID, 0, 20)
			}
			waits := r.start(spec) // there is no room for it on one NPU
			before := s.NPUs()[0].Number
			joined := r.join(s)
			if _, err := s.Prepare(t.Context(), []int{joined, before}, stage.Layout(&s.Model.Text, placement.First(2)), stage.AttachOptions{}); err == nil {
				t.Error("an NPU changes its slot")
			}
			e := r.prepare(s, before, -1, joined)
			if e.Warm <= 0 {
				t.Error("an NPU joins without a first row")
			}
			if _, err := e.Switch(); err != nil {
				t.Fatal(err)
			}
			if err := e.Release(); err != nil {
				t.Fatal(err)
			}
			r.gateway.Tokens(waits.ID, 0, 20)
			if a, b := s.Held(0).Seqs, s.Held(2).Seqs; a != 2 || b != 1 {
				t.Errorf("%d and %d sequences on the NPUs, want 2 and 1", a, b)
			}
			s.Leave(2)
			e = r.prepare(s, before)
			if _, err := e.Switch(); !errors.Is(err, stage.ErrBusy) {
				t.Errorf("an NPU leaves that has a sequence: %v", err)
			}
			r.deaf(false)
			requests = append(requests, waits)
			for _, req := range requests {
				r.same(spec, 0, r.gateway.Ended(req.ID, 0))
			}
			r.Empty(stage.Decode)
			if _, err := e.Switch(); err != nil {
				t.Fatal(err)
			}
			if err := e.Release(); err != nil {
				t.Fatal(err)
			}
			if len(s.NPUs()) != 1 {
				t.Errorf("NPUs %v are left", s.NPUs())
			}
			var rows uint64
			for _, n := range s.Load()[0] {
				rows += n
			}
			if want := uint64(3 * 299 * s.Model.Text.TopK); rows != want {
				t.Errorf("%d rows went to experts of the first layer, want %d", rows, want)
			}
			last := r.start(spec)
			r.same(spec, 0, r.gateway.Ended(last.ID, 0))
			if err := s.HBM.Part(t.Context(), joined); err != nil { // nothing of it is held, no weights either
				t.Error(err)
			}
			again, copied := r.join(s), r.Stats().Copied
			r.swap(s, before, again)
			if got := s.NPUs()[1].Number; got != joined {
				t.Errorf("NPU %d in slot 1, want %d", got, joined)
			}
			if more := r.Stats().Copied - copied; more != 0 { // they rest there
				t.Errorf("%d bytes of weights were copied again", more)
			}
			for _, req := range requests {
				r.Done(req.ID, -1)
			}
			r.end(last)
		})
	}
}

// What makes changes cheap can be left out: then what stays on an NPU is copied there, what joins another one is read from the files, and
// all else, answers and memory, is as ever, whether the change is made or given up.
func TestChangesWithout(t *testing.T) {
	r := apart(t)
	r.Stage.Without = stage.Without{Remap: true, Copies: true}
	s, stop := r.decoder(decoder.Config{})
	defer stop()
	spec := r.Model.Random(prompt(t, "case01"), 300, 1)
	before := s.NPUs()[0].Number
	used := func(npu int) int64 {
		m := r.Stats().Shared[npu]
		return m.Used - m.Cached
	}
	whole := used(before)
	req := r.start(spec)
	r.gateway.Tokens(req.ID, 0, 20)
	joined := r.join(s)
	copied := r.Stats().Copied
	e := r.prepare(s, before, joined)
	half := used(joined)
	if n := used(before); n != whole+half || half == 0 || half >= whole {
		t.Errorf("before the switch the NPU that stays has %d bytes of weights, and the other one %d: want %d and half of that as a copy", n, half, whole)
	}
	e.Close()
	if n := used(before); n != whole || used(joined) != 0 {
		t.Errorf("given up, the NPUs have %d and %d bytes of weights, want %d and none", n, used(joined), whole)
	}
	r.swap(s, before, joined)
	if n := used(before); n != half {
		t.Errorf("behind the switch the NPU that stays has %d bytes of weights, want %d", n, half)
	}
	if n := r.Stats().Copied; n != copied {
		t.Errorf("%d bytes were copied between domains", n-copied)
	}
	r.same(spec, 0, r.gateway.Ended(req.ID, 0))
	last := r.start(spec)
	r.same(spec, 0, r.gateway.Ended(last.ID, 0))
}
