package ledger_test

import (
	"reflect"
	"testing"
	"time"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"

	"trireme.dev/services/hmm/ledger"
)

// What lies where, by domain: cached blocks as far as they follow one another, objects and their copies; for instances that have
// the role and are there.
func TestLocate(t *testing.T) {
	cfg := config()
	cfg.Spaces = []int64{40 * page, 40 * page, 40 * page, 40 * page}
	cfg.NPUs = []ledger.NPU{{Bytes: 20 * page, Space: 1}, {Bytes: 20 * page, Space: 2}, {Bytes: 20 * page, Space: 3}}
	cfg.KVCache = 20 * page
	l := ledger.New(cfg)
	open := func(instance, role string) ledger.Conn {
		t.Helper()
		c, _, err := l.Connect(start, protocol.Hello{Instance: instance, Role: role, NPUs: 1})
		must(t, err)
		return c
	}
	a, b := open("a", "encode+prefill"), open("b", "prefill")
	open("c", "decode")
	hashes := []protocol.Key{{1}, {2}, {3}, {4}}
	cached := func(c ledger.Conn, npu int, which ...int) {
		t.Helper()
		g, err := l.Alloc(start, c, []protocol.Spec{{Kind: mem.KindKV, NPU: npu, Bytes: page}})
		must(t, err)
		var keys []protocol.Key
		var blocks []protocol.Block
		for n, i := range which {
			keys, blocks = append(keys, hashes[i]), append(blocks, protocol.Block{Block: n})
		}
		must(t, l.CacheBlocks(c, protocol.CacheBlocks{Slabs: []protocol.Object{object(g[0])}, Hashes: protocol.PackKeys(keys), Blocks: protocol.PackBlocks(blocks)}))
	}
	cached(a, 0, 0, 1)
	cached(b, 1, 0, 2) // 2 does not follow, but goes on where a's end
	picture := func() (protocol.Grant, mem.Handle) {
		t.Helper()
		g, err := l.Alloc(start, a, []protocol.Spec{{Kind: mem.KindMM, NPU: 0, Bytes: page}})
		must(t, err)
		sealed, err := l.Seal(start, a, protocol.Seal{Ref: ref("r", 1, time.Minute), Items: []protocol.Sealing{{Object: object(g[0]), CRC: 7}}})
		must(t, err)
		return g[0], sealed[0]
	}
	first, _ := picture()
	second, sealed := picture()
	far, err := l.Attach(b, protocol.Attach{Access: mem.ReadOnly, NPU: 1, Handles: []mem.Handle{sealed}})
	must(t, err)
	to, err := l.Alloc(start, b, []protocol.Spec{{Kind: mem.KindMM, NPU: 1, Bytes: page}})
	must(t, err)
	_, err = l.Copied(b, []protocol.Copy{{Source: object(far[0]), Copy: object(to[0])}})
	must(t, err)
	gone := object(first)
	gone.Generation--
	q := protocol.Locate{Role: "prefill", Hashes: protocol.PackKeys(hashes), Objects: []protocol.Object{gone, object(first), object(second)}}
	got, err := l.Locate(b, q)
	must(t, err)
	want := protocol.Located{Blocks: 3, Sites: []protocol.Site{
		{Instance: "a", NPU: 0, Blocks: 2, Near: []int{1, 2}}, {Instance: "b", NPU: 1, Blocks: 1, Near: []int{2}},
	}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("located %+v, want %+v", got, want)
	}
	if got, err = l.Locate(b, protocol.Locate{Role: "decode", Hashes: q.Hashes}); err != nil || len(got.Sites) != 0 {
		t.Errorf("for decoders %+v, %v: they have nothing", got, err)
	}
	if p, e, none := l.Reach("prefill", hashes), l.Reach("encode", hashes[:2]), l.Reach("none", hashes); p != 3 || e != 2 || none != 0 {
		t.Errorf("others are told %d, %d and %d blocks", p, e, none)
	}
	l.Disconnect(a)
	if n := l.Reach("encode", hashes); n != 0 {
		t.Errorf("others are told %d blocks although nobody could use them", n)
	}
	if got, err = l.Locate(b, q); err != nil || got.Blocks != 3 || len(got.Sites) != 1 || got.Sites[0].Instance != "b" {
		t.Errorf("without a: %+v, %v", got, err)
	}
}
