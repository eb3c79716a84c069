package ledger_test

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"

	"trireme.dev/services/hmm/ledger"
)

// pool is the oracle of TestNPUsAgainstModel: who has which NPU, in its plainest form.
type pool struct {
	l       *ledger.Ledger
	now     time.Time
	members []*member
	npus    [6]place
	objects []booked
}

type member struct {
	conn ledger.Conn
	name string
	gone bool
	npus []int
}

// place is an NPU: who has it, or whose it stays until when.
type place struct {
	owner *member
	name  string
	until time.Time
}

type booked struct {
	by   *member
	npu  int
	of   string // request, or ""
	what protocol.Object
}

const reserve = 10 * time.Second

func (p *place) free(name string, now time.Time) bool {
	return p.owner == nil && (p.name == "" || p.name == name || !p.until.After(now))
}

// pick is what a client of a name is to be given; nil: it is not to be had.
func (p *pool) pick(name string, n int, want []int) []int {
	if len(want) > 0 {
		for _, w := range want {
			if !p.npus[w].free(name, p.now) {
				return nil
			}
		}
		return want
	}
	got := []int{}
	for _, own := range []bool{true, false} {
		for i := range p.npus {
			x := &p.npus[i]
			mine := x.owner == nil && name != "" && x.name == name && x.until.After(p.now)
			if len(got) < n && x.free(name, p.now) && mine == own {
				got = append(got, i)
			}
		}
	}
	if len(got) < n {
		return nil
	}
	slices.Sort(got)
	return got
}

func (p *pool) take(m *member, npus []int) {
	for _, n := range npus {
		p.npus[n] = place{owner: m}
	}
	m.npus = append(m.npus, npus...)
}

// anyWant draws how many NPUs are wanted, or which.
func anyWant(t *rapid.T) (n int, want []int) {
	if rapid.Bool().Draw(t, "by number") {
		want = rapid.SliceOfNDistinct(rapid.IntRange(0, 5), 1, 3, rapid.ID[int]).Draw(t, "want")
		return 0, want
	}
	return rapid.IntRange(0, 3).Draw(t, "npus"), nil
}

func (p *pool) check(t *rapid.T) {
	stats := p.l.Stats().Memory[1:]
	for i, x := range p.npus {
		want := protocol.NPUStats{NPU: i}
		if x.owner != nil {
			want.Instance, want.Name = fmt.Sprint("i", x.owner.name), x.owner.name
		} else if x.name != "" && (x.until.After(p.now) || stats[i].Reserved != "") { // nobody may have looked since it lapsed
			want.Reserved = x.name
		}
		if got := stats[i]; got.Instance != want.Instance || got.Name != want.Name || got.Reserved != want.Reserved {
			t.Fatalf("NPU %d is %q, %q, reserved for %q; model: %+v", i, got.Instance, got.Name, got.Reserved, x)
		}
	}
}

func TestNPUsAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		cfg := config()
		cfg.Spaces, cfg.NPUs, cfg.Reserve = []int64{40 * page}, nil, reserve
		for i := range 6 { // the first two are one domain, each other one is one of its own
			space := max(i, 1)
			if space == len(cfg.Spaces) {
				cfg.Spaces = append(cfg.Spaces, 80*page)
			}
			cfg.NPUs = append(cfg.NPUs, ledger.NPU{Bytes: 20 * page, Space: space})
		}
		p := &pool{l: ledger.New(cfg), now: start}
		anyMember := func(t *rapid.T, gone bool) *member {
			var some []*member
			for _, m := range p.members {
				if m.gone == gone {
					some = append(some, m)
				}
			}
			if len(some) == 0 {
				t.Skip("no such connection")
			}
			return rapid.SampledFrom(some).Draw(t, "conn")
		}
		granted := func(t *rapid.T, m *member, got []int, err error, n int, want []int) bool {
			pick := p.pick(m.name, n, want)
			if pick == nil {
				if !errors.Is(err, mem.ErrExhausted) {
					t.Fatalf("got %v, %v, of %+v", got, err, p.npus)
				}
				return false
			}
			if err != nil || !slices.Equal(got, pick) {
				t.Fatalf("got %v, %v; model: %v", got, err, pick)
			}
			p.take(m, pick)
			return true
		}
		t.Repeat(map[string]func(*rapid.T){
			"connect": func(t *rapid.T) {
				m := &member{name: rapid.SampledFrom([]string{"", "a", "b"}).Draw(t, "name")}
				n, want := anyWant(t)
				conn, got, err := p.l.Connect(p.now, protocol.Hello{Instance: "i" + m.name, Role: "decode", Name: m.name, NPUs: n, Want: want})
				if m.name != "" && slices.ContainsFunc(p.members, func(x *member) bool { return x.name == m.name }) {
					if !errors.Is(err, mem.ErrDenied) {
						t.Fatalf("two are called %q: %v", m.name, err)
					}
					return
				}
				if m.conn = conn; granted(t, m, got, err, n, want) {
					p.members = append(p.members, m)
				}
			},
			"join": func(t *rapid.T) {
				m := anyMember(t, false)
				n, want := anyWant(t)
				got, err := p.l.Join(p.now, m.conn, protocol.Join{NPUs: n, Want: want})
				granted(t, m, got, err, n, want)
			},
			"part": func(t *rapid.T) {
				m := anyMember(t, false)
				npus := rapid.SliceOfN(rapid.IntRange(0, 5), 1, 2).Draw(t, "npus")
				kept := rapid.SampledFrom([]string{"", "a", "b"}).Draw(t, "kept for")
				err := p.l.Part(p.now, m.conn, protocol.Parting{NPUs: npus, For: kept})
				bad := len(npus) == 2 && npus[0] == npus[1]
				for _, n := range npus {
					bad = bad || p.npus[n].owner != m || slices.ContainsFunc(p.objects, func(o booked) bool {
						return o.by == m && o.npu == n && o.of == ""
					})
				}
				if bad {
					if !errors.Is(err, mem.ErrInvalid) {
						t.Fatalf("%v parted with %v: %v", m, npus, err)
					}
					return
				}
				if err != nil {
					t.Fatalf("%+v parted with %v: %v", m, npus, err)
				}
				for _, n := range npus {
					p.npus[n] = place{}
					if kept != "" {
						p.npus[n] = place{name: kept, until: p.now.Add(reserve)}
					}
					m.npus = slices.DeleteFunc(m.npus, func(x int) bool { return x == n })
				}
			},
			"alloc": func(t *rapid.T) {
				m, npu := anyMember(t, false), rapid.IntRange(0, 5).Draw(t, "npu")
				spec := kv(protocol.Ref{})
				spec.NPU, spec.Bytes = npu, page
				o := booked{by: m, npu: npu}
				if rapid.Bool().Draw(t, "with request") {
					o.of = fmt.Sprint("r", len(p.objects))
					spec.Ref = ref(o.of, 1, time.Hour)
				}
				grants, err := p.l.Alloc(p.now, m.conn, []protocol.Spec{spec})
				if x := p.npus[npu].owner; x != nil && x != m {
					if !errors.Is(err, mem.ErrDenied) {
						t.Fatalf("allocated on another's NPU: %v", err)
					}
					return
				}
				if errors.Is(err, mem.ErrExhausted) {
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				o.what = name(grants[0].Handle)
				p.objects = append(p.objects, o)
			},
			"free": func(t *rapid.T) {
				m := anyMember(t, false)
				i := slices.IndexFunc(p.objects, func(o booked) bool { return o.by == m })
				if i < 0 {
					t.Skip("nothing")
				}
				if err := p.l.Free(m.conn, []protocol.Object{p.objects[i].what}); err != nil {
					t.Fatal(err)
				}
				p.objects = slices.Delete(p.objects, i, i+1)
			},
			"disconnect": func(t *rapid.T) {
				m := anyMember(t, false)
				p.l.Disconnect(m.conn)
				m.gone = true
				if !p.l.Leaving("") {
					t.Fatal("nobody is leaving")
				}
			},
			"reap": func(t *rapid.T) {
				m := anyMember(t, true)
				p.l.Reap(p.now, m.conn)
				for _, n := range m.npus {
					p.npus[n] = place{name: m.name, until: p.now.Add(reserve)}
				}
				p.members = slices.DeleteFunc(p.members, func(x *member) bool { return x == m })
				p.objects = slices.DeleteFunc(p.objects, func(o booked) bool { return o.by == m })
			},
			"time": func(t *rapid.T) {
				p.now = p.now.Add(time.Duration(rapid.IntRange(1, 12).Draw(t, "seconds")) * time.Second)
				if rapid.Bool().Draw(t, "late") {
					return // the daemon's timer may be: what lapses does so for whoever asks
				}
				p.l.Tick(p.now)
				next, ok := p.l.Next()
				for _, x := range p.npus {
					if x.owner == nil && x.name != "" && x.until.After(p.now) && (!ok || next.After(x.until)) {
						t.Fatalf("the next deadline is %v, a reservation ends at %v", next, x.until)
					}
				}
			},
			"": p.check,
		})
	})
}

// What a client holds of weights in a domain keeps its last NPU there.
func TestPartWithWeights(t *testing.T) {
	cfg := config()
	cfg.Weights = 10 * page
	l := ledger.New(cfg)
	c, npus, err := l.Connect(start, protocol.Hello{Instance: "a", Role: "decode", NPUs: 2})
	must(t, err)
	placed, _, err := l.Weights(c, protocol.Weights{Key: protocol.Key{1}, NPU: npus[0], Numbers: []int{7}, Sizes: []int64{page}, Most: page})
	must(t, err)
	wantErr(t, l.Part(start, c, protocol.Parting{NPUs: npus}), mem.ErrInvalid)
	must(t, l.Part(start, c, protocol.Parting{NPUs: npus[:1]}))
	wantErr(t, l.Part(start, c, protocol.Parting{NPUs: npus[1:]}), mem.ErrInvalid)
	must(t, l.Free(c, []protocol.Object{name(placed[0].Grant.Handle)}))
	must(t, l.Part(start, c, protocol.Parting{NPUs: npus[1:]}))
	if s := l.Stats(); s.Memory[1].Instance != "" || s.Memory[2].Instance != "" {
		t.Errorf("NPUs given up are somebody's: %+v", s.Memory)
	}
}
