package ledger_test

import (
	"errors"
	"maps"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"

	"trireme.dev/services/hmm/ledger"
)

// world is the oracle of TestAgainstModel: the rules of holds, claims and budgets in their plainest form.
type world struct {
	l     *ledger.Ledger
	now   time.Time
	conns map[ledger.Conn]bool // value: connected, not only waiting to be reaped
	objs  []*thing             // in order of birth
	reqs  map[string]*life
	parts map[protocol.Part]*work // keyed without attempt
	logs  map[protocol.Part]*thing
	slots map[int]uint64 // the claim table, as the effects make it
	drawn []work         // all claims ever given
	last  uint64
}

type thing struct {
	grant protocol.Grant
	npu   int
	conns map[ledger.Conn]int
	reqs  map[string]int // attempt
	old   bool           // there before the last call, which may have freed its place's former owner
}

type life struct {
	newest   int
	deadline time.Time // and margin
	known    bool
	ended    bool
}

type work struct {
	part  protocol.Part
	conn  ledger.Conn // 0: orphan
	got   protocol.Claimed
	reply string
}

// raise is what the model says about a request that is named; it reports whether the ledger must take it.
func (w *world) raise(r string, attempt int, left time.Duration) bool {
	w.expire()
	q := w.reqs[r]
	if q == nil {
		q = &life{newest: attempt, deadline: w.now.Add(time.Hour)}
		w.reqs[r] = q
	}
	if q.ended || attempt < q.newest {
		return false
	}
	if attempt > q.newest {
		q.newest = attempt
		w.dropIf(func(id string, of int) bool { return id == r && of < attempt })
	}
	if d := w.now.Add(left + 10*time.Second); left > 0 && (!q.known || d.After(q.deadline)) {
		q.deadline, q.known = d, true
	}
	return true
}

func (w *world) dropIf(over func(request string, attempt int) bool) {
	for _, o := range w.objs {
		maps.DeleteFunc(o.reqs, over)
	}
	maps.DeleteFunc(w.parts, func(_ protocol.Part, k *work) bool { return over(k.part.Request, k.part.Attempt) })
	maps.DeleteFunc(w.logs, func(p protocol.Part, o *thing) bool { _, ok := o.reqs[p.Request]; return !ok })
	w.sweep()
}

func (w *world) end(r string) {
	if w.reqs[r] == nil {
		w.reqs[r] = &life{}
	}
	w.reqs[r].ended = true
	w.dropIf(func(id string, _ int) bool { return id == r })
}

func (w *world) expire() {
	for id, r := range w.reqs {
		if !r.ended && !r.deadline.After(w.now) {
			w.end(id)
		}
	}
}

func (w *world) sweep() {
	w.objs = slices.DeleteFunc(w.objs, func(o *thing) bool { return len(o.conns)+len(o.reqs) == 0 })
}

func (w *world) used(npu int) (n int64) {
	for _, o := range w.objs {
		if o.npu == npu {
			n += o.grant.Extent.Bytes
		}
	}
	return n
}

// host is the host memory that a client holds itself, which may be three quarters.
func (w *world) host(id ledger.Conn) (n int64) {
	for _, o := range w.objs {
		if o.npu == mem.HostNPU && o.conns[id] > 0 {
			n += o.grant.Extent.Bytes
		}
	}
	return n
}

