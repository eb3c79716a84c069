package ledger_test

import (
	"testing"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"

	"trireme.dev/services/hmm/ledger"
)

// What a client has in use is its NPUs' memory and the weights that it holds in their domains, each once, and the most is remembered until it
// is asked anew.
func TestUse(t *testing.T) {
	cfg := config()
	cfg.Spaces, cfg.Weights = []int64{40 * page, 1000 * page, 1000 * page}, weightsRoom
	cfg.NPUs[1].Space = 2
	l := ledger.New(cfg)
	connect := func(npus ...int) ledger.Conn {
		t.Helper()
		c, _, err := l.Connect(start, protocol.Hello{Instance: "i", Role: "decode", Want: npus})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	a, b := connect(0), connect(1)
	want := func(c ledger.Conn, now, most int64) {
		t.Helper()
		if u := l.Use(c, false); u.Now != now*page || u.Most != most*page {
			t.Errorf("%d pages in use and %d at most, want %d and %d", u.Now/page, u.Most/page, now, most)
		}
	}
	weights := func(c ledger.Conn, npu int, numbers ...int) (objects []protocol.Object) {
		t.Helper()
		v := protocol.Weights{Key: protocol.Key{1}, NPU: npu, Numbers: numbers, Most: 100 * page}
		for _, n := range numbers {
			v.Sizes = append(v.Sizes, plans[v.Key][n])
		}
		placed, _, err := l.Weights(c, v)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range placed {
			objects = append(objects, name(p.Grant.Handle))
			if p.State == protocol.PlacedMake {
				if err := l.SealWeights(c, []protocol.Sealing{{Object: name(p.Grant.Handle)}}); err != nil {
					t.Fatal(err)
				}
			}
		}
		return objects
	}
	free := func(c ledger.Conn, objects ...protocol.Object) {
		t.Helper()
		if err := l.Free(c, objects); err != nil {
			t.Fatal(err)
		}
	}
	grants, err := l.Alloc(start, a, []protocol.Spec{{Kind: mem.KindKV, NPU: 0, Bytes: page + 1}, {Kind: mem.KindKV, NPU: mem.HostNPU, Bytes: page}})
	if err != nil {
		t.Fatal(err)
	}
	want(a, 2, 2) // host memory is none of an NPU
	first := weights(a, 0, 0, 3)
	want(a, 6, 6)
	again := weights(a, 0, 3)
	want(a, 6, 6)
	free(a, again...)
	want(a, 6, 6) // it is held once more
	free(a, first[1])
	want(a, 3, 6) // it rests
	if u := l.Use(a, true); u.Now != 3*page || u.Most != 6*page {
		t.Errorf("%+v", u)
	}
	want(a, 3, 3)
	weights(b, 1, 0) // it comes with a hold on the source, in a's domain
	want(b, 1, 1)
	want(a, 3, 3)
	free(a, name(grants[0].Handle), first[0])
	want(a, 0, 3)
	if err := l.Part(start, a, protocol.Parting{NPUs: []int{0}}); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Join(start, b, protocol.Join{Want: []int{0}}); err != nil {
		t.Fatal(err)
	}
	want(b, 2, 2) // now the source is in a domain of its own
}

// A weight is copied from where somebody uses it, rather than from where it only rests.
func TestSourceInUse(t *testing.T) {
	cfg := config()
	cfg.Spaces, cfg.Weights = []int64{40 * page, 100 * page, 100 * page, 100 * page}, weightsRoom
	cfg.NPUs = []ledger.NPU{{Bytes: page, Space: 1}, {Bytes: page, Space: 2}, {Bytes: page, Space: 3}}
	for _, rests := range []int{0, 1} {
		l := ledger.New(cfg)
		c, _, err := l.Connect(start, protocol.Hello{Instance: "i", Role: "decode", NPUs: 3})
		if err != nil {
			t.Fatal(err)
		}
		var from *protocol.Grant
		for npu := range 3 {
			placed, _, err := l.Weights(c, protocol.Weights{Key: protocol.Key{1}, NPU: npu, Numbers: []int{0}, Sizes: []int64{page}, Most: page})
			if err != nil || len(placed) != 1 || placed[0].State != protocol.PlacedMake {
				t.Fatalf("%+v, %v", placed, err)
			}
			if from = placed[0].Source; npu == 2 {
				break
			}
			if err := l.SealWeights(c, []protocol.Sealing{{Object: name(placed[0].Grant.Handle)}}); err != nil {
				t.Fatal(err)
			}
			if npu == 0 {
				continue
			}
			holds := []protocol.Object{name(from.Handle), name(from.Handle)} // the one that it came with, and the first one's
			if rests == 1 {
				holds[1] = name(placed[0].Grant.Handle)
			}
			if err := l.Free(c, holds); err != nil {
				t.Fatal(err)
			}
		}
		if want := 2 - rests; from == nil || from.Extent.Space != want {
			t.Errorf("with the one in domain %d at rest the source is %+v, want that in domain %d", rests+1, from, want)
		}
	}
}
