package decoder_test

import (
	"testing"

	"trireme.dev/services/decoder"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/kv"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/stagetest"
	"trireme.dev/shared/wire"
)

// Sequences whose decoders have died run alone until their next token, and get the answer that they get without deaths, as do those
// beside them; the one with too many strikes is not run.
func TestStrikes(t *testing.T) {
	r := newRig(t, stagetest.Long)
	spec := r.Model.Random(prompt(t, "case02"), 60, 1)
	var reqs []wire.Request
	for _, strikes := range []int{0, 1, 3, 0, stage.Quarantine, 1} {
		req := r.Request(r.gateway.ID)
		reqs = append(reqs, req)
		m := r.Prefilled(req, spec, 0)
		r.first(&m, spec)
		r.Strike(part(req, 0), strikes)
		r.Publish(stage.Decode, req.ID, &m)
	}
	r.decoder(decoder.Config{})
	for i, req := range reqs {
		if i == 4 {
			continue
		}
		r.same(spec, 0, r.gateway.Ended(req.ID, 0))
	}
	r.Empty(stage.Decode)
	lost := r.gateway.Lost(1)
	if len(lost) != 1 || lost[0].Request != reqs[4].ID || lost[0].Code != wire.CodeQuarantined || !lost[0].Final {
		t.Errorf("lost: %+v", lost)
	}
	for _, req := range reqs {
		r.Done(req.ID, -1)
	}
	r.NoMemory()
}

// A decoder that is killed in the middle of a step leaves a strike to those of the step that have no new token since it took them,
// and to nobody else; with a strike a sequence is alone in a step, so that the next such death strikes only it. All answers are those
// that they are without deaths.
func TestKilledInTheMiddleOfAStep(t *testing.T) {
	r := newRig(t, stagetest.Long)
	const sequences = 4
	spec := r.Model.Random(prompt(t, "case02"), 60, 1)
	var parts []hbm.Part
	var logs []mem.Handle
	for range sequences {
		req := r.Request(r.gateway.ID)
		m := r.Prefilled(req, spec, 0)
		r.first(&m, spec)
		r.Publish(stage.Decode, req.ID, &m)
		parts, logs = append(parts, part(req, 0)), append(logs, m.Log)
	}
	tokens := func(h mem.Handle) int {
		o := r.Attach(mem.ReadOnly, h)
		defer r.Free(o)
		log, err := kv.OpenLog(kv.Snapshot(o.Bytes()))
		if err != nil {
			t.Fatal(err)
		}
		return log.Committed()
	}
	strikes, had := make([]int, sequences), []int{1, 1, 1, 1}
	for round, at := range []stagetest.Middle{{Seqs: sequences, After: 5}, {Seqs: sequences}, {Seqs: 1}, {Seqs: 1}} {
		r.KillInTheMiddle(stage.Decode, at.Seqs, at)
		struck, alone := 0, false // how many have a strike more; one of them had some before
		for i, k := range r.Left(stage.Decode, parts...) {
			if h, ok := k.Log(); ok {
				logs[i] = h
			}
			n := tokens(logs[i])
			switch {
			case n > had[i]:
				strikes[i] = 0
			case at.Seqs == sequences || k.Strikes() > strikes[i]: // it was in the step
				struck++
				alone = alone || strikes[i] > 0
				strikes[i]++
			}
			had[i] = n
			if k.Strikes() != strikes[i] {
				t.Errorf("round %d: sequence %d has %d tokens and %d strikes, want %d", round, i, n, k.Strikes(), strikes[i])
			}
		}
		if (struck == 0) != (round == 0) || alone && struck > 1 {
			t.Errorf("round %d: %d sequences have a strike more, one that had some among them: %v", round, struck, alone)
		}
	}
	r.decoder(decoder.Config{})
	for _, p := range parts {
		r.same(spec, 0, r.gateway.Ended(p.Request, 0))
	}
	r.Empty(stage.Decode)
	for _, p := range parts {
		r.Done(p.Request, -1)
	}
	r.gateway.NothingLost()
	r.NoMemory()
}
