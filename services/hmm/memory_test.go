package hmm_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"sync"
	"testing"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/mem/memtest"

	"trireme.dev/services/hmm"
)

func TestHandOver(t *testing.T) {
	d, socket := daemon(t)
	encoder := dial(t, socket, hbm.Hello{Instance: "e", Role: "encode", NPUs: 1})
	prefill := dial(t, socket, hbm.Hello{Instance: "p", Role: "prefill", NPUs: 1})
	if got := []int{encoder.NPUs()[0], prefill.NPUs()[0]}; got[0] != 0 || got[1] != 1 {
		t.Fatalf("NPUs granted: %v", got)
	}
	o := alloc(t, encoder, hbm.Spec{Kind: mem.KindMM, NPU: 0, Bytes: 4 * 5000, Shape: []int{50, 100}})[0]
	if h := o.Handle(); h.Node != "n1" || h.Bytes != 20000 || h.NPU != 0 || h.Sealed {
		t.Errorf("handle %+v", h)
	}
	if !bytes.Equal(o.Bytes(), make([]byte, 20000)) {
		t.Error("fresh object is not zero")
	}
	for i := range o.Floats() {
		o.Floats()[i] = float32(i)
	}
	handles, err := encoder.Seal(t.Context(), ref("r", 1), o)
	must(t, err)
	free(t, encoder, o)
	if o.Bytes() != nil {
		t.Error("a freed object has bytes")
	}

	got := attach(t, prefill, mem.ReadOnly, 1, handles...)[0]
	if got.Extent() != o.Extent() {
		t.Errorf("handed over %v as %v: that is another extent", o.Extent(), got.Extent())
	}
	must(t, got.Verify())
	for i, v := range got.Floats() {
		if v != float32(i) {
			t.Fatalf("float %d is %v", i, v)
		}
	}
	s := d.Stats()
	if n := s.Memory[1]; n.Used != 0 || n.Peak != page {
		t.Errorf("the giver's account after hand-over: %+v", n)
	}
	if n := s.Memory[2]; n.Used != 20000 || n.Padded != page-20000 || n.Kinds["mm"].Used != 20000 || n.Instance != "p" {
		t.Errorf("the taker's account after hand-over: %+v", n)
	}
	if got.Handle().NPU != 1 {
		t.Errorf("handle after hand-over: NPU %d", got.Handle().NPU)
	}
	free(t, prefill, got, got, nil)
	if d.Stats().Objects != 1 {
		t.Error("the request hold does not keep the object")
	}
	must(t, encoder.End(t.Context(), "r"))
	_, err = prefill.Attach(t.Context(), mem.ReadOnly, -1, handles...)
	wantErr(t, err, mem.ErrGone)
	empty(t, d)
}

func TestAttachRefuses(t *testing.T) {
	_, socket := daemon(t)
	c := dial(t, socket, hbm.Hello{})
	gw := dial(t, socket, hbm.Hello{Instance: "g", Role: "gateway"})
	o := alloc(t, c, kv(0, 100))[0]
	good := o.Handle()
	for name, tc := range map[string]struct {
		forge func(*mem.Handle)
		want  error
	}{
		"capability":     {func(h *mem.Handle) { h.Capability = bytes.Repeat([]byte{1}, 16) }, mem.ErrDenied},
		"no capability":  {func(h *mem.Handle) { h.Capability = nil }, mem.ErrDenied},
		"longer":         {func(h *mem.Handle) { h.Bytes++ }, mem.ErrDenied},
		"sealed":         {func(h *mem.Handle) { h.Sealed = true }, mem.ErrDenied},
		"shape":          {func(h *mem.Handle) { h.Shape = []int{1} }, mem.ErrDenied},
		"kind":           {func(h *mem.Handle) { h.Kind = mem.KindMM }, mem.ErrDenied},
		"generation":     {func(h *mem.Handle) { h.Generation-- }, mem.ErrGone},
		"other object":   {func(h *mem.Handle) { h.Object++ }, mem.ErrGone},
		"other node":     {func(h *mem.Handle) { h.Node = "n2" }, mem.ErrGone},
		"huge object id": {func(h *mem.Handle) { h.Object = math.MaxUint64 }, mem.ErrGone},
	} {
		h := good
		tc.forge(&h)
		if _, err := c.Attach(t.Context(), mem.ReadOnly, -1, good, h); err == nil {
			t.Errorf("%s: attached", name)
		} else {
			wantErr(t, err, tc.want)
		}
	}
	moved := good
	moved.NPU = 1 // not covered: it changes under way
	free(t, c, attach(t, c, mem.ReadOnly, -1, moved)...)

	_, err := c.Attach(t.Context(), mem.ReadOnly, 7, good)
	wantErr(t, err, mem.ErrInvalid)
	_, err = c.Attach(t.Context(), mem.Access(9), -1, good)
	wantErr(t, err, mem.ErrInvalid)
	_, err = gw.Attach(t.Context(), mem.ReadOnly, -1, good)
	wantErr(t, err, mem.ErrDenied)
	_, err = gw.Alloc(t.Context(), kv(0, 1))
	wantErr(t, err, mem.ErrDenied)

	// The id is used again, the generation is not.
	free(t, c, o)
	again := alloc(t, c, kv(0, 100))[0]
	if again.Handle().Object != good.Object {
		t.Errorf("object id %d was not used again: %d", good.Object, again.Handle().Object)
	}
	_, err = c.Attach(t.Context(), mem.ReadOnly, -1, good)
	wantErr(t, err, mem.ErrGone)
}

