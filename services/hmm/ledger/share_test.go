package ledger_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"trireme.dev/shared/hbm/protocol"
	sequences "trireme.dev/shared/kv"
	"trireme.dev/shared/mem"

	"trireme.dev/services/hmm/ledger"
)

// sharer is a sequence of blocks: the first common ones are those of its family.
type sharer struct {
	id             string
	number         uint64
	family, common int
	prompt, blocks int
	slabs          []mem.Handle // in order of their blocks
	decoding       bool         // the decode NPU has it
}

func (s *sharer) hash(i int) (k protocol.Key) {
	if i < s.common {
		k[0] = byte(1 + s.family)
	} else {
		binary.BigEndian.PutUint64(k[1:], s.number+1)
	}
	k[31] = byte(i)
	return k
}

func (s *sharer) hashes(n int) (keys []protocol.Key) {
	for i := range n {
		keys = append(keys, s.hash(i))
	}
	return keys
}

// kitchen lets sequences with common beginnings come, grow and go on two NPUs, as prefill and decode do with the ledger.
type kitchen struct {
	*rapid.T
	l        *ledger.Ledger
	prefill  ledger.Conn
	decode   ledger.Conn
	live     []*sharer
	born     uint64
	contents map[blockName]protocol.Key // what was written
}

func (k *kitchen) must(err error) {
	if err != nil {
		k.Helper()
		k.Fatal(err)
	}
}

type blockName struct {
	generation uint64
	block      int
}

const sharedCapacity = 6 // slabs of each NPU

// begin is prefill's way with a prompt: whole slabs are shared, the rest is copied, or computed when there is no room to
// copy from. False when there is no room.
func (k *kitchen) begin(s *sharer) bool {
	found, err := k.l.FindPrefix(k.prefill, protocol.FindPrefix{NPU: 0, Hashes: protocol.PackKeys(s.hashes(s.prompt - 1))})
	k.must(err)
	blocks, err := protocol.UnpackBlocks(found.Blocks)
	k.must(err)
	var refs []sequences.BlockRef
	for i, b := range blocks {
		if got := k.contents[blockName{found.Slabs[b.Slab].Handle.Generation, b.Block}]; got != s.hash(i) {
			k.Fatalf("block %d of %s was found to be %x", i, s.id, got)
		}
		refs = append(refs, sequences.BlockRef{Slab: b.Slab, Block: b.Block})
	}
	shared := sequences.Whole(refs)
	var names []protocol.Object
	for _, g := range found.Slabs {
		names = append(names, name(g.Handle))
	}
	whole, copied := names[:shared/sequences.SlabBlocks], names[shared/sequences.SlabBlocks:]
	specs := slices.Repeat([]protocol.Spec{kv(protocol.Ref{})}, (s.prompt-shared+sequences.SlabBlocks-1)/sequences.SlabBlocks)
	own, err := k.l.Alloc(start, k.prefill, specs)
	if errors.Is(err, mem.ErrExhausted) && len(copied) > 0 {
		k.must(k.l.Free(k.prefill, copied))
		copied = nil
		own, err = k.l.Alloc(start, k.prefill, specs)
	}
	k.must(k.l.Free(k.prefill, copied))
	if errors.Is(err, mem.ErrExhausted) {
		k.must(k.l.Free(k.prefill, whole))
		return false
	}
	k.must(err)
	for i := range whole {
		s.slabs = append(s.slabs, found.Slabs[i].Handle)
	}
	for _, g := range own {
		s.slabs = append(s.slabs, g.Handle)
	}
	k.write(s, shared, s.prompt)
	k.cache(k.prefill, s, shared, s.prompt)
	all := whole
	for _, g := range own {
		all = append(all, name(g.Handle))
	}
	k.must(k.l.Keep(start, k.prefill, protocol.Keep{Ref: ref(s.id, 1, time.Hour), Objects: all}))
	k.must(k.l.Free(k.prefill, all))
	s.blocks = s.prompt
	k.live = append(k.live, s)
	return true
}

func (k *kitchen) write(s *sharer, from, to int) {
	for i := from; i < to; i++ {
		k.contents[blockName{s.slabs[i/sequences.SlabBlocks].Generation, i % sequences.SlabBlocks}] = s.hash(i)
	}
}

func (k *kitchen) cache(c ledger.Conn, s *sharer, from, to int) {
	v := protocol.CacheBlocks{Hashes: protocol.PackKeys(s.hashes(to)[from:])}
	for _, h := range s.slabs {
		v.Slabs = append(v.Slabs, name(h))
	}
	var blocks []protocol.Block
	for i := from; i < to; i++ {
		blocks = append(blocks, protocol.Block{Slab: i / sequences.SlabBlocks, Block: i % sequences.SlabBlocks})
	}
	v.Blocks = protocol.PackBlocks(blocks)
	k.must(k.l.CacheBlocks(c, v))
}

