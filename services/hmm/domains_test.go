package hmm_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"

	"trireme.dev/services/hmm"
)

func perNPU(c *hmm.Config) { c.PerNPU = true }

// pages is what is booked to an NPU.
func pages(d *hmm.Daemon, npu int) int64 {
	m := d.Stats().Memory[npu+1]
	return (m.Used + m.Padded) / page
}

// Between two domains a hand-over is a copy, which is the taker's; the source and its holds stay as they are.
func TestHandOverBetweenDomains(t *testing.T) {
	d, socket := daemon(t, perNPU)
	giver := dial(t, socket, hbm.Hello{Instance: "giver", NPUs: 1})
	taker := dial(t, socket, hbm.Hello{Instance: "taker", NPUs: 1})
	sealed := alloc(t, giver, hbm.Spec{Kind: mem.KindMM, NPU: 0, Bytes: 5*page + 8, Shape: []int{5*page/4 + 2}})[0]
	open := alloc(t, giver, kv(0, 3*page))[0]
	inHost := alloc(t, giver, hbm.Spec{Kind: mem.KindPixels, NPU: mem.HostNPU, Bytes: 100})[0]
	for i, o := range []*hbm.Object{sealed, open, inHost} {
		fill(o, byte(i))
	}
	_, err := giver.Seal(t.Context(), ref("r", 1), sealed)
	must(t, err)
	local := alloc(t, taker, kv(1, page))[0]

	got := attach(t, taker, mem.ReadOnly, 1, local.Handle(), sealed.Handle(), inHost.Handle(), open.Handle())
	for i, want := range []*hbm.Object{local, sealed, inHost, open} {
		h, from := got[i].Handle(), want.Handle()
		source, copied := got[i].Source()
		far := want == sealed || want == open
		if !bytes.Equal(got[i].Bytes(), want.Bytes()) || h.Sealed != from.Sealed || h.CRC != from.CRC ||
			fmt.Sprint(h.Shape) != fmt.Sprint(from.Shape) {
			t.Errorf("object %d is %+v with other content than %+v", i, h, from)
		}
		if copied != far || far && (source.Object != from.Object || h.Object == from.Object || h.NPU != 1 || got[i].Far(1)) ||
			!far && h.Object != from.Object {
			t.Errorf("object %d is %+v, copied: %v, of %+v", i, h, copied, from)
		}
	}
	must(t, got[1].Verify())
	if a, b, n := pages(d, 0), pages(d, 1), d.Stats().Copied; a != 9 || b != 10 || n != 8*page+8 {
		t.Errorf("%d and %d pages are booked, %d bytes copied; want 9, 10 and %d", a, b, n, 8*page+8)
	}

	// Where it is, a far object is mapped, too.
	there := attach(t, taker, mem.ReadOnly, -1, open.Handle())
	if there[0].Extent() != open.Extent() || !there[0].Far(1) || there[0].Far(0) {
		t.Errorf("mapped at %v, it is at %v", there[0].Extent(), open.Extent())
	}
	free(t, taker, there...)

	// A sealed copy serves everybody in its domain, an open one nobody else.
	again := attach(t, taker, mem.ReadOnly, 1, sealed.Handle(), open.Handle())
	if again[0].Extent() != got[1].Extent() || again[1].Extent() == got[3].Extent() {
		t.Errorf("taken again: %v and %v", again[0].Extent(), again[1].Extent())
	}
	free(t, taker, again...)
	// The copy of the open one lives on when the source is gone.
	free(t, giver, open)
	if !bytes.Equal(got[3].Bytes(), filled(3*page, 1)) {
		t.Error("the copy changed with its source")
	}
	must(t, taker.Keep(t.Context(), ref("r", 1), got[3]))
	free(t, taker, append(got, local)...)
	if a, b := pages(d, 0), pages(d, 1); a != 6 || b != 3 {
		t.Errorf("%d and %d pages are booked in the end, want 6 and what the request keeps, 3", a, b)
	}
	must(t, d.End("r"))
	free(t, giver, sealed, inHost)
	empty(t, d)
}

func filled(n int64, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = seed + byte(i*7)
	}
	return b
}

// What cannot be copied leaves nothing behind.
func TestRefusedCopiesLeaveNothing(t *testing.T) {
	d, socket := daemon(t, perNPU)
	giver := dial(t, socket, hbm.Hello{Instance: "giver", NPUs: 1})
	taker := dial(t, socket, hbm.Hello{Instance: "taker", NPUs: 1})
	good, bad := alloc(t, giver, kv(0, 3*page))[0], alloc(t, giver, kv(0, 3*page))[0]
	large := alloc(t, giver, kv(0, 50*page))[0]
	other := dial(t, socket, hbm.Hello{Instance: "other"})
	spoil := attach(t, other, mem.ReadWrite, -1, bad.Handle())[0]
	_, err := giver.Seal(t.Context(), ref("r", 1), good, bad)
	must(t, err)
	spoil.Bytes()[2*page+1] ^= 4
	fills := alloc(t, taker, kv(1, 20*page))[0]

	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for name, tc := range map[string]struct {
		ctx    context.Context
		h      mem.Handle
		access mem.Access
		want   error
	}{
		"damaged":             {t.Context(), bad.Handle(), mem.ReadOnly, mem.ErrCorrupt},
		"no room":             {t.Context(), large.Handle(), mem.ReadOnly, mem.ErrExhausted},
		"sealed, for writing": {t.Context(), good.Handle(), mem.ReadWrite, mem.ErrSealed},
		"cancelled":           {ended, good.Handle(), mem.ReadOnly, context.Canceled},
	} {
		_, err := taker.Attach(tc.ctx, tc.access, 1, good.Handle(), tc.h)
		if !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
		eventually(t, name+": what was taken is given back", func() bool { return pages(d, 1) == 20 && d.Stats().Holds == 7 })
	}
	free(t, taker, fills)
	free(t, other, spoil)
	free(t, giver, good, bad, large)
	must(t, d.End("r"))
	eventually(t, "all is given back", func() bool { s := d.Stats(); return s.Objects == 0 && s.Holds == 0 })
	empty(t, d)
}