func TestAllocRefuses(t *testing.T) {
	d, socket := daemon(t)
	c := dial(t, socket, hbm.Hello{})
	for name, s := range map[string]hbm.Spec{
		"no bytes":        {Kind: mem.KindKV, NPU: 0},
		"negative":        {Kind: mem.KindKV, NPU: 0, Bytes: -1},
		"overflow":        {Kind: mem.KindKV, NPU: 0, Bytes: math.MaxInt64},
		"no kind":         {NPU: 0, Bytes: 1},
		"unknown kind":    {Kind: 200, NPU: 0, Bytes: 1},
		"unknown NPU":     {Kind: mem.KindKV, NPU: 2, Bytes: 1},
		"NPU below host":  {Kind: mem.KindKV, NPU: -2, Bytes: 1},
		"shape too large": {Kind: mem.KindMM, NPU: 0, Bytes: 16, Shape: []int{5}},
		"shape overflows": {Kind: mem.KindMM, NPU: 0, Bytes: 1 << 20, Shape: []int{1 << 18, 1 << 18, 1 << 18, 1 << 18}},
		"shape negative":  {Kind: mem.KindMM, NPU: 0, Bytes: 16, Shape: []int{-1}},
		"nine dimensions": {Kind: mem.KindMM, NPU: 0, Bytes: 16, Shape: make([]int, 9)},
		"long request":    {Kind: mem.KindKV, NPU: 0, Bytes: 1, Ref: ref(strings.Repeat("x", 200), 1)},
	} {
		if _, err := c.Alloc(t.Context(), kv(0, 1), s); err == nil {
			t.Errorf("%s: allocated", name)
		} else {
			wantErr(t, err, mem.ErrInvalid)
		}
	}
	_, err := c.Alloc(t.Context(), hbm.Spec{Kind: mem.KindKV, Bytes: 1, Ref: hbm.Ref{Request: "late", Attempt: 1}})
	wantErr(t, err, mem.ErrEnded)
	empty(t, d)
}

func TestExhausted(t *testing.T) {
	d, socket := daemon(t)
	c := dial(t, socket, hbm.Hello{})
	alloc(t, c, kv(0, 40*page))
	_, err := c.Alloc(t.Context(), kv(0, 20*page), kv(0, 5*page))
	wantErr(t, err, mem.ErrExhausted)
	for _, size := range []string{"1638400", "1572864", "4194304", "NPU 0"} { // wanted, free, capacity
		if !strings.Contains(err.Error(), size) {
			t.Errorf("error %q does not say %s", err, size)
		}
	}
	if got := d.Stats().Memory[1].Free; got != 24*page {
		t.Errorf("%d bytes free after a refused alloc", got)
	}
	// The other NPU has room, for new objects and for a hand-over; then it has not.
	other := alloc(t, c, kv(1, 50*page))[0]
	_, err = c.Attach(t.Context(), mem.ReadOnly, 0, other.Handle())
	wantErr(t, err, mem.ErrExhausted)
	if d.Stats().Memory[2].Used != 50*page {
		t.Error("a refused hand-over changed the account")
	}
	free(t, c, alloc(t, c, kv(0, 24*page))...)
}

