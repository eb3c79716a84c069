package encoder_test

import (
	"slices"
	"testing"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/stagetest"
	"trireme.dev/shared/wire"
)

// Pictures whose encoders have died are encoded alone, the others around them; the one with too many strikes is not.
func TestStrikes(t *testing.T) {
	r := newRig(t, stagetest.Long)
	c := stagetest.Cases(t)[23] // ten pictures
	req, messages := r.request(&c)
	bad, its := r.request(&c)
	strike := func(part, n int) {
		r.Strike(hbm.Part{Request: req.ID, Attempt: 1, Stage: stage.Encode, Part: part, Left: req.Left}, n)
	}
	strike(2, 1)
	strike(3, 3)
	strike(7, 1)
	r.Strike(hbm.Part{Request: bad.ID, Attempt: 1, Stage: stage.Encode, Part: 5, Left: bad.Left}, stage.Quarantine)
	r.publish(messages...)
	r.publish(its[5])
	r.encoder()
	r.encoder()
	m := r.joined(req)
	for i, h := range m.MM {
		if !slices.Equal(r.embeddings(h), r.Model.Embed(r.Model.Picture(c.Images[i]), grid(c.Grids[i]))) {
			t.Errorf("picture %d is another", i)
		}
	}
	lost := r.gateway.Lost(1)
	if len(lost) != 1 || lost[0].Request != bad.ID || lost[0].Code != wire.CodeQuarantined || lost[0].Stage != stage.Encode {
		t.Errorf("lost: %+v", lost)
	}
	r.Done(req.ID, -1)
	r.Done(bad.ID, -1)
	r.NoMemory()
}
