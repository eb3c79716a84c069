package prefill_test

import (
	"context"
	"slices"
	"testing"
	"time"

	"trireme.dev/services/prefill"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/stagetest"
	"trireme.dev/shared/wire"
)

// What is missing or damaged loses the attempt; what no attempt could serve is final. Nothing is left of either.
func TestFaults(t *testing.T) {
	r := newRig(t, stagetest.Long)
	s, _ := r.prefill(prefill.Config{})
	cases := stagetest.Cases(t)
	n := 0
	for name, x := range map[string]struct {
		final bool
		make  func(*wire.Prefill, *wire.Spec, [][]float32)
	}{
		"damaged picture": {false, func(m *wire.Prefill, _ *wire.Spec, mm [][]float32) {
			m.MM[0] = r.Spoiled(m.Request, mem.KindMM, stagetest.Bytes(mm[0]))
		}},
		"another picture": {false, func(m *wire.Prefill, _ *wire.Spec, mm [][]float32) {
			m.MM[0] = r.Put(m.Request, mem.KindMM, stagetest.Bytes(mm[0][:512]))
		}},
		"picture left out": {false, func(m *wire.Prefill, _ *wire.Spec, _ [][]float32) { m.MM[0] = mem.Handle{} }},
		"picture freed":    {false, func(m *wire.Prefill, _ *wire.Spec, _ [][]float32) { m.MM[0].Generation-- }},
		"no handle":        {false, func(m *wire.Prefill, _ *wire.Spec, _ [][]float32) { m.MM = nil }},
		"spec freed":       {false, func(m *wire.Prefill, _ *wire.Spec, _ [][]float32) { m.Spec = &mem.Handle{Node: "n", Object: 99} }},
		"another model":    {true, func(_ *wire.Prefill, s *wire.Spec, _ [][]float32) { s.Model[31] ^= 1 }},
		"too long":         {true, func(_ *wire.Prefill, s *wire.Spec, _ [][]float32) { s.Sampling.MaxTokens = 8192 }},
		"no prompt":        {true, func(_ *wire.Prefill, s *wire.Spec, _ [][]float32) { s.Prompt = nil }},
		"id out of range":  {true, func(_ *wire.Prefill, s *wire.Spec, _ [][]float32) { s.Prompt[3] = 1024 }},
		"resume too long":  {true, func(_ *wire.Prefill, s *wire.Spec, _ [][]float32) { s.Resume = [][]int32{make([]int32, 321)} }},
		"picture too many": {true, func(_ *wire.Prefill, s *wire.Spec, _ [][]float32) { s.Prompt[s.Pictures[0].Offset] = 5 }},
	} {
		n++
		m := &wire.Prefill{Request: r.Request(r.gateway.ID)}
		spec, mm := r.Model.Spec(&cases[3])
		spec.Prompt = slices.Clone(spec.Prompt)
		m.MM = []mem.Handle{r.Put(m.Request, mem.KindMM, stagetest.Bytes(mm[0]))}
		x.make(m, spec, mm)
		if m.Spec == nil {
			m.Inline, m.Spec = r.Spec(m.Request, spec)
		}
		r.publish(m)
		lost := r.gateway.Lost(n)[n-1]
		if lost.Request != m.Request.ID || lost.Final != x.final || lost.Status != 500 || lost.Why == "" {
			t.Errorf("%s: %+v", name, lost)
		}
		r.Done(m.Request.ID, -1)
	}
	r.Empty(stage.Prefill)
	if waiting, _ := r.Queue(stage.Decode); waiting != 0 || r.Outcomes(s, "lost") != n {
		t.Errorf("%d decode messages, %d attempts lost of %d", waiting, r.Outcomes(s, "lost"), n)
	}
	r.NoMemory()
}

// A spec too large for a message comes by handle and reaches the decode message by handle.
func TestSpecByHandle(t *testing.T) {
	r := newRig(t, stagetest.Long)
	r.prefill(prefill.Config{})
	spec := r.Model.Greedy(slices.Repeat(stagetest.Cases(t)[1].Input, 40), 5) // 1120 tokens
	for id := range int32(4000) {
		spec.Sampling.Stop = append(spec.Sampling.Stop, 1<<20+id) // none of the vocabulary
	}
	m := r.start(spec)
	if m.Spec == nil || m.Inline != nil {
		t.Fatal("the spec is not too large for a message")
	}
	d := r.decodes(1)[m.Request.ID+"/0"]
	if d.Spec == nil || d.Spec.Object != m.Spec.Object || d.Inline != nil {
		t.Errorf("decode message %+v", d)
	}
	got := r.open(d)
	r.sameKV("by handle", got.blocks, r.Model.Prompt(spec))
	if id, want := r.token(got.log, 0), r.Model.Answer(spec, 0).IDs[0]; id != want {
		t.Errorf("first token %d, alone %d", id, want)
	}
	r.gateway.NothingLost()
}

