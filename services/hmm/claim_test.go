package hmm_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/wire"

	"trireme.dev/services/hmm"
)

func decodePart(request string, attempt, choice int) hbm.Part {
	return hbm.Part{Request: request, Attempt: attempt, Stage: "decode", Part: choice}
}

func claim(t testing.TB, c *hbm.Client, p hbm.Part, reply string) *hbm.Claim {
	t.Helper()
	k, err := c.Claim(t.Context(), p, reply)
	must(t, err)
	return k
}

func TestClaims(t *testing.T) {
	d, socket := daemon(t)
	a, b := dial(t, socket, hbm.Hello{Instance: "a"}), dial(t, socket, hbm.Hello{Instance: "b"})
	first := claim(t, a, decodePart("r", 1, 0), "ack.1")
	beside := claim(t, a, decodePart("r", 1, 1), "ack.2")
	if !first.Held() || !beside.Held() || first.Generation() >= beside.Generation() {
		t.Fatal("fresh claims are not held, or generations do not rise")
	}
	second := claim(t, b, decodePart("r", 1, 0), "ack.3")
	if first.Held() || !second.Held() || !beside.Held() {
		t.Error("a later claim does not fence the earlier one alone")
	}
	wantErr(t, a.Unclaim(t.Context(), first), mem.ErrFenced) // and must not touch the successor's
	if !second.Held() {
		t.Error("a fenced claimant took its successor's claim away")
	}
	must(t, b.Unclaim(t.Context(), second))
	if second.Held() {
		t.Error("a claim given up is held")
	}
	wantErr(t, a.Unclaim(t.Context(), first), mem.ErrFenced) // still: it was taken over, though given up since
	third := claim(t, a, decodePart("r", 1, 0), "ack.4")
	if first.Held() || second.Held() || third.Generation() <= second.Generation() {
		t.Error("a slot used again makes an old claim look held")
	}

	// A newer attempt fences all claims of the older, whatever they are for.
	newer := claim(t, b, hbm.Part{Request: "r", Attempt: 2, Stage: "encode", Part: 3}, "ack.5")
	if third.Held() || beside.Held() || !newer.Held() {
		t.Error("a newer attempt does not fence the older")
	}
	_, err := a.Claim(t.Context(), decodePart("r", 1, 0), "ack.6")
	wantErr(t, err, mem.ErrEnded)
	wantErr(t, a.Unclaim(t.Context(), third), mem.ErrEnded) // nobody waits for the older attempt

	must(t, d.End("r"))
	if newer.Held() {
		t.Error("the claim of an ended request is held")
	}
	wantErr(t, b.Unclaim(t.Context(), newer), mem.ErrEnded)
	_, err = a.Claim(t.Context(), decodePart("r", 3, 0), "ack.7")
	wantErr(t, err, mem.ErrEnded)
	for _, bad := range []hbm.Part{{Attempt: 1, Stage: "decode"}, {Request: "q", Attempt: 1}, {Request: "q", Stage: "x", Part: -1}} {
		_, err := a.Claim(t.Context(), bad, "")
		wantErr(t, err, mem.ErrInvalid)
	}
	empty(t, d)
}

