package ledger_test

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"

	"trireme.dev/services/hmm/ledger"
)

// shelves is the oracle of TestWeightsAgainstModel: the rules of weights in their plainest form.
type shelves struct {
	l     *ledger.Ledger
	conns map[ledger.Conn]bool // value: connected, not only waiting to be reaped
	all   []*weight            // that have memory, in order of birth
	stops map[protocol.Key]bool
	rests int
	born  int
	freed int
}

type weight struct {
	space, number int
	key           protocol.Key
	grant         protocol.Grant
	named         bool // it can be found by its number
	sealed        bool
	doubted       bool
	maker, by     ledger.Conn
	conns         map[ledger.Conn]int
	rest          int // of its last settling; 0: held
	old           bool
}

const weightsRoom = 24 * page

// plans are the sizes of the objects by key.
var plans = map[protocol.Key][]int64{
	{1}: {page, 2*page - 5, 1, 3 * page, page}, // 8 pages
	{2}: {4 * page, 4*page - 1, 4 * page},      // 12 pages
	{3}: {page / 2, 6 * page, 7 * page},        // 14 pages
}

func (w *shelves) find(space int, key protocol.Key, number int) *weight {
	for _, o := range w.all {
		if o.named && o.space == space && o.key == key && o.number == number {
			return o
		}
	}
	return nil
}

// sum adds up the pages of a domain's objects that f is true of.
func (w *shelves) sum(space int, f func(*weight) bool) (n int64) {
	for _, o := range w.all {
		if o.space == space && f(o) {
			n += o.grant.Extent.Bytes
		}
	}
	return n
}

func (w *shelves) room(space int) int64 {
	return weightsRoom - w.sum(space, func(o *weight) bool { return len(o.conns) > 0 })
}

// evict frees what rests longest until so many bytes fit.
func (w *shelves) evict(space int, bytes int64) {
	for weightsRoom-w.sum(space, func(*weight) bool { return true }) < bytes {
		var first *weight
		for _, o := range w.all {
			if o.space == space && o.rest > 0 && (first == nil || o.rest < first.rest) {
				first = o
			}
		}
		w.remove(first)
	}
}

func (w *shelves) remove(o *weight) {
	w.all = slices.DeleteFunc(w.all, func(x *weight) bool { return x == o })
}

func (w *shelves) hold(c ledger.Conn, o *weight) {
	o.conns[c]++
	o.rest = 0
}

// letGo ends all holds of a client on an object.
func (w *shelves) letGo(c ledger.Conn, o *weight) {
	delete(o.conns, c)
	if o.maker == c && !o.sealed {
		for _, other := range w.all {
			if o.named && other.named && other.space == o.space && other.key == o.key && other.sealed && other.by == c {
				other.doubted = true
			}
		}
		o.maker = 0
		w.unname(o)
	}
	w.settle(o)
}

func (w *shelves) unname(o *weight) {
	if o.named && !o.sealed {
		w.stops[o.key] = true
	}
	o.named = false
}

func (w *shelves) settle(o *weight) {
	switch {
	case len(o.conns) > 0:
	case o.named && o.sealed:
		w.rests++
		o.rest = w.rests
	default:
		w.remove(o)
	}
}

func (w *shelves) check(t *rapid.T) {
	e := w.l.Effects()
	w.freed += len(e.Freed)
	for _, x := range e.Freed {
		if slices.ContainsFunc(w.all, func(o *weight) bool { return o.old && o.grant.Extent == x }) {
			t.Fatalf("%v was freed, but is there", x)
		}
	}
	if w.freed != w.born-len(w.all) {
		t.Fatalf("%d objects freed of %d, the model has %d", w.freed, w.born, len(w.all))
	}
	settled := map[protocol.Key]bool{}
	for _, key := range e.Settled {
		settled[key] = true
	}
	if !maps.Equal(settled, w.stops) {
		t.Fatalf("settled %v, want %v", settled, w.stops)
	}
	clear(w.stops)
	st := w.l.Stats()
	type group struct {
		key   string
		space int
	}
	want := map[group]protocol.WeightsStats{}
	for _, o := range w.all {
		o.old = true
		if !o.named {
			continue
		}
		at := group{fmt.Sprintf("%x", o.key[:]), o.space}
		x := want[at]
		x.Key, x.Domain = at.key, at.space
		x.Objects, x.Bytes = x.Objects+1, x.Bytes+o.grant.Handle.Bytes
		if o.sealed {
			x.Loaded += o.grant.Handle.Bytes
		}
		want[at] = x
	}
	for at, x := range want {
		holders := map[ledger.Conn]bool{}
		for _, o := range w.all {
			if o.named && o.space == at.space && fmt.Sprintf("%x", o.key[:]) == at.key {
				for c := range o.conns {
					holders[c] = true
				}
			}
		}
		x.Holders = len(holders)
		want[at] = x
	}
	for _, x := range st.Weights {
		x.Wanted = 0
		if want[group{x.Key, x.Domain}] != x {
			t.Fatalf("stats %+v, model: %+v", x, want)
		}
	}
	if len(st.Weights) != len(want) || st.Objects != 0 || st.Resting != 0 || st.Memory[1].Used != 0 {
		t.Fatalf("stats %+v; model: %+v", st, want)
	}
	for i, n := range st.Shared {
		used, idle := w.sum(i+1, func(*weight) bool { return true }), w.sum(i+1, func(o *weight) bool { return o.rest > 0 })
		if n.NPU != mem.Shared(i+1) || n.Used+n.Padded != used || n.Cached != idle || n.Free != weightsRoom-used {
			t.Fatalf("domain %d's account is %+v; model: %d used, %d idle", i+1, n, used, idle)
		}
	}
}

