package hmm_test

import (
	"errors"
	"sync/atomic"
	"testing"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"

	"trireme.dev/services/hmm"
)

// TestLoaderGivesUpWhilePlacing has a loader close its set while memory is being given to it, as one does whose context
// ends. The set is closed, and can be made by others, only when no memory is on its way to it any more: memory that was in
// use before is zeroed when it is given, and must not be zeroed under its next owner.
func TestLoaderGivesUpWhilePlacing(t *testing.T) {
	const large = 64 << 20
	d, socket := daemon(t, func(c *hmm.Config) { c.Weights = large })
	conn := raw(t, socket)
	send(t, conn, 1, protocol.OpHello, hello(protocol.Version))
	if _, err := answer(t, conn); err != nil {
		t.Fatal(err)
	}
	set := hbm.WeightSet{Key: hbm.Key{5}, Sizes: []int64{large}}
	send(t, conn, 2, protocol.OpOpenWeights, protocol.OpenWeights{Key: set.Key, Objects: 1, Bytes: large})
	payload, err := protocol.ReadFrame(conn)
	must(t, err)
	_, body, failure, err := protocol.ParseReply(payload)
	must(t, errors.Join(failure, err))
	var opened protocol.OpenedWeights
	must(t, protocol.Decode(body, &opened))

	place, err := protocol.Request(3, protocol.OpPlaceWeights, protocol.PlaceWeights{Set: opened.Set, Sizes: set.Sizes})
	must(t, err)
	closing, err := protocol.Request(4, protocol.OpCloseWeights, protocol.CloseWeights{Set: opened.Set})
	must(t, err)
	sealing, err := protocol.Request(5, protocol.OpSealWeights, protocol.SealWeights{Set: opened.Set, CRCs: []uint32{1}})
	must(t, err)
	_, err = conn.Write(append(append(place, closing...), sealing...))
	must(t, err)
	for _, want := range []uint64{3, 4, 5} {
		id, err := answer(t, conn)
		if id != want {
			t.Errorf("request %d was answered before %d", id, want)
		}
		if want == 5 {
			wantErr(t, err, mem.ErrInvalid) // it is closed
		} else if err != nil {
			t.Errorf("request %d: %v", want, err)
		}
	}
	if s := d.Stats(); len(s.Weights) != 1 || s.Weights[0].Holders != 0 {
		t.Errorf("sets are %+v", s.Weights)
	}
	var made atomic.Int64
	w, err := dial(t, socket, hbm.Hello{Instance: "next"}).OpenWeights(t.Context(), 0, set, writing(&made), nil)
	must(t, err)
	if made.Load() != 1 {
		t.Errorf("%d objects were made", made.Load())
	}
	checkWeights(t, w, set)
}