func TestSealedIsFinal(t *testing.T) {
	_, socket := daemon(t)
	writer, reader := dial(t, socket, hbm.Hello{}), dial(t, socket, hbm.Hello{Instance: "i2"})
	o := alloc(t, writer, kv(0, 3*page-7))[0]
	fill(o, 1)
	old := o.Handle()
	wantErr(t, o.Verify(), mem.ErrInvalid)
	evil := attach(t, reader, mem.ReadWrite, -1, old)[0] // before the seal
	h, err := writer.Seal(t.Context(), ref("r", 1), o)
	must(t, err)
	if !h[0].Sealed || h[0].CRC != mem.Checksum(o.Bytes()) || !o.Handle().Sealed {
		t.Errorf("sealed handle %+v", h[0])
	}
	for _, m := range memtest.Maps(t) {
		if m.Start == mapOf(o) && m.Perm != "r--s" {
			t.Errorf("sealed object is mapped %s", m.Perm)
		}
	}
	_, err = writer.Attach(t.Context(), mem.ReadWrite, -1, h[0])
	wantErr(t, err, mem.ErrSealed)
	_, err = writer.Seal(t.Context(), ref("r", 1), o)
	wantErr(t, err, mem.ErrSealed)
	_, err = reader.Seal(t.Context(), ref("r", 1), evil) // whose handle is from before the seal
	wantErr(t, err, mem.ErrSealed)

	got := attach(t, reader, mem.ReadOnly, -1, h[0], old) // the old handle is good, and the seal is known
	for _, g := range got {
		must(t, g.Verify())
	}
	evil.Bytes()[3*page-8] ^= 1
	wantErr(t, got[0].Verify(), mem.ErrCorrupt)
	free(t, reader, evil)
	free(t, reader, got...)
}

func TestSealOfEndedRequest(t *testing.T) {
	d, socket := daemon(t)
	c := dial(t, socket, hbm.Hello{})
	o := alloc(t, c, kv(0, 10))[0]
	must(t, d.End("r"))
	_, err := c.Seal(t.Context(), ref("r", 1), o)
	wantErr(t, err, mem.ErrEnded)
	o.Bytes()[0] = 1 // still writable
	wantErr(t, c.Keep(t.Context(), ref("r", 2), o), mem.ErrEnded)
	must(t, c.Keep(t.Context(), ref("r2", 1), o))
	free(t, c, o)
	wantErr(t, c.Keep(t.Context(), ref("r2", 1), o), mem.ErrInvalid)
	if d.Stats().Objects != 1 {
		t.Error("kept object is gone")
	}
}

func TestAttachedTwiceIsMappedOnce(t *testing.T) {
	_, socket := daemon(t)
	owner, c := dial(t, socket, hbm.Hello{}), dial(t, socket, hbm.Hello{Instance: "i2"})
	h := alloc(t, owner, kv(0, 10))[0].Handle()
	ro := attach(t, c, mem.ReadOnly, -1, h)[0]
	rw := attach(t, c, mem.ReadWrite, -1, h, h)
	if &ro.Bytes()[0] != &rw[0].Bytes()[0] {
		t.Error("one extent, two addresses")
	}
	rw[0].Bytes()[0] = 5
	free(t, c, rw[0])
	rw[1].Bytes()[1] = 6
	free(t, c, rw[1])
	perm := func() string {
		for _, m := range memtest.Maps(t) {
			if m.Start == mapOf(ro) {
				return m.Perm
			}
		}
		return "none"
	}
	if perm() != "r--s" {
		t.Errorf("with readers left the map is %s", perm())
	}
	if ro.Bytes()[0] != 5 || ro.Bytes()[1] != 6 {
		t.Error("bytes are wrong")
	}
	at := mapOf(ro)
	free(t, c, ro)
	if again := attach(t, c, mem.ReadOnly, -1, h)[0]; mapOf(again) != at {
		t.Error("one extent, another address")
	}
}

func TestManyObjectsAtOnce(t *testing.T) {
	const n = 3000 // three requests on the socket
	d, socket := daemon(t, func(c *hmm.Config) { c.NPUBytes = n * page })
	c, other := dial(t, socket, hbm.Hello{}), dial(t, socket, hbm.Hello{Instance: "i2"})
	before := len(memtest.Maps(t))
	specs := make([]hbm.Spec, n)
	for i := range specs {
		specs[i] = kv(0, page)
	}
	objects := alloc(t, c, specs...)
	handles := make([]mem.Handle, n)
	for i, o := range objects {
		o.Bytes()[0] = byte(i)
		handles[i] = o.Handle()
	}
	for i, o := range attach(t, other, mem.ReadOnly, 1, handles...) {
		if o.Bytes()[0] != byte(i) {
			t.Fatalf("object %d has other bytes", i)
		}
	}
	if got := len(memtest.Maps(t)) - before; got > 2 {
		t.Errorf("%d objects take %d maps in two clients", n, got)
	}
	_, err := c.Alloc(t.Context(), specs[:n]...)
	must(t, err) // NPU 0 is free again
	_, err = c.Alloc(t.Context(), specs[:1]...)
	wantErr(t, err, mem.ErrExhausted)
	must(t, other.Close())
	must(t, c.Close())
	empty(t, d)
	if s := d.Stats(); s.Connections != 0 {
		t.Errorf("%d connections", s.Connections)
	}
}

