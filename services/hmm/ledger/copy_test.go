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
