package ledger_test

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"

	"trireme.dev/services/hmm/ledger"
)

const page = 64

var start = time.Unix(1_800_000_000, 0)

func config() ledger.Config {
	return ledger.Config{
		Node: "n1", Page: page, Spaces: []int64{40 * page, 80 * page}, Host: 20 * page,
		NPUs: []ledger.NPU{{Bytes: 20 * page, Space: 1}, {Bytes: 20 * page, Space: 1}}, Slots: 8, Key: []byte("key"), First: 1000,
		Margin: 10 * time.Second, Tombstone: 10 * time.Minute, MaxTombstones: 4, Unknown: time.Hour,
	}
}

func connect(t testing.TB, l *ledger.Ledger, instance string) ledger.Conn {
	t.Helper()
	c, _, err := l.Connect(start, protocol.Hello{Instance: instance, Role: "decode"})
	must(t, err)
	return c
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantErr(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error is %v, want %v", err, want)
	}
}

func ref(request string, attempt int, left time.Duration) protocol.Ref {
	return protocol.Ref{Request: request, Attempt: attempt, Left: left}
}

func kv(r protocol.Ref) protocol.Spec {
	return protocol.Spec{Kind: mem.KindKV, NPU: 0, Bytes: page, Ref: r}
}

// one allocates an object and drops the connection hold, so that the request alone keeps it.
func one(t testing.TB, l *ledger.Ledger, now time.Time, c ledger.Conn, r protocol.Ref) mem.Handle {
	t.Helper()
	g, err := l.Alloc(now, c, []protocol.Spec{kv(r)})
	must(t, err)
	must(t, l.Free(c, []protocol.Object{name(g[0].Handle)}))
	return g[0].Handle
}

func name(h mem.Handle) protocol.Object {
	return protocol.Object{ID: h.Object, Generation: h.Generation}
}

// alive reports whether an object is still there.
func alive(t testing.TB, l *ledger.Ledger, c ledger.Conn, h mem.Handle) bool {
	t.Helper()
	_, err := l.Attach(c, protocol.Attach{NPU: -1, Handles: []mem.Handle{h}})
	if err != nil {
		wantErr(t, err, mem.ErrGone)
		return false
	}
	must(t, l.Free(c, []protocol.Object{name(h)}))
	return true
}

func TestDeadline(t *testing.T) {
	l := ledger.New(config())
	c := connect(t, l, "a")
	h := one(t, l, start, c, ref("r", 1, time.Minute))
	k, err := l.Claim(start, c, protocol.Claim{Part: protocol.Part{Request: "r", Attempt: 1, Stage: "decode"}})
	must(t, err)
	if next, ok := l.Next(); !ok || !next.Equal(start.Add(70*time.Second)) {
		t.Errorf("Next = %v, %v", next, ok)
	}
	l.Tick(start.Add(70*time.Second - 1))
	if !alive(t, l, c, h) {
		t.Error("memory is gone before deadline and margin")
	}
	// A process that heard later of the deadline moves it; one whose deadline is earlier does not.
	must(t, l.Keep(start.Add(30*time.Second), c, protocol.Keep{Ref: ref("r", 1, time.Minute)}))
	must(t, l.Keep(start.Add(40*time.Second), c, protocol.Keep{Ref: ref("r", 1, time.Second)}))
	l.Tick(start.Add(99 * time.Second))
	if !alive(t, l, c, h) {
		t.Error("a longer deadline does not count")
	}
	l.Effects()
	end := start.Add(100 * time.Second)
	l.Tick(end)
	if alive(t, l, c, h) {
		t.Error("memory lives on after deadline and margin")
	}
	e := l.Effects()
	if len(e.Freed) != 1 || !slices.Equal(e.Slots, []ledger.Slot{{Index: 0, Generation: 0}}) || k.Slot != 0 {
		t.Errorf("effects of the end: %+v", e)
	}
	// It does not come back while it is remembered, and is forgotten in the end.
	_, err = l.Alloc(end.Add(time.Minute), c, []protocol.Spec{kv(ref("r", 2, time.Minute))})
	wantErr(t, err, mem.ErrEnded)
	if next, ok := l.Next(); !ok || !next.Equal(end.Add(10*time.Minute)) {
		t.Errorf("Next = %v, %v", next, ok)
	}
	l.Tick(end.Add(10 * time.Minute))
	if s := l.Stats(); s.Requests != 0 || s.Ended != 0 {
		t.Errorf("remembered for ever: %+v", s)
	}
	if _, ok := l.Next(); ok {
		t.Error("something is left to do")
	}
}