// A writable copy can be written, and leaves the source alone.
func TestCopyIsTheTakers(t *testing.T) {
	_, socket := daemon(t, perNPU)
	giver := dial(t, socket, hbm.Hello{Instance: "giver", NPUs: 1})
	taker := dial(t, socket, hbm.Hello{Instance: "taker", NPUs: 1})
	o := alloc(t, giver, hbm.Spec{Kind: mem.KindLog, NPU: 0, Bytes: page})[0]
	fill(o, 3)
	got := attach(t, taker, mem.ReadWrite, 1, o.Handle())[0]
	clear(got.Bytes())
	if !bytes.Equal(o.Bytes(), filled(page, 3)) {
		t.Error("writing to the copy changed the source")
	}
	// The copy has a name of its own, good within its domain.
	same := attach(t, taker, mem.ReadOnly, 1, got.Handle())[0]
	if same.Extent() != got.Extent() {
		t.Errorf("the copy is at %v, by its handle at %v", got.Extent(), same.Extent())
	}
	free(t, taker, same, got)
	free(t, giver, o)
}

// The prefix index is by domain; what a domain has not is found in others.
func TestPrefixOfOtherDomains(t *testing.T) {
	d, socket := daemon(t, perNPU, func(c *hmm.Config) { c.KVCache = 30 * page })
	a, b := dial(t, socket, hbm.Hello{Instance: "a", NPUs: 1}), dial(t, socket, hbm.Hello{Instance: "b", NPUs: 1})
	mine, theirs := alloc(t, a, kv(0, page))[0], alloc(t, b, kv(1, page))[0]
	keys := []hbm.Key{{1}, {2}, {3}, {4}}
	must(t, a.CacheBlocks(t.Context(), []*hbm.Object{mine}, []hbm.Block{{Block: 0, CRC: 10}, {Block: 1, CRC: 11}}, keys[:2]))
	must(t, b.CacheBlocks(t.Context(), []*hbm.Object{theirs}, []hbm.Block{{Block: 5, CRC: 21}, {Block: 6, CRC: 22}}, keys[1:3]))
	free(t, a, mine)
	free(t, b, theirs)
	for npu, want := range [][]hbm.Block{
		{{Slab: 0, Block: 0, CRC: 10}, {Slab: 0, Block: 1, CRC: 11}, {Slab: 1, Block: 6, CRC: 22}},
		{{Slab: 0, Block: 0, CRC: 10}, {Slab: 1, Block: 5, CRC: 21}, {Slab: 1, Block: 6, CRC: 22}},
	} {
		slabs, blocks, err := a.FindPrefix(t.Context(), npu, keys)
		must(t, err)
		if fmt.Sprint(blocks) != fmt.Sprint(want) || len(slabs) != 2 || slabs[0].Far(0) || !slabs[1].Far(0) {
			t.Errorf("NPU %d finds %v in %d slabs, want %v", npu, blocks, len(slabs), want)
		}
		free(t, a, slabs...)
	}
	if s := d.Stats(); s.Resting != 2 || pages(d, 0) != 1 || pages(d, 1) != 1 {
		t.Errorf("looking moved something: %+v", s)
	}
}

// As many domains as a welcome has descriptors for, and none for a gateway.
func TestManyDomains(t *testing.T) {
	_, socket := daemon(t, perNPU, func(c *hmm.Config) { c.NPUs, c.NPUBytes = 128, page })
	c := dial(t, socket, hbm.Hello{NPUs: 128})
	objects := alloc(t, c, kv(0, page), kv(127, page))
	if a, b := objects[0].Extent(), objects[1].Extent(); a.Space == b.Space || !objects[0].Far(127) || objects[0].Far(0) {
		t.Errorf("the first NPU has %v, the last %v", a, b)
	}
	wantErr(t, func() error {
		_, err := c.Alloc(t.Context(), kv(0, page))
		return err
	}(), mem.ErrExhausted)
	gateway := dial(t, socket, hbm.Hello{Instance: "g", Role: "gateway"})
	free(t, gateway, alloc(t, gateway, hbm.Spec{Kind: mem.KindPixels, NPU: mem.HostNPU, Bytes: 1})...)
	free(t, c, objects...)
	if _, err := hmm.New(hmm.Config{Socket: "s", Node: "n", NPUs: 129, NPUBytes: page, HostBytes: page, PerNPU: true}, quiet()); err == nil {
		t.Error("129 domains are too many, but were not refused")
	}
}
