package ledger_test

import (
	"testing"
	"time"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"

	"trireme.dev/services/hmm/ledger"
)

// A finished sequence's slabs make room from its end: its first ones are of use to others the longest.
func TestLaterSlabsAreEvictedFirst(t *testing.T) {
	cfg := config()
	cfg.KVCache = 20 * page
	l := ledger.New(cfg)
	c := connect(t, l, "i")
	var slabs []mem.Handle
	for i := range 10 {
		h := cachedSlab(t, l, c, ref("r", 1, time.Minute), protocol.Key{byte(i + 1)})
		slabs = append(slabs, h)
	}
	must(t, l.End(start, "r"))
	if s := l.Stats(); s.Resting != 10 || s.CachedBlocks != 10 || s.Memory[1].Cached != 10*page || s.Memory[1].Free != 10*page {
		t.Fatalf("after the end %+v", s)
	}
	_, err := l.Alloc(start, c, []protocol.Spec{{Kind: mem.KindKV, NPU: 0, Bytes: 13 * page}}) // three too many
	must(t, err)
	for i, h := range slabs {
		if got, want := alive(t, l, c, h), i < 7; got != want {
			t.Errorf("slab %d is there: %v, want %v", i, got, want)
		}
	}
	if s := l.Stats(); s.CachedBlocks != 7 {
		t.Errorf("%d blocks are left, want 7", s.CachedBlocks)
	}
	_, err = l.Alloc(start, c, []protocol.Spec{{Kind: mem.KindKV, NPU: 0, Bytes: 8 * page}})
	wantErr(t, err, mem.ErrExhausted)
	if s := l.Stats(); s.Resting != 7 {
		t.Errorf("an allocation that cannot fit has evicted %d slabs", 7-s.Resting)
	}
}

// cachedSlab makes a slab with one cached block that the request alone holds.
func cachedSlab(t *testing.T, l *ledger.Ledger, c ledger.Conn, r protocol.Ref, hash protocol.Key) mem.Handle {
	t.Helper()
	g, err := l.Alloc(start, c, []protocol.Spec{kv(r)})
	must(t, err)
	n := name(g[0].Handle)
	must(t, l.CacheBlocks(c, protocol.CacheBlocks{
		Slabs: []protocol.Object{n}, Hashes: protocol.PackKeys([]protocol.Key{hash}), Blocks: protocol.PackBlocks([]protocol.Block{{}}),
	}))
	must(t, l.Free(c, []protocol.Object{n}))
	return g[0].Handle
}

func TestCachesTurnedOff(t *testing.T) {
	l := ledger.New(config())
	c := connect(t, l, "i")
	h := cachedSlab(t, l, c, ref("r", 1, time.Minute), protocol.Key{1})
	p, err := l.FindPrefix(c, protocol.FindPrefix{Hashes: protocol.PackKeys([]protocol.Key{{1}})})
	if err != nil || len(p.Blocks) != 0 {
		t.Errorf("found %+v, %v without a cache", p, err)
	}
	f, busy, err := l.FindMM(start, c, protocol.FindMM{Ref: ref("r", 1, time.Minute)})
	if err != nil || busy || f.Handle != nil || f.Ticket != 0 {
		t.Errorf("found %+v, %v, %v without a cache", f, busy, err)
	}
	must(t, l.End(start, "r"))
	if alive(t, l, c, h) {
		t.Error("without a cache a slab outlives its request")
	}
}

func TestCachesRefuse(t *testing.T) {
	cfg := config()
	cfg.MMCache, cfg.KVCache = 20*page, 20*page
	l := ledger.New(cfg)
	c := connect(t, l, "i")
	gateway, _, err := l.Connect(start, protocol.Hello{Instance: "g", Role: protocol.RoleGateway})
	must(t, err)
	_, _, err = l.FindMM(start, gateway, protocol.FindMM{Ref: ref("r", 1, time.Minute)})
	wantErr(t, err, mem.ErrDenied)
	_, err = l.FindPrefix(gateway, protocol.FindPrefix{})
	wantErr(t, err, mem.ErrDenied)
	_, err = l.CountPrefix(gateway, protocol.FindPrefix{})
	wantErr(t, err, mem.ErrDenied)
	_, err = l.CountPrefix(c, protocol.FindPrefix{Hashes: make([]byte, 33)})
	wantErr(t, err, mem.ErrInvalid)
	_, err = l.FindPrefix(c, protocol.FindPrefix{NPU: 7})
	wantErr(t, err, mem.ErrInvalid)
	_, err = l.FindPrefix(c, protocol.FindPrefix{Hashes: make([]byte, 33)})
	wantErr(t, err, mem.ErrInvalid)
	g, err := l.Alloc(start, c, []protocol.Spec{kv(protocol.Ref{})})
	must(t, err)
	n := []protocol.Object{name(g[0].Handle)}
	two := protocol.PackKeys([]protocol.Key{{1}, {2}})
	for what, v := range map[string]protocol.CacheBlocks{
		"more hashes than blocks": {Slabs: n, Hashes: two, Blocks: protocol.PackBlocks([]protocol.Block{{}})},
		"a slab out of range":     {Slabs: n, Hashes: two, Blocks: protocol.PackBlocks([]protocol.Block{{}, {Slab: 1}})},
		"a block out of range":    {Slabs: n, Hashes: two, Blocks: protocol.PackBlocks([]protocol.Block{{}, {Block: 60000}})},
		"half a block":            {Slabs: n, Hashes: two, Blocks: make([]byte, 12)},
		"another's slab":          {Slabs: []protocol.Object{{ID: 99}}},
	} {
		if err := l.CacheBlocks(c, v); err == nil || l.Stats().CachedBlocks != 0 {
			t.Errorf("%s: %v, %d blocks cached", what, err, l.Stats().CachedBlocks)
		}
	}
}
