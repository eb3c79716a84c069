package decoder_test

import (
	"testing"

	"trireme.dev/services/decoder"
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
