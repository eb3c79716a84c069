package prefill_test

import (
	"context"
	"testing"

	"trireme.dev/services/prefill"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/stagetest"
	"trireme.dev/shared/wire"
)

// metered starts a prefill instance that counts its steps.
func (r *rig) metered(cfg prefill.Config) (*stage.Stage, *stagetest.Meter) {
	r.Helper()
	var m *stagetest.Meter
	s, _ := r.Open(stage.Prefill, func(ctx context.Context, s *stage.Stage) error {
		m = r.Meter(s)
		return prefill.Serve(ctx, s, cfg)
	})
	return s, m
}

// A cancelled request is computed no further than the step that has begun, whether it has a part in that, waits for one, is
// still being prepared, or is on the queue. No decoder gets a message of it, and all its memory is free.
func TestCancelStopsAtTheStep(t *testing.T) {
	r := newRig(t, stagetest.Long)
	s, m := r.metered(prefill.Config{Rows: 1, Slots: 3})
	m.Hold(3)
	var requests []wire.Request
	for i := range 5 { // three in work, two on the queue
		spec := r.long()
		if i%2 == 1 { // two answers, one of which goes on from an earlier attempt
			spec.Choices, spec.Resume = 2, [][]int32{{1, 2, 3}, nil}
		}
		requests = append(requests, r.start(spec).Request)
	}
	m.Await()
	r.Until("three are in work", func() bool { return r.Stats().Claims == 3 })
	r.Cancel(s, requests...)
	m.Release()
	r.Until("all are settled", func() bool { return r.Outcomes(s, "ended") == 5 })
	r.Empty(stage.Prefill)
	r.NoMemory()
	if n := m.Begun(); n != 4 {
		t.Errorf("%d steps, the fourth had begun when the end came", n)
	}
	if waiting, taken := r.Queue(stage.Decode); waiting+taken != 0 {
		t.Errorf("%d decode messages of cancelled requests", waiting+taken)
	}
	r.gateway.NothingLost()
}

// A cancelled request whose messages are there after its end is not begun; one that waits for memory is handed back, and not taken
// again.
func TestCancelBeforeTheWork(t *testing.T) {
	r := newRig(t, stagetest.Long)
	s, m := r.metered(prefill.Config{})
	early := &wire.Prefill{Request: r.Request(r.gateway.ID)}
	early.Inline, _ = r.Spec(early.Request, r.long())
	r.Cancel(s, early.Request)
	r.publish(early)
	r.Until("it is settled", func() bool { return r.Outcomes(s, "ended") == 1 })

	huge := r.Model.Greedy(make([]int32, 64), 5)
	for i := range huge.Prompt {
		huge.Prompt[i] = int32(i)
	}
	huge.Choices = 100 // more KV than the NPU has
	waiting := r.start(huge)
	r.Until("it has found no memory", func() bool { return r.Outcomes(s, "no memory") > 0 })
	r.Cancel(s, waiting.Request)
	r.Until("it is settled", func() bool { return r.Outcomes(s, "ended") == 2 })
	r.Empty(stage.Prefill)
	r.NoMemory()
	if n := m.Begun(); n != 0 {
		t.Errorf("%d steps were computed", n)
	}
}

// A choice that has ended is not computed for, nor decoded; the others are.
func TestEndedChoice(t *testing.T) {
	r := newRig(t, stagetest.Long)
	s, m := r.metered(prefill.Config{Rows: 64})
	spec := r.Model.Greedy(stagetest.Cases(t)[0].Input, 5)
	spec.Choices, spec.Resume = 2, [][]int32{{1, 2, 3}, nil}
	p := &wire.Prefill{Request: r.Request(r.gateway.ID)}
	p.Inline, p.Spec = r.Spec(p.Request, spec)
	r.Done(p.Request.ID, 0)
	r.Until("the end is known", func() bool { return s.Ended(p.Request, 0) })
	r.publish(p)
	if d := r.decodes(1); d[p.Request.ID+"/1"] == nil {
		t.Errorf("decode messages %v", d)
	}
	r.Empty(stage.Prefill)
	if n, want := m.Begun(), (len(spec.Prompt)+63)/64; n != want {
		t.Errorf("%d steps, the prompt takes %d", n, want)
	}
	if a := r.gateway.Answer(p.Request.ID, 0); len(a.Runs) != 0 {
		t.Errorf("%d runs of a choice that had ended", len(a.Runs))
	}
	r.Done(p.Request.ID, -1)
	r.NoMemory()
}

// Pictures of a request that is cancelled while its prompt waits are let go with it.
func TestCancelFreesPictures(t *testing.T) {
	r := newRig(t, stagetest.Long)
	s, m := r.metered(prefill.Config{Rows: 8})
	c := &stagetest.Cases(t)[6]
	spec, mm := r.Model.Spec(c)
	m.Hold(1)
	p := r.start(spec, mm...)
	m.Await()
	r.Until("its pictures are in memory", func() bool {
		return r.Stats().Memory[1].Kinds[mem.KindMM.String()].Used+r.Stats().Memory[2].Kinds[mem.KindMM.String()].Used > 0
	})
	r.Cancel(s, p.Request)
	m.Release()
	r.Until("it is settled", func() bool { return r.Outcomes(s, "ended") == 1 })
	r.NoMemory()
	if n := m.Begun(); n != 2 {
		t.Errorf("%d steps, the second had begun when the end came", n)
	}
}