func TestTombstoneLastsToTheDeadline(t *testing.T) {
	l := ledger.New(config())
	c := connect(t, l, "a")
	one(t, l, start, c, ref("long", 1, time.Hour))
	must(t, l.End(start, "long"))
	must(t, l.End(start, "long")) // twice is once
	must(t, l.End(start, "never heard of"))
	later := start.Add(time.Hour)
	_, err := l.Claim(later, c, protocol.Claim{Part: protocol.Part{Request: "long", Attempt: 1, Stage: "decode"}})
	wantErr(t, err, mem.ErrEnded)
	_, err = l.Claim(later, c, protocol.Claim{Part: protocol.Part{Request: "never heard of", Attempt: 1, Stage: "decode"}})
	must(t, err)
	_, err = l.Alloc(start.Add(5*time.Minute), c, []protocol.Spec{kv(ref("late", 1, 0))})
	wantErr(t, err, mem.ErrEnded)
}

func TestTombstonesAreBounded(t *testing.T) {
	l := ledger.New(config())
	for i := range 100 {
		must(t, l.End(start.Add(time.Duration(i)*time.Second), fmt.Sprint("r", i)))
	}
	if s := l.Stats(); s.Ended != 4 {
		t.Errorf("%d tombstones", s.Ended)
	}
	c := connect(t, l, "a")
	_, err := l.Alloc(start.Add(100*time.Second), c, []protocol.Spec{kv(ref("r99", 1, time.Second))})
	wantErr(t, err, mem.ErrEnded)
}

func TestNewerAttempt(t *testing.T) {
	l := ledger.New(config())
	c := connect(t, l, "a")
	left := time.Minute
	old := one(t, l, start, c, ref("r", 1, left))
	other := one(t, l, start, c, ref("q", 1, left))
	g, err := l.Alloc(start, c, []protocol.Spec{kv(ref("r", 1, left))})
	must(t, err)
	carried := g[0].Handle
	must(t, l.Keep(start, c, protocol.Keep{Ref: ref("r", 2, left), Objects: []protocol.Object{name(carried)}}))
	must(t, l.Free(c, []protocol.Object{name(carried)}))
	if alive(t, l, c, old) {
		t.Error("the older attempt's hold goes on")
	}
	if !alive(t, l, c, carried) || !alive(t, l, c, other) {
		t.Error("a newer attempt ended more than the older one's holds")
	}
	_, err = l.Alloc(start, c, []protocol.Spec{kv(ref("r", 1, left))})
	wantErr(t, err, mem.ErrEnded)
	_, err = l.Alloc(start, c, []protocol.Spec{kv(ref("p", 1, left)), kv(ref("p", 2, left))})
	wantErr(t, err, mem.ErrEnded)
}

func TestReapAfterDisconnect(t *testing.T) {
	l := ledger.New(config())
	a, npus, err := l.Connect(start, protocol.Hello{Instance: "a", Role: "decode", NPUs: 2})
	must(t, err)
	if !slices.Equal(npus, []int{0, 1}) {
		t.Errorf("NPUs %v", npus)
	}
	b := connect(t, l, "b")
	g, err := l.Alloc(start, a, []protocol.Spec{kv(protocol.Ref{})})
	must(t, err)
	_, err = l.Claim(start, a, protocol.Claim{Part: protocol.Part{Request: "r", Stage: "decode"}, Reply: "x"})
	must(t, err)
	l.Disconnect(a)
	if o := l.Orphans("encode"); len(o) != 0 {
		t.Errorf("orphans of another stage: %v", o)
	}
	if o := l.Orphans("decode"); len(o) != 1 {
		t.Errorf("orphans: %v", o)
	}
	if !alive(t, l, b, g[0].Handle) || !l.Leaving("") {
		t.Error("memory that a process may still write was given away")
	}
	_, _, err = l.Connect(start, protocol.Hello{Instance: "c", Role: "decode", NPUs: 1})
	wantErr(t, err, mem.ErrExhausted)
	l.Reap(start, a)
	if alive(t, l, b, g[0].Handle) || l.Leaving("") {
		t.Error("memory of a dead process is kept")
	}
	_, npus, err = l.Connect(start, protocol.Hello{Instance: "c", Role: "decode", NPUs: 1})
	must(t, err)
	if !slices.Equal(npus, []int{0}) {
		t.Errorf("NPUs %v", npus)
	}
}