// attach is the decoder's way with what prefill has left. False when there is no room.
func (k *kitchen) attach(s *sharer) bool {
	if s.decoding {
		return true
	}
	_, err := k.l.Attach(k.decode, protocol.Attach{Access: mem.ReadOnly, NPU: 1, Handles: s.slabs})
	if !errors.Is(err, mem.ErrExhausted) {
		k.must(err)
		s.decoding = true
	}
	return s.decoding
}

// grow makes a sequence one block longer. False when there is no room.
func (k *kitchen) grow(s *sharer) bool {
	if s.blocks%sequences.SlabBlocks == 0 {
		spec := kv(ref(s.id, 1, time.Hour))
		spec.NPU = 1
		g, err := k.l.Alloc(start, k.decode, []protocol.Spec{spec})
		if errors.Is(err, mem.ErrExhausted) {
			return false
		}
		k.must(err)
		s.slabs = append(s.slabs, g[0].Handle)
	}
	s.blocks++
	k.write(s, s.blocks-1, s.blocks)
	return true
}

// end ends a sequence; one that has ended well leaves its blocks to others.
func (k *kitchen) end(s *sharer, well bool) {
	if s.decoding {
		if well {
			k.cache(k.decode, s, s.prompt/sequences.SlabBlocks*sequences.SlabBlocks, s.blocks)
		}
		var names []protocol.Object
		for _, h := range s.slabs {
			names = append(names, name(h))
		}
		k.must(k.l.Free(k.decode, names))
	}
	k.must(k.l.End(start, s.id))
	k.live = slices.DeleteFunc(k.live, func(x *sharer) bool { return x == s })
}

// Sequences with common beginnings, on NPUs that a few of them fill: each finds only blocks with its own content, holds no
// more slabs than its length needs, and whichever is left alone gets all of the NPU, however much of the others it shares
// and the caches keep. So nothing waits for ever where the youngest make room for the oldest (services/decoder, room.go).
func TestSharedSlabsLeaveRoom(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		cfg := config()
		cfg.Spaces = []int64{100 * page, 100 * page}
		cfg.NPUs = []ledger.NPU{{Bytes: sharedCapacity * page, Space: 1}, {Bytes: sharedCapacity * page, Space: 1}}
		cfg.KVCache, cfg.MaxTombstones = rapid.Int64Range(1, sharedCapacity).Draw(t, "cache")*page, 100
		k := &kitchen{T: t, l: ledger.New(cfg), contents: map[blockName]protocol.Key{}}
		k.prefill, k.decode = connectRole(t, k.l, "prefill"), connectRole(t, k.l, "decode")
		const most = sharedCapacity * sequences.SlabBlocks
		draw := func(t *rapid.T) *sharer {
			k.born++
			s := &sharer{id: fmt.Sprint("r", k.born), number: k.born, family: rapid.IntRange(0, 2).Draw(t, "family")}
			s.prompt = rapid.IntRange(1, most).Draw(t, "prompt")
			s.common = rapid.IntRange(0, most).Draw(t, "common")
			return s
		}
		one := func(t *rapid.T) *sharer {
			if len(k.live) == 0 {
				t.Skip("none")
			}
			return rapid.SampledFrom(k.live).Draw(t, "sequence")
		}
		t.Repeat(map[string]func(*rapid.T){
			"begin": func(t *rapid.T) { k.begin(draw(t)) },
			"go on": func(t *rapid.T) {
				s := one(t)
				for range rapid.IntRange(1, 40).Draw(t, "blocks") {
					if s.blocks == most || !k.attach(s) || !k.grow(s) {
						break
					}
				}
			},
			"end": func(t *rapid.T) { k.end(one(t), rapid.Bool().Draw(t, "well")) },
			"": func(t *rapid.T) {
				held := map[uint64]bool{}
				for _, s := range k.live {
					if want := (s.blocks + sequences.SlabBlocks - 1) / sequences.SlabBlocks; len(s.slabs) != want {
						t.Fatalf("%d slabs for %d blocks", len(s.slabs), s.blocks)
					}
					for _, h := range s.slabs {
						held[h.Generation] = true
					}
				}
				if st := k.l.Stats(); st.Objects-st.Resting != len(held) {
					t.Fatalf("%d slabs are held, want %d", st.Objects-st.Resting, len(held))
				}
			},
		})
		var last *sharer
		if len(k.live) > 0 {
			last = rapid.SampledFrom(k.live).Draw(t, "last")
		} else if last = draw(t); !k.begin(last) {
			t.Fatalf("no room for %d blocks on an empty NPU", last.prompt)
		}
		for _, s := range slices.Clone(k.live) {
			if s != last {
				k.end(s, true)
			}
		}
		for last.blocks < most {
			if !k.attach(last) || !k.grow(last) {
				t.Fatalf("alone on its NPU, no room at %d blocks of %d", last.blocks, most)
			}
		}
	})
}

func connectRole(t *rapid.T, l *ledger.Ledger, role string) ledger.Conn {
	c, _, err := l.Connect(start, protocol.Hello{Instance: role, Role: role})
	if err != nil {
		t.Fatal(err)
	}
	return c
}
