package hmm_test

import (
	"sync/atomic"
	"testing"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/hbm/protocol"

	"trireme.dev/services/hmm"
)

// TestLoaderGivesUpWhilePlacing has a loader hang up while memory is being given to it. The object can be made by others only when
// no memory is on its way to it any more: memory that was in use before is zeroed when it is given, and must not be zeroed under its
// next owner.
func TestLoaderGivesUpWhilePlacing(t *testing.T) {
	const large = 64 << 20
	d, socket := daemon(t, func(c *hmm.Config) { c.Weights = large })
	conn := raw(t, socket)
	send(t, conn, 1, protocol.OpHello, hello(protocol.Version))
	if _, err := answer(t, conn); err != nil {
		t.Fatal(err)
	}
	set := hbm.WeightSet{Key: hbm.Key{5}, Sizes: []int64{large}}
	send(t, conn, 2, protocol.OpWeights, protocol.Weights{Key: set.Key, Numbers: []int{0}, Sizes: set.Sizes, Most: large})
	send(t, conn, 3, protocol.OpBye, nil)
	var made atomic.Int64
	w, err := dial(t, socket, hbm.Hello{Instance: "next"}).OpenWeights(t.Context(), 0, set, writing(&made), nil)
	must(t, err)
	if made.Load() != 1 {
		t.Errorf("%d objects were made", made.Load())
	}
	checkWeights(t, w, set)
	if s := d.Stats(); len(s.Weights) != 1 || s.Weights[0].Holders != 1 || s.Weights[0].Objects != 1 {
		t.Errorf("sets are %+v", s.Weights)
	}
}
