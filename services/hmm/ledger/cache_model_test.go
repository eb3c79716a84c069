package ledger_test

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"

	"trireme.dev/services/hmm/ledger"
)

// stock is the oracle of TestCachesAgainstModel: the rules of the caches in their plainest form. Requests have one
// attempt and no deadline comes.
type stock struct {
	l      *ledger.Ledger
	conns  []ledger.Conn
	items  []*item // in order of birth
	ended  map[string]bool
	claims map[string]*held // by request
	making map[protocol.Key]*held
	stops  []protocol.Key // of making, ended in this step
	rests  int
	freed  int // objects that the ledger has freed
	born   int
	seals  int // requests that were ended after they had sealed something
}

type item struct {
	handle mem.Handle
	extent mem.Extent
	npu    int
	conns  map[ledger.Conn]int
	reqs   map[string]bool
	key    *protocol.Key
	blocks map[int]protocol.Key
	rest   int  // 0: somebody holds it
	old    bool // there before this step, which may have freed its place's former owner
}

// held is a claim and what is made under it.
type held struct {
	request    string
	conn       ledger.Conn
	generation uint64
	ticket     uint64
}

const (
	capacity = 14 * page
	mmLimit  = 5 * page
	kvLimit  = 8 * page
)

func (s *stock) settle(items ...*item) {
	slices.SortFunc(items, func(a, b *item) int { return cmp.Compare(b.handle.Generation, a.handle.Generation) })
	for _, o := range items {
		switch {
		case len(o.conns)+len(o.reqs) > 0:
		case o.key == nil && len(o.blocks) == 0:
			s.remove(o)
		default:
			s.rests++
			o.rest = s.rests
			limit := map[mem.Kind]int64{mem.KindMM: mmLimit, mem.KindKV: kvLimit}[o.handle.Kind]
			for s.resting(o.npu, o.handle.Kind) > limit {
				s.evict(o.npu, o.handle.Kind)
			}
		}
	}
}

func (s *stock) remove(o *item) {
	s.items = slices.DeleteFunc(s.items, func(x *item) bool { return x == o })
}

// resting is the bytes that only a cache keeps; kind 0: all kinds.
func (s *stock) resting(npu int, kind mem.Kind) (n int64) {
	for _, o := range s.items {
		if o.rest > 0 && o.npu == npu && (kind == 0 || o.handle.Kind == kind) {
			n += o.extent.Bytes
		}
	}
	return n
}

func (s *stock) evict(npu int, kind mem.Kind) {
	var first *item
	for _, o := range s.items {
		if o.rest > 0 && o.npu == npu && (kind == 0 || o.handle.Kind == kind) && (first == nil || o.rest < first.rest) {
			first = o
		}
	}
	s.remove(first)
}

func (s *stock) used(npu int) (n int64) {
	for _, o := range s.items {
		if o.npu == npu {
			n += o.extent.Bytes
		}
	}
	return n
}

// room evicts until so many bytes fit; false when they cannot.
func (s *stock) room(npu int, bytes int64) bool {
	if bytes > capacity-s.used(npu)+s.resting(npu, 0) {
		return false
	}
	for s.used(npu)+bytes > capacity {
		s.evict(npu, 0)
	}
	return true
}

func (s *stock) endClaim(request string) {
	s.stop(s.claims[request])
	delete(s.claims, request)
}

// stop ends what is made under a claim.
func (s *stock) stop(k *held) {
	for key, by := range s.making {
		if by == k {
			s.stopKey(key)
		}
	}
}

func (s *stock) stopKey(key protocol.Key) {
	delete(s.making, key)
	s.stops = append(s.stops, key)
}

// sealing is the request that what is sealed is for.
func (s *stock) sealing() string { return fmt.Sprint("sealing", s.seals) }

// block finds where the model has a hash.
func (s *stock) block(hash protocol.Key) (*item, int) {
	for _, o := range s.items {
		for b, h := range o.blocks {
			if h == hash {
				return o, b
			}
		}
	}
	return nil, 0
}

