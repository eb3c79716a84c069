package ledger_test

import (
	"errors"
	"maps"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"

	"trireme.dev/services/hmm/ledger"
)

// shelves is the oracle of TestWeightsAgainstModel: the rules of weight sets in their plainest form.
type shelves struct {
	l       *ledger.Ledger
	conns   map[ledger.Conn]bool // value: connected, not only waiting to be reaped
	sets    []*shelf             // all that have memory or holders, forgotten ones too
	stops   []protocol.Key       // of making, ended in this step
	rests   int
	born    int
	freed   int
	handles int // generations drawn so far are above
}

type shelf struct {
	id        uint64
	key       protocol.Key
	sizes     []int64 // of all objects
	grants    []protocol.Grant
	sealed    int
	maker     ledger.Conn
	conns     map[ledger.Conn]int
	alone     []map[ledger.Conn]int // holds on single objects
	freed     []bool
	forgotten bool
	rest      int // of its last settling; 0: held
}

const weightsRoom = 24 * page

// plans are the sizes of the sets by key.
var plans = map[protocol.Key][]int64{
	{1}: {page, 2*page - 5, 1, 3 * page, page}, // 8 pages
	{2}: {4 * page, 4*page - 1, 4 * page},      // 12 pages
	{3}: {page / 2, 6 * page},                  // 7 pages
}

func bytesOf(sizes []int64) (n int64) {
	for _, s := range sizes {
		n += s
	}
	return n
}

func (w *shelves) set(key protocol.Key) *shelf {
	for _, s := range w.sets {
		if s.key == key && !s.forgotten {
			return s
		}
	}
	return nil
}

// eachObject visits the objects that have memory.
func (w *shelves) eachObject(f func(s *shelf, i int)) {
	for _, s := range w.sets {
		for i := range s.grants {
			if !s.freed[i] {
				f(s, i)
			}
		}
	}
}

func (w *shelves) used() (n int64) {
	w.eachObject(func(s *shelf, i int) { n += s.grants[i].Extent.Bytes })
	return n
}

// idle is the bytes of objects that nobody holds.
func (w *shelves) idle() (n int64) {
	w.eachObject(func(s *shelf, i int) {
		if len(s.conns)+len(s.alone[i]) == 0 {
			n += s.grants[i].Extent.Bytes
		}
	})
	return n
}

// room evicts until so many bytes fit; false when they cannot.
func (w *shelves) room(bytes int64) bool {
	if bytes > weightsRoom-w.used()+w.idle() {
		return false
	}
	for w.used()+bytes > weightsRoom {
		var first *shelf
		w.eachObject(func(s *shelf, i int) {
			if len(s.conns)+len(s.alone[i]) == 0 && (first == nil || s.rest < first.rest) {
				first = s
			}
		})
		w.forget(first)
	}
	return true
}

func (w *shelves) forget(s *shelf) {
	s.forgotten = true
	w.sweep()
}

// sweep frees what nobody holds of forgotten sets.
func (w *shelves) sweep() {
	for _, s := range w.sets {
		for i := range s.grants {
			if s.forgotten && len(s.conns)+len(s.alone[i]) == 0 {
				s.freed[i] = true
			}
		}
	}
}

func (w *shelves) leave(s *shelf, c ledger.Conn) {
	delete(s.conns, c)
	if s.maker == c {
		s.maker = 0
		w.stops = append(w.stops, s.key)
	}
	if len(s.conns) == 0 {
		if len(s.grants) == 0 {
			s.forgotten = true
		}
		w.rests++
		s.rest = w.rests
	}
	w.sweep()
}

