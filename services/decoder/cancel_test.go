package decoder_test

import (
	"context"
	"log/slog"
	"testing"

	"github.com/nats-io/nats.go"

	"trireme.dev/services/decoder"
	"trireme.dev/services/hmm"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/stagetest"
	"trireme.dev/shared/wire"
)

// metered starts a decoder that counts its steps.
func (r *rig) metered(cfg decoder.Config) (*stage.Stage, *stagetest.Meter) {
	r.Helper()
	var m *stagetest.Meter
	s, _ := r.Open(stage.Decode, func(ctx context.Context, s *stage.Stage) error {
		m = r.Meter(s)
		return decoder.Serve(ctx, s, cfg)
	})
	return s, m
}

// A cancelled request is decoded no further than the step that has begun, whether its sequences have a part in that, are being
// attached, or are still on the queue; all its memory is free.
func TestCancelStopsAtTheStep(t *testing.T) {
	r := newRig(t, stagetest.Long)
	s, m := r.metered(decoder.Config{Slots: 4})
	spec := r.Model.Random(prompt(t, "case02"), 4000, 2)
	m.Hold(5)
	requests := []wire.Request{r.start(spec)}
	m.Await()
	for range 2 { // with the first one's two choices, one more than there are places for
		requests = append(requests, r.start(spec))
	}
	r.Until("four are in work", func() bool { return r.Stats().Claims == 4 })
	r.Cancel(s, requests...)
	m.Release()
	r.Until("all are settled", func() bool { return r.Outcomes(s, "ended") == 6 })
	r.Empty(stage.Decode)
	r.NoMemory()
	if n := m.Begun(); n != 6 {
		t.Errorf("%d steps, the sixth had begun when the end came", n)
	}
	r.gateway.NothingLost()
}

// The end of one choice stops that one, and the other goes on undisturbed.
func TestCancelOfAChoice(t *testing.T) {
	r := newRig(t, stagetest.Long)
	s, m := r.metered(decoder.Config{})
	spec := r.Model.Random(prompt(t, "case02"), 60, 2)
	m.Hold(5)
	req := r.start(spec)
	m.Await()
	r.Until("both are in work", func() bool { return r.Stats().Claims == 2 })
	r.Done(req.ID, 0)
	r.Heard(s)
	m.Release()
	r.same(spec, 1, r.gateway.Ended(req.ID, 1))
	r.Until("both are settled", func() bool { return r.Outcomes(s, "ended") == 1 && r.Outcomes(s, "done") == 1 })
	if n := len(r.gateway.Answer(req.ID, 0).IDs); n > 1+6 {
		t.Errorf("%d tokens of the choice that had ended, after the first one and six steps that had begun", n)
	}
	r.end(req)
	r.NoMemory()
}

// Sequences that wait are let go, too: parked ones, whose gateway has not confirmed, and one at its end.
func TestCancelOfWaitingSequences(t *testing.T) {
	r := newRig(t, stagetest.Long)
	s, m := r.metered(decoder.Config{})
	r.deaf(true)
	parked, end := r.start(r.Model.Greedy(prompt(t, "case02"), 4000)), r.start(r.Model.Greedy(prompt(t, "case01"), 20))
	r.gateway.Tokens(parked.ID, 0, 256)
	r.gateway.Until("the end is to be confirmed", end.ID, 0, func(a *stagetest.Answer) bool { return a.Confirms > 0 })
	begun := m.Begun()
	r.Cancel(s, parked, end)
	r.Until("both are settled", func() bool { return r.Outcomes(s, "ended") == 2 })
	r.Empty(stage.Decode)
	r.NoMemory()
	if n := m.Begun(); n != begun {
		t.Errorf("%d steps after the end", n-begun)
	}
}

// A sequence that waits for room on its NPU, and the one that has it, are let go.
func TestCancelOfThoseShortOfMemory(t *testing.T) {
	r := &rig{Rig: stagetest.New(t, func(ctx context.Context, socket string, conn *nats.Conn, log *slog.Logger) error {
		cfg := hmm.Config{Socket: socket, Node: "n", NPUs: 2, NPUBytes: 2 << 20, HostBytes: 16 << 20, NATS: conn, KVCache: -1}
		return hmm.Run(ctx, cfg, log)
	}, stagetest.Long), T: t}
	r.gateway = r.Gateway()
	s, _ := r.metered(decoder.Config{})
	req := r.start(r.Model.Greedy(prompt(t, "case02"), 4000)) // 12 MiB of KV
	r.gateway.Until("there is no room to go on", req.ID, 0, func(a *stagetest.Answer) bool { return len(a.IDs) > 100 && r.Stats().Objects >= 3 })
	r.Cancel(s, req)
	r.Until("it is settled", func() bool { return r.Outcomes(s, "ended") == 1 })
	r.Empty(stage.Decode)
	r.NoMemory()
}
