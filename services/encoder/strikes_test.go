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

// An encoder that is killed in the middle of a picture leaves it no strike the first time, as it got somewhere, and one each time that
// the next gets no further. It is encoded in the end, as it is without deaths.
func TestKilledInTheMiddleOfAPicture(t *testing.T) {
	r := newRig(t, stagetest.Long)
	c := stagetest.Cases(t)[3]
	req, messages := r.request(&c)
	r.publish(messages...)
	part := hbm.Part{Request: req.ID, Attempt: 1, Stage: stage.Encode, Left: req.Left}
	for round, x := range []struct{ piece, strikes int }{{3, 0}, {3, 1}, {2, 2}, {4, 0}, {4, 1}} {
		r.KillInTheMiddle(stage.Encode, 1, stagetest.Middle{Piece: x.piece})
		if n := r.Left(stage.Encode, part)[0].Strikes(); n != x.strikes {
			t.Errorf("round %d, in piece %d: %d strikes, want %d", round, x.piece, n, x.strikes)
		}
	}
	r.encoder()
	m := r.joined(req)
	if len(m.MM) != 1 || !slices.Equal(r.embeddings(m.MM[0]), r.Model.Embed(r.Model.Picture(c.Images[0]), grid(c.Grids[0]))) {
		t.Error("the picture is another")
	}
	r.Done(req.ID, -1)
	r.gateway.NothingLost()
	r.NoMemory()
}