// A message that comes again after its decode messages were published does no harm: they are there once.
func TestRedeliveryPublishesOnce(t *testing.T) {
	r := newRig(t, stagetest.Long)
	s, _ := r.prefill(prefill.Config{})
	c := stagetest.Cases(t)[2]
	spec := r.Model.Random(c.Input, 20, 2)
	m := r.start(spec)
	r.Until("it is computed", func() bool { return r.Outcomes(s, "done") == 1 })
	r.publish(m)
	r.Until("it is computed again", func() bool { return r.Outcomes(s, "done") == 2 })
	if waiting, _ := r.Queue(stage.Decode); waiting != 2 {
		t.Errorf("%d decode messages for two choices", waiting)
	}
	for choice := range 2 {
		a := r.gateway.Until("both first tokens", m.Request.ID, choice, func(a *stagetest.Answer) bool { return len(a.Runs) == 2 })
		if want := r.Model.Answer(spec, choice).IDs[:1]; !slices.Equal(a.IDs, want) {
			t.Errorf("choice %d begins with %v, alone %v", choice, a.IDs, want)
		}
	}
	r.Pull(stage.Decode, 2)
	r.Empty(stage.Prefill)
	r.Done(m.Request.ID, -1)
	r.NoMemory()
}

// long is a request that takes a prefill of one row a batch a while.
func (r *rig) long() *wire.Spec {
	c := stagetest.Cases(r.T)[1]
	return r.Model.Greedy(slices.Repeat(c.Input, 30), 5)
}

// A request that ends while it waits, or is computed, leaves at once; others are not disturbed.
func TestDoneLeavesAtOnce(t *testing.T) {
	r := newRig(t, stagetest.Long)
	s, m := r.metered(prefill.Config{Rows: 1})
	m.Hold(3)
	computed := r.start(r.long())
	queued := r.start(r.long())
	m.Await()
	r.Until("both are in work", func() bool { return r.Stats().Claims == 2 && r.Stats().Objects >= 8 })
	short := r.start(r.Model.Greedy(stagetest.Cases(t)[0].Input, 3))
	r.Cancel(s, queued.Request, computed.Request)
	m.Release()
	if d := r.decodes(1); d[short.Request.ID+"/0"] == nil {
		t.Errorf("decode messages %v", d)
	}
	r.Until("they are settled", func() bool { return r.Outcomes(s, "ended") == 2 && r.Outcomes(s, "done") == 1 })
	early := &wire.Prefill{Request: r.Request(r.gateway.ID)} // ends before its message comes
	early.Inline, _ = r.Spec(early.Request, r.long())
	r.Done(early.Request.ID, -1)
	r.Until("the stage knows", func() bool { return s.Ended(early.Request, -1) })
	r.publish(early)
	r.Until("it is settled", func() bool { return r.Outcomes(s, "ended") == 3 })
	r.Empty(stage.Prefill)
	if waiting, _ := r.Queue(stage.Decode); waiting != 0 {
		t.Errorf("%d decode messages of ended requests", waiting)
	}
	r.Done(short.Request.ID, -1)
	r.NoMemory()
}

// A prefill that is told to stop hands its requests back, one that is killed is succeeded; what they have computed is
// freed at once.
func TestSuccession(t *testing.T) {
	r := newRig(t, stagetest.Long)
	r.Stage.Drain = -1 // not even what is short is finished
	m := r.start(r.long())
	r.KillInTheMiddle(stage.Prefill, 1, stagetest.Middle{Seqs: 1, After: 20})
	r.Until("its memory is freed", func() bool { return r.Stats().Objects == 0 })

	var meter *stagetest.Meter
	s, stop := r.Open(stage.Prefill, func(ctx context.Context, s *stage.Stage) error {
		meter = r.Meter(s)
		meter.Hold(3)
		return prefill.Serve(ctx, s, prefill.Config{Rows: 1})
	})
	meter.Await()
	stopped := make(chan struct{})
	go func() { stop(); close(stopped) }()
	for waits := true; waits; {
		select {
		case <-stopped:
			waits = false
		case <-time.After(10 * time.Millisecond):
			meter.Hold(meter.Begun()) // one more step: all of them would take seconds
		}
	}
	if n := r.Outcomes(s, "handed back"); n != 1 {
		t.Errorf("%d messages handed back", n)
	}
	_, _ = r.prefill(prefill.Config{})
	d := r.decodes(1)[m.Request.ID+"/0"]
	r.sameKV("after two successions", r.open(d).blocks, r.Model.Prompt(r.long()))
	r.Empty(stage.Prefill)
	r.gateway.NothingLost()
}

// A prefill whose claim was taken publishes nothing.
func TestFencedPrefillPublishesNothing(t *testing.T) {
	r := newRig(t, stagetest.Short)
	s, meter := r.metered(prefill.Config{Rows: 1})
	meter.Hold(3)
	m := r.start(r.long())
	meter.Await()
	if _, err := r.HBM.Claim(t.Context(), part(m.Request), "nowhere"); err != nil {
		t.Fatal(err)
	}
	meter.Release()
	r.Until("it has noticed", func() bool { return r.Outcomes(s, "taken over") == 1 })
	waiting, _ := r.Queue(stage.Decode)
	if _, taken := r.Queue(stage.Prefill); taken != 1 || waiting != 0 || len(r.gateway.Answer(m.Request.ID, 0).Runs) != 0 {
		t.Errorf("a fenced prefill went on: %d messages in work, %d decode messages", taken, waiting)
	}
	r.decodes(1) // after AckWait it comes again
	r.Empty(stage.Prefill)
}