func TestAddressRoomRunsOut(t *testing.T) {
	cfg := config()
	cfg.Spaces[1] = 10 * page // less than the budgets
	l := ledger.New(cfg)
	c := connect(t, l, "a")
	spec := protocol.Spec{Kind: mem.KindKV, NPU: 0, Bytes: 6 * page, Ref: ref("r", 1, time.Minute)}
	_, err := l.Alloc(start, c, []protocol.Spec{spec, spec})
	wantErr(t, err, mem.ErrExhausted)
	if s := l.Stats(); s.Objects != 0 || s.Holds != 0 || s.Memory[1].Used != 0 {
		t.Errorf("a failed alloc left %+v", s)
	}
}

// TestCapability shows that every identifying field is covered, with other keys too.
func TestCapability(t *testing.T) {
	caps := map[string]bool{}
	for _, key := range []string{"key", "another"} {
		cfg := config()
		cfg.Key = []byte(key)
		l := ledger.New(cfg)
		c := connect(t, l, "a")
		for _, s := range []protocol.Spec{
			{Kind: mem.KindKV, Bytes: 64}, {Kind: mem.KindMM, Bytes: 64}, {Kind: mem.KindKV, Bytes: 63},
			{Kind: mem.KindKV, Bytes: 64, Shape: []int{16}}, {Kind: mem.KindKV, Bytes: 64, Shape: []int{4, 4}},
		} {
			g, err := l.Alloc(start, c, []protocol.Spec{s})
			must(t, err)
			h := g[0].Handle
			if len(h.Capability) != 16 || caps[string(h.Capability)] {
				t.Errorf("capability %x of %+v", h.Capability, s)
			}
			caps[string(h.Capability)] = true
			sealed, err := l.Seal(start, c, protocol.Seal{Ref: ref("r", 1, time.Minute), Items: []protocol.Sealing{{Object: name(h), CRC: 5}}})
			must(t, err)
			if bytes.Equal(sealed[0].Capability, h.Capability) {
				t.Error("the seal is not covered")
			}
		}
	}
}

func TestTakenClaimOutlivesItsFirstClaimant(t *testing.T) {
	l := ledger.New(config())
	a, b := connect(t, l, "a"), connect(t, l, "b")
	part := protocol.Part{Request: "r", Attempt: 1, Stage: "decode"}
	for _, c := range []ledger.Conn{a, b} {
		_, err := l.Claim(start, c, protocol.Claim{Part: part})
		must(t, err)
	}
	l.Disconnect(a)
	if o := l.Orphans("decode"); len(o) != 0 {
		t.Errorf("the successor's claim became an orphan with its first claimant: %v", o)
	}
	l.Disconnect(b)
	if o := l.Orphans("decode"); len(o) != 1 {
		t.Errorf("orphans: %v", o)
	}
}

func TestSlotsAreUsedAgain(t *testing.T) {
	l := ledger.New(config())
	c := connect(t, l, "a")
	part := protocol.Part{Request: "r", Attempt: 1, Stage: "decode"}
	for range 50 {
		k, err := l.Claim(start, c, protocol.Claim{Part: part})
		must(t, err)
		must(t, l.Unclaim(c, protocol.Unclaim{Part: part, Generation: k.Generation}))
	}
	for i := range 50 {
		part.Request = fmt.Sprint("r", i)
		_, err := l.Claim(start, c, protocol.Claim{Part: part})
		must(t, err)
		must(t, l.End(start, part.Request))
	}
}

func TestHandOverOfManyNeedsRoomForAll(t *testing.T) {
	l := ledger.New(config())
	c := connect(t, l, "a")
	spec := protocol.Spec{Kind: mem.KindKV, NPU: 0, Bytes: 8 * page}
	g, err := l.Alloc(start, c, []protocol.Spec{spec, spec, {Kind: mem.KindKV, NPU: 1, Bytes: 6 * page}})
	must(t, err)
	both := protocol.Attach{NPU: 1, Handles: []mem.Handle{g[0].Handle, g[1].Handle}}
	_, err = l.Attach(c, both)
	wantErr(t, err, mem.ErrExhausted)
	must(t, l.Free(c, []protocol.Object{name(g[2].Handle)}))
	both.Handles = append(both.Handles, g[0].Handle, g[1].Handle) // named twice, moved once
	_, err = l.Attach(c, both)
	must(t, err)
	if s := l.Stats(); s.Memory[1].Used != 0 || s.Memory[2].Used != 16*page {
		t.Errorf("accounts after hand-over: %+v", s.Memory)
	}
}