func (w *world) check(t *rapid.T) {
	e := w.l.Effects()
	for _, s := range e.Slots {
		w.slots[s.Index] = s.Generation
	}
	for _, x := range e.Freed {
		for _, o := range w.objs {
			if o.old && o.grant.Extent == x {
				t.Fatalf("%v was freed, but is held by %v and %v", x, o.conns, o.reqs)
			}
		}
	}
	s := w.l.Stats()
	holds, orphans := 0, 0
	for i, o := range w.objs {
		o.old = true
		holds += len(o.conns) + len(o.reqs)
		for _, p := range w.objs[:i] {
			a, b := o.grant.Extent, p.grant.Extent
			if a.Space == b.Space && a.Offset < b.Offset+b.Bytes && b.Offset < a.Offset+a.Bytes {
				t.Fatalf("%v and %v overlap", a, b)
			}
		}
	}
	for _, k := range w.parts {
		if k.conn == 0 {
			orphans++
		}
	}
	if s.Objects != len(w.objs) || s.Holds != holds || s.Claims != len(w.parts) || s.Orphans != orphans {
		t.Fatalf("stats %+v, model: %d objects, %d holds, %d claims, %d orphans", s, len(w.objs), holds, len(w.parts), orphans)
	}
	for _, n := range s.Memory {
		var of protocol.Usage
		for _, u := range n.Kinds {
			of.Used += u.Used
			of.Padded += u.Padded
		}
		if n.Used+n.Padded != w.used(n.NPU) || n.Free != n.Capacity-n.Used-n.Padded || n.Free < 0 ||
			of.Used != n.Used || of.Padded != n.Padded || n.Peak < n.Used+n.Padded {
			t.Fatalf("NPU %d: %+v, model: %d bytes", n.NPU, n, w.used(n.NPU))
		}
	}
	// Claims: the table says "held" for exactly the claims that are.
	for _, k := range w.drawn {
		key := k.part
		key.Attempt = 0
		now := w.parts[key]
		held := now != nil && now.got == k.got
		if (w.slots[k.got.Slot] == k.got.Generation) != held {
			t.Fatalf("claim %+v: held is %v, table says %d", k, held, w.slots[k.got.Slot])
		}
	}
}

func TestAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		cfg := config()
		cfg.MaxTombstones = 1000
		cfg.Tombstone = 1000 * time.Hour
		w := &world{
			l: ledger.New(cfg), now: start, conns: map[ledger.Conn]bool{}, reqs: map[string]*life{},
			parts: map[protocol.Part]*work{}, logs: map[protocol.Part]*thing{}, slots: map[int]uint64{}, last: cfg.First,
		}
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
		anyObject := func(t *rapid.T) *thing {
			if len(w.objs) == 0 {
				t.Skip("no objects")
			}
			return w.objs[rapid.IntRange(0, len(w.objs)-1).Draw(t, "object")]
		}
		anyRef := func(t *rapid.T) protocol.Ref {
			return ref(rapid.SampledFrom([]string{"r0", "r1", "r2"}).Draw(t, "request"),
				rapid.IntRange(1, 3).Draw(t, "attempt"), time.Duration(rapid.IntRange(1, 100).Draw(t, "left"))*time.Second)
		}
		t.Repeat(map[string]func(*rapid.T){
			"connect": func(t *rapid.T) {
				id, _, err := w.l.Connect(w.now, protocol.Hello{Instance: "i", Role: "decode"})
				if err != nil {
					t.Fatal(err)
				}
				w.conns[id] = true
			},
			"disconnect": func(t *rapid.T) {
				id := anyConn(t, true)
				w.l.Disconnect(id)
				w.conns[id] = false
				for _, k := range w.parts {
					if k.conn == id {
						k.conn = 0
					}
				}
			},
			"reap": func(t *rapid.T) {
				id := anyConn(t, false)
				w.l.Reap(w.now, id)
				delete(w.conns, id)
				for _, o := range w.objs {
					delete(o.conns, id)
				}
				w.sweep()
			},
			"alloc": func(t *rapid.T) {
				id := anyConn(t, true)
				npu := rapid.IntRange(-1, 1).Draw(t, "npu")
				kind := rapid.SampledFrom([]mem.Kind{mem.KindKV, mem.KindLog}).Draw(t, "kind")
				spec := protocol.Spec{Kind: kind, NPU: npu, Bytes: rapid.Int64Range(1, 8*page).Draw(t, "bytes")}
				if rapid.Bool().Draw(t, "with request") {
					spec.Ref = anyRef(t)
				}
				n := rapid.IntRange(1, 3).Draw(t, "objects")
				need := int64(n) * mem.Padded(spec.Bytes, page)
				room := w.used(npu)+need <= 20*page && (npu >= 0 || w.host(id)+need <= 15*page)
				grants, err := w.l.Alloc(w.now, id, slices.Repeat([]protocol.Spec{spec}, n))
				if !room {
					if !errors.Is(err, mem.ErrExhausted) {
						t.Fatalf("alloc without room: %v", err)
					}
					return
				}
				if spec.Ref.Request != "" && !w.raise(spec.Ref.Request, spec.Ref.Attempt, spec.Ref.Left) {
					if !errors.Is(err, mem.ErrEnded) {
						t.Fatalf("alloc for an ended request or attempt: %v", err)
					}
					return
				}
				if errors.Is(err, mem.ErrExhausted) { // address room, twice the budgets, is fragmented: rare
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				for _, g := range grants {
					if g.Handle.Generation <= w.last {
						t.Fatalf("generation %d after %d", g.Handle.Generation, w.last)
					}
					w.last = g.Handle.Generation
					o := &thing{grant: g, npu: npu, conns: map[ledger.Conn]int{id: 1}, reqs: map[string]int{}}
					if spec.Ref.Request != "" {
						o.reqs[spec.Ref.Request] = spec.Ref.Attempt
					}
					w.objs = append(w.objs, o)
				}
			},
			"attach": func(t *rapid.T) {
				id, o := anyConn(t, true), anyObject(t)
				npu := rapid.IntRange(-1, 1).Draw(t, "npu")
				g, err := w.l.Attach(id, protocol.Attach{NPU: npu, Handles: []mem.Handle{o.grant.Handle}})
				moves := npu >= 0 && o.npu >= 0 && npu != o.npu
				if moves && w.used(npu)+o.grant.Extent.Bytes > 20*page {
					if !errors.Is(err, mem.ErrExhausted) {
						t.Fatalf("hand-over without room: %v", err)
					}
					return
				}
				if err != nil || g[0].Extent != o.grant.Extent {
					t.Fatalf("attached %v as %v, %v", o.grant.Extent, g, err)
				}
				if moves {
					o.npu = npu
				}
				o.conns[id]++
			},
			"free": func(t *rapid.T) {
				id, o := anyConn(t, true), anyObject(t)
				err := w.l.Free(id, []protocol.Object{name(o.grant.Handle)})
				if (o.conns[id] > 0) != (err == nil) {
					t.Fatalf("free with %d holds: %v", o.conns[id], err)
				}
				if err == nil {
					if o.conns[id]--; o.conns[id] == 0 {
						delete(o.conns, id)
					}
					w.sweep()
				}
			},
			"keep": func(t *rapid.T) {
				id, o, r := anyConn(t, true), anyObject(t), anyRef(t)
				err := w.l.Keep(w.now, id, protocol.Keep{Ref: r, Objects: []protocol.Object{name(o.grant.Handle)}})
				switch {
				case o.conns[id] == 0:
					if !errors.Is(err, mem.ErrInvalid) {
						t.Fatalf("kept without holding: %v", err)
					}
				case !w.raise(r.Request, r.Attempt, r.Left):
					if !errors.Is(err, mem.ErrEnded) {
						t.Fatalf("kept for an ended request or attempt: %v", err)
					}
				case err != nil:
					t.Fatal(err)
				default:
					o.reqs[r.Request] = r.Attempt
				}
			},
			"claim": func(t *rapid.T) {
				id, r := anyConn(t, true), anyRef(t)
				part := protocol.Part{Request: r.Request, Attempt: r.Attempt, Stage: "decode", Part: rapid.IntRange(0, 3).Draw(t, "part")}
				got, err := w.l.Claim(w.now, id, protocol.Claim{Part: part, Reply: "x"})
				if !w.raise(r.Request, r.Attempt, 0) {
					if !errors.Is(err, mem.ErrEnded) {
						t.Fatalf("claim of an ended request or attempt: %v", err)
					}
					return
				}
				key := part
				key.Attempt = 0
				if len(w.parts) == cfg.Slots && w.parts[key] == nil {
					if !errors.Is(err, mem.ErrExhausted) {
						t.Fatalf("a claim more than there are slots: %v", err)
					}
					return
				}
				if err != nil || got.Generation <= w.last {
					t.Fatalf("claim: %+v after %d, %v", got, w.last, err)
				}
				if log := w.logs[key]; (log == nil) != (got.Log == nil) || log != nil && name(*got.Log) != name(log.grant.Handle) {
					t.Fatalf("claim of %+v tells the log %+v, model: %+v", part, got.Log, log)
				}
				w.last = got.Generation
				w.parts[key] = &work{part, id, got, "x"}
				w.drawn = append(w.drawn, *w.parts[key])
			},
			"unclaim": func(t *rapid.T) {
				if len(w.drawn) == 0 {
					t.Skip("no claims")
				}
				id := anyConn(t, true)
				k := w.drawn[rapid.IntRange(0, len(w.drawn)-1).Draw(t, "claim")]
				err := w.l.Unclaim(id, protocol.Unclaim{Part: k.part, Generation: k.got.Generation})
				key := k.part
				key.Attempt = 0
				now, q := w.parts[key], w.reqs[k.part.Request]
				var want error
				switch {
				case q == nil || q.ended || q.newest > k.part.Attempt:
					want = mem.ErrEnded
				case now == nil || now.got != k.got || now.conn != id:
					want = mem.ErrFenced
				default:
					delete(w.parts, key)
				}
				if !errors.Is(err, want) {
					t.Fatalf("unclaim of %+v: %v, want %v", k, err, want)
				}
			},
			"inherit": func(t *rapid.T) {
				if len(w.drawn) == 0 {
					t.Skip("no claims")
				}
				id := anyConn(t, true)
				k := w.drawn[rapid.IntRange(0, len(w.drawn)-1).Draw(t, "claim")]
				keep := []*thing{anyObject(t), anyObject(t)}
				drop := []*thing{anyObject(t), anyObject(t)}
				v := protocol.Inherit{Part: k.part, Generation: k.got.Generation}
				held := true
				for i := range keep {
					v.Keep, v.Drop = append(v.Keep, name(keep[i].grant.Handle)), append(v.Drop, name(drop[i].grant.Handle))
					held = held && keep[i].conns[id] > 0
				}
				err := w.l.Inherit(w.now, id, v)
				key := k.part
				key.Attempt = 0
				r := k.part.Request
				now, q := w.parts[key], w.reqs[r]
				var want error
				switch {
				case q == nil || q.ended || q.newest > k.part.Attempt:
					want = mem.ErrEnded
				case now == nil || now.got != k.got || now.conn != id:
					want = mem.ErrFenced
				case !held || keep[0].grant.Handle.Kind != mem.KindLog:
					want = mem.ErrInvalid
				default:
					for _, o := range keep {
						o.reqs[r] = k.part.Attempt
					}
					for _, o := range drop {
						if !slices.Contains(keep, o) {
							delete(o.reqs, r)
						}
					}
					w.logs[key] = keep[0]
					w.dropIf(func(string, int) bool { return false })
				}
				if !errors.Is(err, want) {
					t.Fatalf("inherit of %+v: %v, want %v", k, err, want)
				}
			},
			"orphans": func(t *rapid.T) {
				stage := rapid.SampledFrom([]string{"encode", "decode"}).Draw(t, "stage")
				last := uint64(0)
				for _, o := range w.l.Orphans(stage) {
					key := o.Part
					key.Attempt = 0
					k := w.parts[key]
					if k == nil || k.conn != 0 || k.part != o.Part || o.Generation != k.got.Generation || o.Reply != k.reply || o.Generation <= last {
						t.Fatalf("orphan %+v, model: %+v", o, k)
					}
					last = o.Generation
					delete(w.parts, key)
				}
				for _, k := range w.parts {
					if k.conn == 0 && k.part.Stage == stage {
						t.Fatalf("orphan %+v was not handed out", k)
					}
				}
			},
			"end": func(t *rapid.T) {
				r := rapid.SampledFrom([]string{"r0", "r1", "r2", "r3"}).Draw(t, "request")
				if err := w.l.End(w.now, r); err != nil {
					t.Fatal(err)
				}
				w.expire()
				w.end(r)
			},
			"time": func(t *rapid.T) {
				w.now = w.now.Add(time.Duration(rapid.IntRange(1, 60).Draw(t, "seconds")) * time.Second)
				w.l.Tick(w.now)
				w.expire()
			},
			"": w.check,
		})
	})
}