func (s *stock) check(t *rapid.T) {
	e := s.l.Effects()
	s.freed += len(e.Freed)
	for _, x := range e.Freed {
		for _, o := range s.items {
			if o.old && o.extent == x {
				t.Fatalf("%v was freed, but is held by %v and %v, or rests", x, o.conns, o.reqs)
			}
		}
	}
	if s.freed != s.born-len(s.items) {
		t.Fatalf("%d objects freed of %d, the model has %d left", s.freed, s.born, len(s.items))
	}
	order := func(a, b protocol.Key) int { return bytes.Compare(a[:], b[:]) }
	slices.SortFunc(s.stops, order)
	slices.SortFunc(e.Settled, order)
	if !slices.Equal(s.stops, e.Settled) {
		t.Fatalf("%d keys settled, want %d", len(e.Settled), len(s.stops))
	}
	s.stops = nil
	resting, mm, blocks := 0, 0, 0
	for _, o := range s.items {
		o.old = true
		if o.rest > 0 {
			resting++
		}
		if o.key != nil {
			mm++
		}
		blocks += len(o.blocks)
	}
	st := s.l.Stats()
	if st.Objects != len(s.items) || st.Resting != resting || st.CachedMM != mm || st.CachedBlocks != blocks {
		t.Fatalf("stats %+v; model: %d objects, %d resting, %d MM, %d blocks", st, len(s.items), resting, mm, blocks)
	}
	for _, n := range st.Memory[1:] {
		if n.Used+n.Padded != s.used(n.NPU) || n.Cached != s.resting(n.NPU, 0) || n.Free < 0 {
			t.Fatalf("NPU %d: %+v; model: %d bytes, %d resting", n.NPU, n, s.used(n.NPU), s.resting(n.NPU, 0))
		}
		for kind, u := range n.Kinds {
			k := map[string]mem.Kind{"mm": mem.KindMM, "kv": mem.KindKV}[kind]
			if u.Cached != s.resting(n.NPU, k) {
				t.Fatalf("NPU %d %s: %+v; model: %d resting", n.NPU, kind, u, s.resting(n.NPU, k))
			}
		}
	}
}

func someKeys(t *rapid.T) []protocol.Key {
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) protocol.Key {
		return protocol.Key{rapid.ByteRange(1, 20).Draw(t, "hash")}
	}), 0, 4).Draw(t, "hashes")
}

func TestCachesAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		cfg := config()
		cfg.Spaces = []int64{2000 * page, 2000 * page}
		cfg.NPUs = []ledger.NPU{{Bytes: capacity, Space: 1}, {Bytes: capacity, Space: 1}}
		cfg.MMCache, cfg.KVCache, cfg.MaxTombstones = mmLimit, kvLimit, 1000
		s := &stock{
			l: ledger.New(cfg), ended: map[string]bool{}, claims: map[string]*held{}, making: map[protocol.Key]*held{},
		}
		for range 2 {
			c, _, err := s.l.Connect(start, protocol.Hello{Instance: "i", Role: "encode"})
			if err != nil {
				t.Fatal(err)
			}
			s.conns = append(s.conns, c)
		}
		anyConn := func() ledger.Conn { return rapid.SampledFrom(s.conns).Draw(t, "conn") }
		anyKey := func() protocol.Key { return protocol.Key{rapid.ByteRange(1, 20).Draw(t, "key")} }
		anyRequest := func() string { return rapid.SampledFrom([]string{"a", "b", "c", "d", "e", "f"}).Draw(t, "request") }
		anyItem := func(t *rapid.T) *item {
			if len(s.items) == 0 {
				t.Skip("no objects")
			}
			return rapid.SampledFrom(s.items).Draw(t, "object")
		}
		hold := func(o *item, c ledger.Conn) {
			o.rest = 0
			o.conns[c]++
		}
		alloc := func(t *rapid.T, c ledger.Conn, kind mem.Kind) *item {
			npu, size := rapid.IntRange(0, 1).Draw(t, "npu"), rapid.Int64Range(1, 4*page).Draw(t, "bytes")
			g, err := s.l.Alloc(start, c, []protocol.Spec{{Kind: kind, NPU: npu, Bytes: size}})
			if !s.room(npu, mem.Padded(size, page)) {
				if !errors.Is(err, mem.ErrExhausted) {
					t.Fatalf("alloc without room: %v", err)
				}
				return nil
			}
			if err != nil {
				t.Fatal(err)
			}
			s.born++
			o := &item{
				handle: g[0].Handle, extent: g[0].Extent, npu: npu, conns: map[ledger.Conn]int{c: 1}, reqs: map[string]bool{},
				blocks: map[int]protocol.Key{},
			}
			s.items = append(s.items, o)
			return o
		}
		free := func(t *rapid.T, c ledger.Conn, o *item) {
			err := s.l.Free(c, []protocol.Object{name(o.handle)})
			if (o.conns[c] > 0) != (err == nil) {
				t.Fatalf("free with %d holds: %v", o.conns[c], err)
			}
			if err == nil {
				if o.conns[c]--; o.conns[c] == 0 {
					delete(o.conns, c)
				}
				s.settle(o)
			}
		}
		cache := func(t *rapid.T, c ledger.Conn, o *item, first int, hashes ...protocol.Key) {
			v := protocol.CacheBlocks{Slabs: []protocol.Object{name(o.handle)}, Hashes: protocol.PackKeys(hashes)}
			var blocks []protocol.Block
			bad := o.conns[c] == 0 || o.handle.Kind != mem.KindKV
			named := maps.Clone(o.blocks)
			for i, hash := range hashes {
				blocks = append(blocks, protocol.Block{Block: first + i, CRC: 7})
				old, ok := o.blocks[first+i]
				bad = bad || ok && old != hash
				named[first+i] = hash
			}
			v.Blocks = protocol.PackBlocks(blocks)
			err := s.l.CacheBlocks(c, v)
			if bad {
				if !errors.Is(err, mem.ErrInvalid) {
					t.Fatalf("cached blocks %+v of %+v: %v", blocks, o, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			for i, hash := range hashes { // a block moves to the slab that has more of them
				at, block := s.block(hash)
				switch {
				case at == nil:
				case at == o || len(at.blocks) >= len(named):
					continue
				default:
					delete(at.blocks, block)
					if at.rest > 0 && len(at.blocks) == 0 {
						s.remove(at)
					}
				}
				o.blocks[first+i] = hash
			}
		}
		publish := func(t *rapid.T, c ledger.Conn, key protocol.Key, o *item) {
			by := s.making[key]
			if o.conns[c] > 0 && !o.handle.Sealed {
				h, err := s.l.Seal(start, c, protocol.Seal{
					Ref: ref(s.sealing(), 1, time.Hour), Items: []protocol.Sealing{{Object: name(o.handle)}},
				})
				if err != nil {
					t.Fatal(err)
				}
				o.handle = h[0]
				o.reqs[s.sealing()] = true
			}
			err := s.l.PublishMM(c, protocol.PublishMM{Key: key, Ticket: by.ticket, Object: name(o.handle)})
			switch {
			case o.conns[c] == 0 || o.handle.Kind != mem.KindMM || o.key != nil:
				if !errors.Is(err, mem.ErrInvalid) {
					t.Fatalf("published %+v: %v", o, err)
				}
			case by.conn != c:
				if !errors.Is(err, mem.ErrFenced) {
					t.Fatalf("published on another's ticket: %v", err)
				}
			case err != nil:
				t.Fatal(err)
			default:
				s.stopKey(key)
				o.key = &key
			}
		}
		end := func(t *rapid.T, r string) {
			if err := s.l.End(start, r); err != nil {
				t.Fatal(err)
			}
			s.ended[r] = true
			if r == s.sealing() {
				s.seals++
			}
			s.endClaim(r)
			var lost []*item
			for _, o := range s.items {
				if o.reqs[r] {
					delete(o.reqs, r)
					lost = append(lost, o)
				}
			}
			s.settle(lost...)
		}
		t.Repeat(map[string]func(*rapid.T){
			"reconnect": func(t *rapid.T) {
				i := rapid.IntRange(0, 1).Draw(t, "connection")
				old := s.conns[i]
				s.l.Disconnect(old)
				for _, k := range s.claims {
					if k.conn == old { // the claim stays, an orphan; what it makes ends
						s.stop(k)
						k.conn = 0
					}
				}
				s.l.Reap(start, old)
				var lost []*item
				for _, o := range s.items {
					if o.conns[old] > 0 {
						delete(o.conns, old)
						lost = append(lost, o)
					}
				}
				s.settle(lost...)
				s.conns[i], _, _ = s.l.Connect(start, protocol.Hello{Instance: "i", Role: "encode"})
			},
			"alloc": func(t *rapid.T) {
				kind := rapid.SampledFrom([]mem.Kind{mem.KindMM, mem.KindKV}).Draw(t, "kind")
				alloc(t, anyConn(), kind)
			},
			"store KV": func(t *rapid.T) { // the way of a finished sequence, without detours
				c := anyConn()
				o := alloc(t, c, mem.KindKV)
				if o == nil {
					return
				}
				for range rapid.IntRange(1, 2).Draw(t, "times") {
					cache(t, c, o, rapid.IntRange(0, 2).Draw(t, "block"), someKeys(t)...)
				}
				free(t, c, o)
			},
			"store MM": func(t *rapid.T) { // the same of a picture
				c, key := anyConn(), anyKey()
				if s.making[key] != nil || slices.ContainsFunc(s.items, func(o *item) bool { return o.key != nil && *o.key == key }) {
					t.Skip("there already")
				}
				o := alloc(t, c, mem.KindMM)
				if o == nil {
					return
				}
				r := s.sealing()
				part := protocol.Part{Request: r, Attempt: 1, Stage: "encode"}
				k, err := s.l.Claim(start, c, protocol.Claim{Part: part})
				if err != nil {
					t.Fatal(err)
				}
				found, _, err := s.l.FindMM(start, c, protocol.FindMM{Key: key, Ref: ref(r, 1, time.Hour), Part: part, Generation: k.Generation})
				if err != nil {
					t.Fatal(err)
				}
				s.making[key] = &held{request: r, conn: c, generation: k.Generation, ticket: found.Ticket}
				publish(t, c, key, o)
				free(t, c, o)
				end(t, r)
			},
			"attach": func(t *rapid.T) {
				c, o, npu := anyConn(), anyItem(t), rapid.IntRange(-1, 1).Draw(t, "npu")
				_, err := s.l.Attach(c, protocol.Attach{NPU: npu, Handles: []mem.Handle{o.handle}})
				rested := o.rest > 0
				o.rest = 0
				if npu >= 0 && npu != o.npu {
					if !s.room(npu, o.extent.Bytes) {
						if !errors.Is(err, mem.ErrExhausted) {
							t.Fatalf("hand-over without room: %v", err)
						}
						if rested {
							s.settle(o)
						}
						return
					}
					o.npu = npu
				}
				if err != nil {
					t.Fatal(err)
				}
				hold(o, c)
			},
			"free": func(t *rapid.T) { free(t, anyConn(), anyItem(t)) },
			"claim": func(t *rapid.T) {
				c, r := anyConn(), anyRequest()
				got, err := s.l.Claim(start, c, protocol.Claim{Part: protocol.Part{Request: r, Attempt: 1, Stage: "encode"}, Reply: "x"})
				if s.ended[r] {
					if !errors.Is(err, mem.ErrEnded) {
						t.Fatalf("claim of an ended request: %v", err)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				s.endClaim(r)
				s.claims[r] = &held{request: r, conn: c, generation: got.Generation}
			},
			"find MM": func(t *rapid.T) {
				c, key, r := anyConn(), anyKey(), anyRequest()
				k := s.claims[r]
				f := protocol.FindMM{Key: key, Ref: ref(r, 1, time.Hour), Part: protocol.Part{Request: r, Attempt: 1, Stage: "encode"}}
				if k != nil {
					f.Generation = k.generation
				}
				found, busy, err := s.l.FindMM(start, c, f)
				if s.ended[r] {
					if !errors.Is(err, mem.ErrEnded) {
						t.Fatalf("found for an ended request: %v", err)
					}
					return
				}
				for _, o := range s.items {
					if o.key != nil && *o.key == key {
						if err != nil || found.Handle == nil || found.Handle.Generation != o.handle.Generation {
							t.Fatalf("found %+v, %v; want %v", found, err, o.handle)
						}
						o.rest = 0
						o.reqs[r] = true
						return
					}
				}
				switch {
				case s.making[key] != nil:
					if !busy || err != nil {
						t.Fatalf("found %+v, busy %v, %v, while it is being made", found, busy, err)
					}
				case k == nil || k.conn != c:
					if !errors.Is(err, mem.ErrFenced) {
						t.Fatalf("began without a claim: %+v, %v", found, err)
					}
				case slices.ContainsFunc(slices.Collect(maps.Values(s.making)), func(by *held) bool { return by == k }):
					if !errors.Is(err, mem.ErrInvalid) {
						t.Fatalf("began twice under one claim: %+v, %v", found, err)
					}
				default:
					if err != nil || busy || found.Handle != nil || found.Ticket == 0 {
						t.Fatalf("found %+v, busy %v, %v; want a ticket", found, busy, err)
					}
					k.ticket = found.Ticket
					s.making[key] = k
				}
			},
			"publish MM": func(t *rapid.T) {
				c, key, o := anyConn(), anyKey(), anyItem(t)
				if s.making[key] == nil {
					t.Skip("not being made")
				}
				publish(t, c, key, o)
			},
			"abandon MM": func(t *rapid.T) {
				c, key := anyConn(), anyKey()
				by := s.making[key]
				if by == nil {
					t.Skip("not being made")
				}
				s.l.AbandonMM(c, protocol.AbandonMM{Key: key, Ticket: by.ticket})
				if by.conn == c {
					s.stopKey(key)
				}
			},
			"cache blocks": func(t *rapid.T) {
				cache(t, anyConn(), anyItem(t), rapid.IntRange(0, 2).Draw(t, "block"), someKeys(t)...)
			},
			"find prefix": func(t *rapid.T) {
				c := anyConn()
				hashes := someKeys(t)
				f := protocol.FindPrefix{NPU: rapid.IntRange(0, 1).Draw(t, "npu"), Hashes: protocol.PackKeys(hashes)}
				n, err := s.l.CountPrefix(c, f)
				if err != nil {
					t.Fatal(err)
				}
				p, err := s.l.FindPrefix(c, f)
				if err != nil {
					t.Fatal(err)
				}
				blocks, err := protocol.UnpackBlocks(p.Blocks)
				if n != len(blocks) {
					t.Fatalf("counted %d blocks, found %d", n, len(blocks))
				}
				if err != nil {
					t.Fatal(err)
				}
				got := map[*item]bool{}
				for i, hash := range hashes {
					o, block := s.block(hash)
					if o == nil {
						if len(blocks) != i {
							t.Fatalf("found %d blocks, want %d", len(blocks), i)
						}
						break
					}
					if i >= len(blocks) || blocks[i].Block != block || p.Slabs[blocks[i].Slab].Handle.Generation != o.handle.Generation {
						t.Fatalf("block %d is %+v in %+v; want %d of %v", i, blocks, p.Slabs, block, o.handle)
					}
					got[o] = true
				}
				if len(got) != len(p.Slabs) {
					t.Fatalf("%d slabs, want %d", len(p.Slabs), len(got))
				}
				for o := range got {
					hold(o, c)
				}
			},
			"forget": func(t *rapid.T) {
				c, o := anyConn(), anyItem(t)
				err := s.l.Forget(c, []protocol.Object{name(o.handle)})
				if (o.conns[c] > 0) != (err == nil) {
					t.Fatalf("forgot with %d holds: %v", o.conns[c], err)
				}
				if err == nil {
					o.key, o.blocks = nil, map[int]protocol.Key{}
				}
			},
			"end": func(t *rapid.T) {
				r := rapid.SampledFrom([]string{"a", "b", "c", s.sealing()}).Draw(t, "request")
				if s.ended[r] {
					t.Skip("ended")
				}
				end(t, r)
			},
			"": s.check,
		})
	})
}