// A client that names requests without end is stopped before the books are full of them, and others are not.
func TestRequestsWithoutEnd(t *testing.T) {
	cfg := config()
	cfg.MaxRequests = 3
	l := ledger.New(cfg)
	careless, other := connect(t, l, "careless"), connect(t, l, "other")
	keep := func(c ledger.Conn, request string, now time.Time) error {
		return l.Keep(now, c, protocol.Keep{Ref: protocol.Ref{Request: request, Attempt: 1, Left: time.Minute}})
	}
	for i := range 3 {
		must(t, keep(careless, fmt.Sprint("r", i), start))
	}
	err := keep(careless, "r3", start)
	if !errors.Is(err, mem.ErrExhausted) || !strings.Contains(err.Error(), `"careless" has named 3 requests`) {
		t.Errorf("the fourth: %v", err)
	}
	must(t, keep(careless, "r2", start)) // known
	must(t, keep(other, "r3", start))
	must(t, keep(careless, "r3", start)) // another's
	must(t, l.End(start, "r0"))
	must(t, keep(careless, "r4", start))
	if err := keep(careless, "r5", start); !errors.Is(err, mem.ErrExhausted) {
		t.Errorf("one more than have ended: %v", err)
	}
	must(t, keep(careless, "r6", start.Add(2*time.Minute))) // the deadlines have passed
	l.Disconnect(careless)
	l.Reap(start, careless)
	must(t, l.End(start.Add(2*time.Minute), "r6"))
}

// What a gateway has put into memory before it died ends a margin later, also if somebody has begun to work on it: nobody waits for
// it. Where only its connection was lost, it goes on with it over another one.
func TestRequestsOfAGoneGateway(t *testing.T) {
	l := ledger.New(config())
	g, _, err := l.Connect(start, protocol.Hello{Instance: "g", Role: protocol.RoleGateway})
	must(t, err)
	stage := connect(t, l, "s")
	put := func(r string) mem.Handle {
		ref := protocol.Ref{Request: r, Attempt: 1, Left: time.Hour}
		out, err := l.Alloc(start, g, []protocol.Spec{{Kind: mem.KindPixels, NPU: mem.HostNPU, Bytes: 100, Ref: ref}})
		must(t, err)
		must(t, l.Free(g, []protocol.Object{{ID: out[0].Handle.Object, Generation: out[0].Handle.Generation}}))
		return out[0].Handle
	}
	alone, worked, again, before := put("alone"), put("worked"), put("again"), put("before")
	l.Disconnect(g)
	other, _, err := l.Connect(start, protocol.Hello{Instance: "g, over another connection", Role: protocol.RoleGateway})
	must(t, err)
	must(t, l.Keep(start, other, protocol.Keep{Ref: protocol.Ref{Request: "before", Attempt: 1, Left: time.Hour}}))
	l.Reap(start, g)
	if !alive(t, l, stage, alone) {
		t.Error("a request's memory went with its gateway: its message may be on its way")
	}
	claim := protocol.Claim{Part: protocol.Part{Request: "worked", Attempt: 1, Stage: "encode", Left: time.Hour}, Reply: "x"}
	_, err = l.Claim(start, stage, claim)
	must(t, err)
	g, _, err = l.Connect(start, protocol.Hello{Instance: "g", Role: protocol.RoleGateway})
	must(t, err)
	must(t, l.Keep(start, g, protocol.Keep{Ref: protocol.Ref{Request: "again", Attempt: 1, Left: time.Hour}}))
	l.Tick(start.Add(config().Margin))
	if alive(t, l, stage, alone) {
		t.Error("a request of a gone gateway is kept for as long as the gateway wanted it")
	}
	if alive(t, l, stage, worked) {
		t.Error("a request of a gone gateway is kept by who works on it")
	}
	if !alive(t, l, stage, again) || !alive(t, l, stage, before) {
		t.Error("a request has ended with which its gateway goes on")
	}
}

// The end of an attempt takes what it and older ones have, and no more: a later one goes on, or begins.
func TestEndAttempts(t *testing.T) {
	l := ledger.New(config())
	c := connect(t, l, "c")
	ref := protocol.Ref{Request: "r", Attempt: 2, Left: time.Hour}
	h := one(t, l, start, c, ref)
	l.EndAttempts(start, "r", 1)
	if !alive(t, l, c, h) {
		t.Error("a later attempt has ended, too")
	}
	l.EndAttempts(start, "unheard of", 7)
	l.EndAttempts(start, "r", 2)
	if alive(t, l, c, h) {
		t.Error("an ended attempt holds memory")
	}
	_, err := l.Alloc(start, c, []protocol.Spec{kv(ref)})
	wantErr(t, err, mem.ErrEnded)
	ref.Attempt = 3
	_, err = l.Alloc(start, c, []protocol.Spec{kv(ref)})
	must(t, err)
	must(t, l.End(start, "r"))
	l.EndAttempts(start, "r", 3)
	_, err = l.Alloc(start, c, []protocol.Spec{kv(ref)})
	wantErr(t, err, mem.ErrEnded)
}