func (w *shelves) check(t *rapid.T) {
	e := w.l.Effects()
	if len(e.Freed) > 0 {
		w.eachObject(func(s *shelf, i int) {
			if slices.Contains(e.Freed, s.grants[i].Extent) && s.grants[i].Handle.Generation <= uint64(w.handles) {
				t.Fatalf("object %d of set %x was freed, but is there", i, s.key[0])
			}
		})
	}
	w.freed += len(e.Freed)
	there := 0
	w.eachObject(func(s *shelf, i int) {
		there++
		w.handles = max(w.handles, int(s.grants[i].Handle.Generation))
	})
	if w.freed != w.born-there {
		t.Fatalf("%d objects freed of %d, the model has %d", w.freed, w.born, there)
	}
	if !slices.Equal(w.stops, e.Settled) {
		t.Fatalf("settled %d keys, want %d", len(e.Settled), len(w.stops))
	}
	w.stops = nil
	st := w.l.Stats()
	if n := st.Shared[0]; n.NPU != mem.Shared(1) || n.Used+n.Padded != w.used() || n.Cached != w.idle() || n.Free != weightsRoom-w.used() {
		t.Fatalf("the domain's account is %+v; model: %d used, %d idle", n, w.used(), w.idle())
	}
	if st.Objects != 0 || st.Resting != 0 {
		t.Fatalf("weights count as %d objects, %d at rest", st.Objects, st.Resting)
	}
	open := 0
	for _, s := range w.sets {
		if s.forgotten {
			continue
		}
		open++
		if !slices.ContainsFunc(st.Weights, func(x protocol.WeightsStats) bool {
			return x.Key[:2] == [...]string{"01", "02", "03"}[s.key[0]-1] && x.Bytes == bytesOf(s.sizes) &&
				x.Loaded == bytesOf(s.sizes[:s.sealed]) && x.Holders == len(s.conns)
		}) {
			t.Fatalf("stats %+v lack set %x of %d objects, %d final, %d holders", st.Weights, s.key[0], len(s.sizes), s.sealed, len(s.conns))
		}
	}
	if open != len(st.Weights) {
		t.Fatalf("%d sets can be opened, stats have %+v", open, st.Weights)
	}
	if n := st.Memory[1]; n.Used != 0 {
		t.Fatalf("weights are booked to an NPU: %+v", n)
	}
}

func TestWeightsAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		cfg := config()
		cfg.Spaces, cfg.Weights = []int64{40 * page, 1000 * page}, weightsRoom
		w := &shelves{l: ledger.New(cfg), conns: map[ledger.Conn]bool{}}
		anyConn := func(t *rapid.T, connected bool) ledger.Conn {
			var ids []ledger.Conn
			for id, on := range w.conns {
				if on == connected {
					ids = append(ids, id)
				}
			}
			if len(ids) == 0 {
				t.Skip("no such connection")
			}
			slices.Sort(ids)
			return rapid.SampledFrom(ids).Draw(t, "conn")
		}
		anySet := func(t *rapid.T) *shelf {
			if len(w.sets) == 0 {
				t.Skip("no sets")
			}
			return rapid.SampledFrom(w.sets).Draw(t, "set")
		}
		open := func(t *rapid.T, c ledger.Conn, key protocol.Key) *shelf {
			sizes := plans[key]
			got, busy, err := w.l.OpenWeights(c, protocol.OpenWeights{Key: key, Objects: len(sizes), Bytes: bytesOf(sizes)})
			s := w.set(key)
			switch {
			case s == nil && bytesOf(sizes) > weightsRoom-w.used()+w.idle():
				if !errors.Is(err, mem.ErrExhausted) {
					t.Fatalf("opened without room: %+v, %v", got, err)
				}
				return nil
			case s != nil && s.maker != 0:
				if !busy || err != nil || got.Set != 0 || got.Loaded != bytesOf(s.sizes[:s.sealed]) {
					t.Fatalf("opened %+v, busy %v, %v, while it is being made", got, busy, err)
				}
				return nil
			case s == nil:
				s = &shelf{id: got.Set, key: key, sizes: sizes, conns: map[ledger.Conn]int{}}
				w.sets = append(w.sets, s)
			}
			if err != nil || busy || got.Set != s.id || got.Sealed != s.sealed || got.Make != (s.sealed < len(sizes)) {
				t.Fatalf("opened %+v, busy %v, %v; want set %d with %d of %d final", got, busy, err, s.id, s.sealed, len(sizes))
			}
			s.conns[c]++
			s.rest = 0
			if got.Make {
				s.maker = c
			}
			return s
		}
		place := func(t *rapid.T, c ledger.Conn, s *shelf, first, n int) {
			sizes := s.sizes[first : first+n]
			grants, fresh, err := w.l.PlaceWeights(c, protocol.PlaceWeights{Set: s.id, First: first, Sizes: sizes})
			there := s.sealed
			if s.maker == c {
				there = len(s.grants)
			}
			if s.conns[c] == 0 || first+n > there && (s.maker != c || first > there) {
				if !errors.Is(err, mem.ErrInvalid) {
					t.Fatalf("placed %d to %d of %d: %v", first, first+n, there, err)
				}
				return
			}
			var need int64
			for _, size := range s.sizes[min(there, first+n) : first+n] {
				need += mem.Padded(size, page)
			}
			if !w.room(need) {
				if !errors.Is(err, mem.ErrExhausted) {
					t.Fatalf("placed without room: %v", err)
				}
				return
			}
			if err != nil || fresh != max(first+n-there, 0) || len(grants) != n {
				t.Fatalf("placed %d to %d of %d: %d grants, %d fresh, %v", first, first+n, there, len(grants), fresh, err)
			}
			for i, g := range grants {
				if g.Handle.Bytes != sizes[i] || g.Handle.NPU != int16(mem.Shared(1)) || g.Handle.Sealed != (first+i < s.sealed) ||
					first+i < there && g.Extent != s.grants[first+i].Extent {
					t.Fatalf("object %d is %+v", first+i, g)
				}
			}
			if fresh > 0 && rapid.IntRange(0, 9).Draw(t, "system") == 0 { // the system has no memory after all
				w.l.UndoWeights(c, s.id, fresh)
				w.born += fresh // and they are freed
				return
			}
			w.born += fresh
			for _, g := range grants[n-fresh:] {
				s.grants = append(s.grants, g)
				s.alone = append(s.alone, map[ledger.Conn]int{})
				s.freed = append(s.freed, false)
			}
		}
		seal := func(t *rapid.T, c ledger.Conn, s *shelf, first, n int) {
			err := w.l.SealWeights(c, protocol.SealWeights{Set: s.id, First: first, CRCs: make([]uint32, n)})
			switch {
			case s.conns[c] == 0:
				if !errors.Is(err, mem.ErrInvalid) {
					t.Fatalf("sealed without holding: %v", err)
				}
			case s.maker != c:
				if !errors.Is(err, mem.ErrFenced) {
					t.Fatalf("sealed by another one: %v", err)
				}
			case first != s.sealed || n > len(s.grants)-s.sealed:
				if !errors.Is(err, mem.ErrInvalid) {
					t.Fatalf("sealed %d from %d, %d of %d are: %v", n, first, s.sealed, len(s.grants), err)
				}
			case err != nil:
				t.Fatal(err)
			default:
				if s.sealed += n; s.sealed == len(s.sizes) {
					s.maker = 0
					w.stops = append(w.stops, s.key)
				}
			}
		}
		anyKey := func(t *rapid.T) protocol.Key { return protocol.Key{rapid.ByteRange(1, 3).Draw(t, "key")} }
		connect := func() {
			c, _, err := w.l.Connect(start, protocol.Hello{Instance: "i", Role: "decode"})
			if err != nil {
				t.Fatal(err)
			}
			w.conns[c] = true
		}
		connect()
		connect()
		t.Repeat(map[string]func(*rapid.T){
			"reconnect": func(t *rapid.T) { // changes nothing: the process may still write
				c := anyConn(t, true)
				w.l.Disconnect(c)
				w.conns[c] = false
				connect()
			},
			"reap": func(t *rapid.T) {
				c := anyConn(t, false)
				held := slices.DeleteFunc(slices.Clone(w.sets), func(s *shelf) bool { return s.conns[c] == 0 })
				alone := slices.ContainsFunc(w.sets, func(s *shelf) bool {
					return !s.forgotten && slices.ContainsFunc(s.alone, func(by map[ledger.Conn]int) bool { return by[c] > 0 })
				})
				if len(held) > 1 || alone {
					t.Skip("the order of rests is not fixed")
				}
				w.l.Reap(start, c)
				delete(w.conns, c)
				w.eachObject(func(s *shelf, i int) { delete(s.alone[i], c) })
				w.sweep()
				for _, s := range held {
					w.leave(s, c)
				}
			},
			"open": func(t *rapid.T) { open(t, anyConn(t, true), anyKey(t)) },
			"open another": func(t *rapid.T) { // with the key of one whose sizes are others
				c, key := anyConn(t, true), anyKey(t)
				if w.set(key) == nil {
					t.Skip("it would be made")
				}
				_, _, err := w.l.OpenWeights(c, protocol.OpenWeights{Key: key, Objects: len(plans[key]), Bytes: bytesOf(plans[key]) + 1})
				if !errors.Is(err, mem.ErrInvalid) {
					t.Fatalf("opened a set of another size: %v", err)
				}
			},
			"make": func(t *rapid.T) { // the way of a loader, without detours
				c, key := anyConn(t, true), anyKey(t)
				s := open(t, c, key)
				if s == nil {
					return
				}
				for s.maker == c && s.sealed < len(s.sizes) {
					before := len(s.grants)
					place(t, c, s, s.sealed, 1)
					if s.sealed >= len(s.grants) && before == len(s.grants) {
						return // no room
					}
					seal(t, c, s, s.sealed, 1)
				}
			},
			"place": func(t *rapid.T) {
				s := anySet(t)
				first := rapid.IntRange(0, len(s.sizes)-1).Draw(t, "first")
				place(t, anyConn(t, true), s, first, rapid.IntRange(1, len(s.sizes)-first).Draw(t, "objects"))
			},
			"place another": func(t *rapid.T) {
				c, s := anyConn(t, true), anySet(t)
				if len(s.grants) == 0 {
					t.Skip("it would be made")
				}
				if _, _, err := w.l.PlaceWeights(c, protocol.PlaceWeights{Set: s.id, Sizes: []int64{s.sizes[0] + 1}}); !errors.Is(err, mem.ErrInvalid) {
					t.Fatalf("placed an object of another size: %v", err)
				}
			},
			"seal": func(t *rapid.T) {
				s := anySet(t)
				n := rapid.IntRange(1, 3).Draw(t, "objects")
				first := s.sealed + rapid.IntRange(0, 1).Draw(t, "off")
				seal(t, anyConn(t, true), s, first, n)
			},
			"close": func(t *rapid.T) {
				c, s := anyConn(t, true), anySet(t)
				wrong := rapid.IntRange(0, 4).Draw(t, "wrong") == 0
				err := w.l.CloseWeights(c, protocol.CloseWeights{Set: s.id, Wrong: wrong})
				if (s.conns[c] > 0) != (err == nil) {
					t.Fatalf("closed with %d holds: %v", s.conns[c], err)
				}
				if err != nil {
					return
				}
				if wrong {
					w.forget(s)
				}
				if s.conns[c]--; s.conns[c] == 0 {
					w.leave(s, c)
				}
			},
			"attach one": func(t *rapid.T) { // by its handle, as one who moves a single expert
				c, s := anyConn(t, true), anySet(t)
				if s.sealed == 0 {
					t.Skip("nothing is final")
				}
				i := rapid.IntRange(0, s.sealed-1).Draw(t, "object")
				grants, _, err := w.l.PlaceWeights(c, protocol.PlaceWeights{Set: s.id, First: i, Sizes: s.sizes[i : i+1]})
				if err != nil {
					t.Skip("no handle")
				}
				_, err = w.l.Attach(c, protocol.Attach{NPU: rapid.IntRange(-1, 1).Draw(t, "npu"), Handles: []mem.Handle{grants[0].Handle}})
				if err != nil {
					t.Fatal(err)
				}
				s.alone[i][c]++
			},
			"free one": func(t *rapid.T) {
				c, s := anyConn(t, true), anySet(t)
				if len(s.grants) == 0 {
					t.Skip("no objects")
				}
				i := rapid.IntRange(0, len(s.grants)-1).Draw(t, "object")
				if len(s.conns) == 0 && len(s.alone[i]) == 1 && s.alone[i][c] == 1 && !s.forgotten {
					t.Skip("the order of rests is by object then")
				}
				err := w.l.Free(c, []protocol.Object{name(s.grants[i].Handle)})
				if (s.alone[i][c] > 0 && !s.freed[i]) != (err == nil) {
					t.Fatalf("freed with %d holds: %v", s.alone[i][c], err)
				}
				if err == nil {
					if s.alone[i][c]--; s.alone[i][c] == 0 {
						delete(s.alone[i], c)
					}
					w.sweep()
				}
			},
			"": func(t *rapid.T) {
				w.check(t)
				w.sets = slices.DeleteFunc(w.sets, func(s *shelf) bool {
					return s.forgotten && len(s.conns) == 0 && !slices.Contains(s.freed, false)
				})
				for _, s := range w.sets {
					for c := range maps.Keys(s.conns) {
						if _, ok := w.conns[c]; !ok {
							t.Fatal("BUG: the model keeps a hold of nobody")
						}
					}
				}
			},
		})
	})
}