// The log of a part's last writer is told to whoever claims the part, and outlives writers, until the request or the attempt
// ends. What it drops is free once the writer before has let go of it.
func TestInherit(t *testing.T) {
	d, socket := daemon(t)
	a, b := dial(t, socket, hbm.Hello{Instance: "a", NPUs: 1}), dial(t, socket, hbm.Hello{Instance: "b", NPUs: 1})
	sequence := func(c *hbm.Client) []*hbm.Object {
		t.Helper()
		objs, err := c.Alloc(t.Context(), hbm.Spec{Kind: mem.KindLog, NPU: c.NPUs()[0], Bytes: 100}, hbm.Spec{Kind: mem.KindKV, NPU: c.NPUs()[0], Bytes: 1000})
		must(t, err)
		return objs
	}
	tells := func(k *hbm.Claim, want *hbm.Object) {
		t.Helper()
		h, ok := k.Log()
		if ok != (want != nil) || ok && (h.Object != want.Handle().Object || h.Generation != want.Handle().Generation) {
			t.Errorf("the claim tells the log %+v, %v", h, ok)
		}
	}
	first := claim(t, a, decodePart("r", 1, 0), "ack.0")
	tells(first, nil)
	of := sequence(a)
	must(t, a.Inherit(t.Context(), first, of[0], of[1:], nil))

	second := claim(t, b, decodePart("r", 1, 0), "ack.1")
	tells(second, of[0])
	wantErr(t, a.Inherit(t.Context(), first, of[0], nil, nil), mem.ErrFenced)
	old, err := b.Attach(t.Context(), mem.ReadOnly, -1, of[0].Handle(), of[1].Handle())
	must(t, err)
	next := sequence(b)
	drop := []mem.Handle{old[0].Handle(), old[1].Handle()}
	wantErr(t, b.Inherit(t.Context(), second, next[1], nil, drop), mem.ErrInvalid) // no log
	third := claim(t, b, decodePart("r", 1, 0), "ack.2")
	tells(third, of[0]) // nothing has changed so far
	must(t, b.Inherit(t.Context(), third, next[0], next[1:], drop))
	must(t, b.Free(t.Context(), old...))
	if s := d.Stats(); s.Objects != 4 {
		t.Errorf("%d objects while the first writer has its own mapped, want 4", s.Objects)
	}
	must(t, a.Free(t.Context(), of...))
	must(t, b.Unclaim(t.Context(), third))
	must(t, b.Free(t.Context(), next...))
	if s := d.Stats(); s.Objects != 2 {
		t.Errorf("%d objects, want the log and the slab of the second writer", s.Objects)
	}
	tells(claim(t, a, decodePart("r", 1, 0), "ack.3"), next[0])
	tells(claim(t, a, decodePart("r", 1, 1), "ack.4"), nil)
	tells(claim(t, a, decodePart("r", 2, 0), "ack.5"), nil)
	must(t, d.End("r"))
	empty(t, d)
}

func TestOrphans(t *testing.T) {
	gone := make(chan wire.Gone, 2)
	d, socket := daemon(t, func(c *hmm.Config) { c.OnGone = func(g wire.Gone) { gone <- g } })
	a, b := dial(t, socket, hbm.Hello{Instance: "a", Role: "decode"}), dial(t, socket, hbm.Hello{Instance: "b", Role: "decode"})
	k0 := claim(t, a, decodePart("r", 1, 0), "ack.0")
	k1 := claim(t, a, decodePart("r", 1, 1), "ack.1")
	claim(t, a, decodePart("r", 1, 2), "ack.1b")
	claim(t, a, hbm.Part{Request: "r", Attempt: 1, Stage: "prefill"}, "ack.2")
	claim(t, b, decodePart("q", 1, 0), "ack.3")
	must(t, a.Close())
	if g := <-gone; g != (wire.Gone{Node: "n1", Instance: "a", Role: "decode"}) {
		t.Errorf("gone: %+v", g)
	}
	if k0.Held() {
		t.Error("a claim is held after its client was closed")
	}
	claim(t, b, decodePart("r", 1, 2), "ack.4") // redelivered before anybody asked
	got, err := b.Orphans(t.Context(), "decode")
	must(t, err)
	if diff := cmp.Diff([]hbm.Orphan{
		{Part: decodePart("r", 1, 0), Generation: k0.Generation(), Reply: "ack.0"},
		{Part: decodePart("r", 1, 1), Generation: k1.Generation(), Reply: "ack.1"},
	}, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if s := d.Stats(); s.Orphans != 1 || s.Claims != 3 { // prefill's orphan, and b's two claims
		t.Errorf("%d orphans of %d claims", s.Orphans, s.Claims)
	}
	if got, err = b.Orphans(t.Context(), "decode"); err != nil || len(got) != 0 {
		t.Errorf("orphans are handed out twice: %v, %v", got, err)
	}
	claim(t, b, decodePart("r", 1, 1), "ack.5") // delivered again
	must(t, d.End("r"))
	if got, err = b.Orphans(t.Context(), "prefill"); err != nil || len(got) != 0 {
		t.Errorf("after the end: %v, %v", got, err)
	}
}

func TestClaimsRunOut(t *testing.T) {
	_, socket := daemon(t, func(c *hmm.Config) { c.Claims = 3 })
	c := dial(t, socket, hbm.Hello{})
	for i := range 3 {
		claim(t, c, decodePart("r", 1, i), "")
	}
	_, err := c.Claim(t.Context(), decodePart("r", 1, 3), "")
	wantErr(t, err, mem.ErrExhausted)
	claim(t, c, decodePart("r", 1, 2), "") // taking over needs no slot
	must(t, c.End(t.Context(), "r"))
	claim(t, c, decodePart("q", 1, 3), "")
}