// ask compares an answer of Weights.
func (w *shelves) ask(t *rapid.T, c ledger.Conn, v protocol.Weights) {
	space := v.NPU + 1
	placed, busy, err := w.l.Weights(c, v)
	var finals []*weight
	var fresh []int
	left := v.Most
	for i, n := range v.Numbers {
		switch o := w.find(space, v.Key, n); {
		case o == nil && left > 0 && (len(fresh) == 0 || v.Sizes[i] <= left):
			fresh = append(fresh, i)
			left -= v.Sizes[i]
		case o == nil:
			left = 0
		case o.sealed:
			finals = append(finals, o)
		}
	}
	if v.Need > 0 {
		need := v.Need
		for _, o := range w.all {
			if o.named && o.space == space && o.key == v.Key && len(o.conns) > 0 {
				need -= o.grant.Handle.Bytes
			}
		}
		if need > w.room(space) {
			if !errors.Is(err, mem.ErrExhausted) {
				t.Fatalf("%d bytes in all of %d: %v", need, w.room(space), err)
			}
			return
		}
	}
	if len(finals)+len(fresh) == 0 {
		if !busy || err != nil {
			t.Fatalf("all are being made: %+v, %v, %v", placed, busy, err)
		}
		return
	}
	for _, o := range finals {
		w.hold(c, o)
	}
	var pages int64
	for _, i := range fresh {
		pages += mem.Padded(v.Sizes[i], page)
	}
	if pages > w.room(space) {
		if !errors.Is(err, mem.ErrExhausted) {
			t.Fatalf("%d bytes of %d: %v", pages, w.room(space), err)
		}
		for _, o := range finals {
			if o.conns[c]--; o.conns[c] == 0 {
				w.letGo(c, o)
			}
		}
		return
	}
	if err != nil || busy || len(placed) != len(v.Numbers) {
		t.Fatalf("%+v is %+v, %v, %v", v, placed, busy, err)
	}
	w.evict(space, pages)
	for i, n := range v.Numbers {
		p := placed[i]
		o := w.find(space, v.Key, n)
		switch {
		case slices.Contains(fresh, i):
			if p.State != protocol.PlacedMake || p.Check || p.Grant.Handle.Bytes != v.Sizes[i] || p.Grant.Handle.Sealed || p.Grant.Extent.Space != space {
				t.Fatalf("weight %d is %+v", n, p)
			}
			w.born++
			w.all = append(w.all, &weight{space: space, number: n, key: v.Key, grant: *p.Grant, named: true, maker: c, conns: map[ledger.Conn]int{c: 1}})
			from := w.find(3-space, v.Key, n)
			if has := from != nil && from.sealed; has != (p.Source != nil) || has && p.Source.Extent != from.grant.Extent {
				t.Fatalf("weight %d is to be copied from %+v; model: %+v", n, p.Source, from)
			} else if has {
				w.hold(c, from)
			}
		case o != nil && o.sealed:
			if p.State != protocol.PlacedFinal || p.Check != o.doubted || p.Grant.Extent != o.grant.Extent || !p.Grant.Handle.Sealed || p.Source != nil {
				t.Fatalf("weight %d is %+v; model: %+v", n, p, o)
			}
		default:
			if p != (protocol.Placed{}) {
				t.Fatalf("weight %d is %+v; model: %+v", n, p, o)
			}
		}
	}
}

func TestWeightsAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		cfg := config()
		cfg.Spaces, cfg.Weights = []int64{40 * page, 1000 * page, 1000 * page}, weightsRoom
		cfg.NPUs[1].Space = 2
		w := &shelves{l: ledger.New(cfg), conns: map[ledger.Conn]bool{}, stops: map[protocol.Key]bool{}}
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
		anyWeight := func(t *rapid.T) *weight {
			if len(w.all) == 0 {
				t.Skip("no objects")
			}
			return w.all[rapid.IntRange(0, len(w.all)-1).Draw(t, "object")]
		}
		anyAsk := func(t *rapid.T) protocol.Weights {
			v := protocol.Weights{Key: protocol.Key{rapid.ByteRange(1, 3).Draw(t, "key")}, NPU: rapid.IntRange(0, 1).Draw(t, "npu")}
			plan := plans[v.Key]
			v.Numbers = rapid.SliceOfNDistinct(rapid.IntRange(0, len(plan)-1), 1, len(plan), rapid.ID[int]).Draw(t, "numbers")
			slices.Sort(v.Numbers)
			for _, n := range v.Numbers {
				v.Sizes = append(v.Sizes, plan[n])
			}
			v.Most = rapid.Int64Range(0, 12*page).Draw(t, "most")
			v.Need = rapid.SampledFrom([]int64{0, 10 * page, 20 * page}).Draw(t, "need")
			return v
		}
		seal := func(t *rapid.T, c ledger.Conn, o *weight) {
			err := w.l.SealWeights(c, []protocol.Sealing{{Object: name(o.grant.Handle), CRC: 7}})
			switch {
			case o.conns[c] == 0:
				if !errors.Is(err, mem.ErrInvalid) {
					t.Fatalf("sealed without holding: %v", err)
				}
			case o.maker != c:
				if !errors.Is(err, mem.ErrFenced) {
					t.Fatalf("sealed by another one: %v", err)
				}
			case err != nil:
				t.Fatal(err)
			default:
				w.sealed(o)
			}
		}
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
				w.l.Reap(start, c)
				delete(w.conns, c)
				for _, o := range slices.Backward(slices.Clone(w.all)) { // the newest first
					if o.conns[c] > 0 {
						w.letGo(c, o)
					}
				}
			},
			"ask": func(t *rapid.T) { w.ask(t, anyConn(t, true), anyAsk(t)) },
			"ask another": func(t *rapid.T) { // with another size
				o := anyWeight(t)
				_, _, err := w.l.Weights(anyConn(t, true), protocol.Weights{
					Key: o.key, NPU: o.space - 1, Numbers: []int{o.number}, Sizes: []int64{o.grant.Handle.Bytes + 1},
				})
				if o.named && !errors.Is(err, mem.ErrInvalid) {
					t.Fatalf("asked for an object of another size: %v", err)
				}
			},
			"make": func(t *rapid.T) { // the way of a loader, without detours
				c, v := anyConn(t, true), anyAsk(t)
				w.ask(t, c, v)
				for _, n := range v.Numbers {
					if o := w.find(v.NPU+1, v.Key, n); o != nil && o.maker == c {
						seal(t, c, o)
					}
				}
			},
			"seal": func(t *rapid.T) { seal(t, anyConn(t, true), anyWeight(t)) },
			"copied": func(t *rapid.T) {
				c, o := anyConn(t, true), anyWeight(t)
				from := w.find(3-o.space, o.key, o.number)
				if from == nil {
					t.Skip("no source")
				}
				h, err := w.l.Copied(c, []protocol.Copy{{Source: name(from.grant.Handle), Copy: name(o.grant.Handle)}})
				switch {
				case o.conns[c] == 0 || from.conns[c] == 0 || o.sealed || o.maker == c && !from.sealed:
					if !errors.Is(err, mem.ErrInvalid) {
						t.Fatalf("copied %+v to %+v: %v", from, o, err)
					}
				case o.maker != c:
					if !errors.Is(err, mem.ErrFenced) {
						t.Fatalf("copied to another one's: %v", err)
					}
				case err != nil || !h[0].Sealed || h[0].CRC != 7:
					t.Fatalf("copied as %+v, %v", h, err)
				default:
					w.sealed(o)
				}
			},
			"free": func(t *rapid.T) {
				c, o := anyConn(t, true), anyWeight(t)
				err := w.l.Free(c, []protocol.Object{name(o.grant.Handle)})
				if (o.conns[c] > 0) != (err == nil) {
					t.Fatalf("freed with %d holds: %v", o.conns[c], err)
				}
				if err != nil {
					return
				}
				if o.conns[c]--; o.conns[c] == 0 {
					w.letGo(c, o)
				}
			},
			"forget": func(t *rapid.T) { // its content is wrong
				c, o := anyConn(t, true), anyWeight(t)
				err := w.l.Forget(c, []protocol.Object{name(o.grant.Handle)})
				if (o.conns[c] > 0) != (err == nil) {
					t.Fatalf("forgot with %d holds: %v", o.conns[c], err)
				}
				if err == nil {
					w.unname(o)
				}
			},
			"attach": func(t *rapid.T) { // by its handle, as one who moves a single expert
				c, o := anyConn(t, true), anyWeight(t)
				if !o.sealed || !o.named {
					t.Skip("not final")
				}
				h := o.grant.Handle
				for _, x := range []protocol.Weights{{Key: o.key, NPU: o.space - 1, Numbers: []int{o.number}, Sizes: []int64{h.Bytes}}} {
					placed, _, err := w.l.Weights(c, x)
					if err != nil {
						t.Fatal(err)
					}
					w.hold(c, o)
					h = placed[0].Grant.Handle
				}
				if _, err := w.l.Attach(c, protocol.Attach{NPU: -1, Handles: []mem.Handle{h}}); err != nil {
					t.Fatal(err)
				}
				w.hold(c, o)
			},
			"": w.check,
		})
	})
}

// sealed notes that an object is final.
func (w *shelves) sealed(o *weight) {
	o.sealed, o.by, o.maker = true, o.maker, 0
	if o.named {
		w.stops[o.key] = true
	}
}