func TestPartOfALargeAllocFails(t *testing.T) {
	d, socket := daemon(t, func(c *hmm.Config) { c.NPUBytes = 1500 * page })
	c := dial(t, socket, hbm.Hello{})
	specs := make([]hbm.Spec, 2000)
	for i := range specs {
		specs[i] = kv(0, 1)
	}
	_, err := c.Alloc(t.Context(), specs...)
	wantErr(t, err, mem.ErrExhausted)
	empty(t, d)
}

func TestManyGoroutinesOneClient(t *testing.T) {
	d, socket := daemon(t, func(c *hmm.Config) { c.NPUBytes = 1000 * page })
	c := dial(t, socket, hbm.Hello{})
	var wg sync.WaitGroup
	for g := range 16 {
		wg.Go(func() {
			for i := range 40 {
				o, err := c.Alloc(context.Background(), kv(g%2, int64(1+i*3000)))
				if err != nil {
					t.Error(err)
					return
				}
				fill(o[0], byte(g))
				a, err := c.Attach(context.Background(), mem.ReadOnly, -1, o[0].Handle())
				if err != nil {
					t.Error(err)
					return
				}
				if !bytes.Equal(a[0].Bytes(), o[0].Bytes()) || len(a[0].Bytes()) > 2 && a[0].Bytes()[2] != byte(g)+14 {
					t.Error("bytes of another goroutine")
				}
				if err := c.Free(context.Background(), o[0], a[0]); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	empty(t, d)
}

func TestFreshIsZeroWhenReused(t *testing.T) {
	for name, cache := range map[string]int64{"cached": 1 << 30, "punched": -1} {
		t.Run(name, func(t *testing.T) {
			d, socket := daemon(t, func(c *hmm.Config) { c.CacheBytes = cache })
			c := dial(t, socket, hbm.Hello{})
			for range 3 {
				o := alloc(t, c, kv(0, 8*page))[0]
				if !bytes.Equal(o.Bytes(), make([]byte, 8*page)) {
					t.Fatal("memory used before is not zero")
				}
				fill(o, 9)
				free(t, c, o)
			}
			if got, want := d.Stats().Cached, map[string]int64{"cached": 8 * page, "punched": 0}[name]; got != want {
				t.Errorf("%d bytes cached, want %d", got, want)
			}
		})
	}
}

func TestCancelledAllocLeavesNothing(t *testing.T) {
	d, socket := daemon(t)
	c := dial(t, socket, hbm.Hello{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	first := claim(t, c, decodePart("r", 1, 0), "").Generation()
	for range 50 { // sent all the same; the answer comes when nobody waits
		if o, err := c.Alloc(ctx, kv(0, page)); err == nil {
			free(t, c, o...)
		} else {
			wantErr(t, err, context.Canceled)
		}
	}
	claims := uint64(0)
	eventually(t, "all 50 are allocated: each draws a generation", func() bool {
		claims++
		return claim(t, c, decodePart("r", 1, 0), "").Generation()-first == 50+claims
	})
	eventually(t, "the objects of calls given up are freed", func() bool { return d.Stats().Objects == 0 })
	must(t, d.End("r"))
	empty(t, d)
}

// TestEndsRaceWithWork lets requests end while others allocate, seal and attach for them: every call succeeds or says
// that the request or object is gone, and nothing is left.
func TestEndsRaceWithWork(t *testing.T) {
	d, socket := daemon(t, func(c *hmm.Config) { c.NPUBytes = 1000 * page })
	giver, taker := dial(t, socket, hbm.Hello{}), dial(t, socket, hbm.Hello{Instance: "i2"})
	over := func(err error) bool {
		if err != nil && !errors.Is(err, mem.ErrEnded) && !errors.Is(err, mem.ErrGone) {
			t.Error(err)
		}
		return err != nil
	}
	ctx := t.Context()
	var wg sync.WaitGroup
	for r := range 60 {
		request := fmt.Sprint("r", r)
		wg.Go(func() {
			for i := range 5 {
				made, err := giver.Alloc(ctx, hbm.Spec{Kind: mem.KindMM, NPU: 0, Bytes: 3000, Ref: ref(request, 1)})
				if over(err) {
					return
				}
				fill(made[0], byte(r+i))
				handles, err := giver.Seal(ctx, ref(request, 1), made...)
				over(giver.Free(ctx, made...))
				if over(err) {
					return
				}
				got, err := taker.Attach(ctx, mem.ReadOnly, 1, handles...)
				if over(err) {
					return
				}
				if err := got[0].Verify(); err != nil {
					t.Error(err)
				}
				over(taker.Free(ctx, got...))
			}
		})
		wg.Go(func() {
			if err := d.End(request); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	empty(t, d)
}
