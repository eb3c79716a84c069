package ledger_test

import (
	"testing"
	"time"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"

	"trireme.dev/services/hmm/ledger"
)

// apart is a ledger whose two NPUs are a memory domain each.
func apart() *ledger.Ledger {
	cfg := config()
	cfg.Spaces = []int64{40 * page, 40 * page, 40 * page}
	cfg.NPUs[1].Space = 2
	return ledger.New(cfg)
}

func object(g protocol.Grant) protocol.Object {
	return protocol.Object{ID: g.Handle.Object, Generation: g.Handle.Generation}
}

func TestCopies(t *testing.T) {
	l := apart()
	a, b := connect(t, l, "a"), connect(t, l, "b")
	on := func(npu int) protocol.Spec { return protocol.Spec{Kind: mem.KindMM, NPU: npu, Bytes: page} }
	alloc := func(c ledger.Conn, specs ...protocol.Spec) []protocol.Grant {
		t.Helper()
		g, err := l.Alloc(start, c, specs)
		must(t, err)
		return g
	}
	attach := func(c ledger.Conn, h mem.Handle) protocol.Grant {
		t.Helper()
		g, err := l.Attach(c, protocol.Attach{Access: mem.ReadOnly, NPU: 1, Handles: []mem.Handle{h}})
		must(t, err)
		return g[0]
	}
	source := alloc(a, on(0))[0]
	sealed, err := l.Seal(start, a, protocol.Seal{Ref: ref("r", 1, 30*time.Second), Items: []protocol.Sealing{{Object: object(source), CRC: 7}}})
	must(t, err)
	far := attach(b, sealed[0])
	if far.Extent != source.Extent || far.Handle.NPU != 0 {
		t.Errorf("an object of another domain was booked or moved: %+v", far)
	}
	large := on(1)
	large.Bytes = 2 * page
	to, wrong := alloc(b, on(1))[0], alloc(b, large, kv(protocol.Ref{}))
	foreign := alloc(a, on(1))[0]
	for name, pairs := range map[string][]protocol.Copy{
		"larger":              {{Source: object(far), Copy: object(wrong[0])}},
		"of another kind":     {{Source: object(far), Copy: object(wrong[1])}},
		"another client's":    {{Source: object(far), Copy: object(foreign)}},
		"of what is not held": {{Source: object(foreign), Copy: object(to)}},
		"twice":               {{Source: object(far), Copy: object(to)}, {Source: object(far), Copy: object(to)}},
		"onto itself":         {{Source: object(far), Copy: object(far)}},
	} {
		_, err := l.Copied(b, pairs)
		if err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if n := l.Stats().Copied; n != 0 {
		t.Errorf("%d bytes copied by calls that were refused", n)
	}
	copied, err := l.Copied(b, []protocol.Copy{{Source: object(far), Copy: object(to)}})
	must(t, err)
	if !copied[0].Sealed || copied[0].CRC != 7 || copied[0].Object != to.Handle.Object || l.Stats().Copied != page {
		t.Errorf("the copy is %+v", copied[0])
	}
	if g := attach(a, copied[0]); g.Extent != to.Extent { // its new name is good
		t.Errorf("the copy is at %v, not %v", g.Extent, to.Extent)
	}
	if g := attach(a, sealed[0]); g.Extent != to.Extent {
		t.Errorf("the copy at %v is not used, but %v", to.Extent, g.Extent)
	}
	must(t, l.Free(a, []protocol.Object{object(to), object(to)}))
	// A copy that is found to be wrong is nobody else's, a freed one neither.
	must(t, l.Forget(b, []protocol.Object{object(to)}))
	if g := attach(a, sealed[0]); g.Extent != source.Extent {
		t.Errorf("a wrong copy is still given out: %v", g.Extent)
	}
	next := alloc(b, on(1))[0]
	_, err = l.Copied(b, []protocol.Copy{{Source: object(far), Copy: object(next)}})
	must(t, err)
	must(t, l.Free(b, []protocol.Object{object(next)}))
	if g := attach(a, sealed[0]); g.Extent != source.Extent {
		t.Errorf("a freed copy is still given out: %v", g.Extent)
	}
}

// A request's KV leaves a memory domain with the last of its token logs there, and no sooner.
func TestKVLeavesADomainWithTheLastLog(t *testing.T) {
	l := apart()
	p, d := connect(t, l, "p"), connect(t, l, "d")
	r := ref("r", 1, 30*time.Second)
	log := func(npu int) protocol.Spec { return protocol.Spec{Kind: mem.KindLog, NPU: npu, Bytes: page, Ref: r} }
	mm := protocol.Spec{Kind: mem.KindMM, NPU: 0, Bytes: page, Ref: r}
	there, err := l.Alloc(start, p, []protocol.Spec{log(0), log(0), kv(r), kv(r), mm})
	must(t, err)
	for _, g := range there {
		must(t, l.Free(p, []protocol.Object{object(g)}))
	}
	inherit := func(part, npu int, from protocol.Grant) protocol.Grant {
		t.Helper()
		spec := log(npu)
		spec.Ref = protocol.Ref{}
		here, err := l.Alloc(start, d, []protocol.Spec{spec})
		must(t, err)
		who := protocol.Part{Request: "r", Attempt: 1, Stage: "decode", Part: part, Left: r.Left}
		claimed, err := l.Claim(start, d, protocol.Claim{Part: who})
		must(t, err)
		must(t, l.Inherit(start, d, protocol.Inherit{
			Part: who, Generation: claimed.Generation, Keep: []protocol.Object{object(here[0])}, Drop: []protocol.Object{object(from)},
		}))
		return here[0]
	}
	used := func(npu int, kind mem.Kind) int64 { return l.Stats().Memory[npu+1].Kinds[kind.String()].Used / page }
	check := func(when string, logs, slabs int64) {
		t.Helper()
		if a, b, c := used(0, mem.KindLog), used(0, mem.KindKV), used(0, mem.KindMM); a != logs || b != slabs || c != 1 {
			t.Errorf("%s: %d logs, %d slabs and %d MM objects are left, want %d, %d and 1", when, a, b, c, logs, slabs)
		}
	}
	next := inherit(0, 1, there[0])
	check("the first has left", 1, 2)
	same := inherit(1, 0, there[1])
	check("the second goes on where it is", 1, 2)
	inherit(1, 1, same)
	must(t, l.Free(d, []protocol.Object{object(same)}))
	check("the second has left", 0, 0)
	inherit(0, 1, next)
	if n := used(1, mem.KindLog); n != 3 { // next has the decoder's own hold still
		t.Errorf("%d logs in the domain of the decoder, want 3", n)
	}
}
