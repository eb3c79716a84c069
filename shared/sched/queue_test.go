package sched_test

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	"pgregory.net/rapid"

	"trireme.dev/shared/sched"
)

// TestQueueTraces replays the scripts in testdata/queue; see TestTraces.
func TestQueueTraces(t *testing.T) {
	datadriven.Walk(t, "testdata/queue", func(t *testing.T, path string) {
		w := &line{}
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string { return w.do(t, d) })
	})
}

// line is the queue of a script, its items by name, and what it measures.
type line struct {
	queue *sched.Queue
	items map[string]*sched.Item
	names map[*sched.Item]string
	rate  sched.Rate
}

func (w *line) do(t *testing.T, d *datadriven.TestData) string {
	switch d.Cmd {
	case "queue": // policy=NAME [patience=DUR] [every=N]: a new one
		var policy, patience string
		o := sched.Order{}
		d.ScanArgs(t, "policy", &policy)
		d.MaybeScanArgs(t, "patience", &patience)
		d.MaybeScanArgs(t, "every", &o.Every)
		var err error
		if o.Policy, err = sched.ParsePolicy(policy); err != nil {
			return err.Error()
		}
		o.Patience = moment(t, d, patience)
		*w = line{queue: sched.NewQueue(o), items: map[string]*sched.Item{}, names: map[*sched.Item]string{}}
	case "push": // a line each: NAME [tenant=NAME] [weight=N] [priority=N] [tokens=N] [at=DUR] [due=DUR] [begun]
		for _, l := range strings.Split(d.Input, "\n") {
			fields := strings.Fields(l)
			it := &sched.Item{Due: sched.Never}
			for _, field := range fields[1:] {
				name, value, _ := strings.Cut(field, "=")
				switch name {
				case "tenant":
					it.Tenant = value
				case "weight":
					it.Weight = number(t, d, value)
				case "priority":
					it.Priority = int(number(t, d, value))
				case "tokens":
					it.Tokens = int64(number(t, d, value))
				case "at":
					it.Arrived = moment(t, d, value)
				case "due":
					it.Due = moment(t, d, value)
				case "begun":
					it.Begun = true
				default:
					d.Fatalf(t, "what is %s?", field)
				}
			}
			w.items[fields[0]], w.names[it] = it, fields[0]
			w.queue.Push(it)
		}
	case "part": // tokens=N: a part of the next item is taken, and the rest comes back
		var tokens, left int
		d.ScanArgs(t, "tokens", &tokens)
		it := w.queue.TakePart(int64(tokens))
		if it.Tokens -= int64(tokens); it.Tokens > 0 {
			left = int(it.Tokens)
			w.queue.Push(it)
		}
		return fmt.Sprintf("%s, %d left\n", w.names[it], left)
	case "take": // [n=N]: what comes out, as long as there is something
		n := 1000
		d.MaybeScanArgs(t, "n", &n)
		var out []string
		for ; n > 0 && w.queue.Len() > 0; n-- {
			out = append(out, w.names[w.queue.Take()])
		}
		return strings.Join(out, " ") + "\n"
	case "remove": // NAME
		return fmt.Sprintln(w.queue.Remove(w.items[d.CmdArgs[0].Key]))
	case "overdue": // at=DUR [demote]
		var at string
		d.ScanArgs(t, "at", &at)
		var out []string
		for _, it := range w.queue.Overdue(moment(t, d, at)) {
			out = append(out, w.names[it])
			if d.HasArg("demote") {
				w.queue.Demote(it)
			}
		}
		return strings.Join(out, " ") + "\n"
	case "last": // the one to give up
		return w.names[w.queue.Last()] + "\n"
	case "before": // NAME: tokens
		return fmt.Sprintln(w.queue.Before(w.items[d.CmdArgs[0].Key]))
	case "work", "rest": // at=DUR: there is something to do, or nothing, from then on
		var at string
		d.ScanArgs(t, "at", &at)
		if d.Cmd == "work" {
			w.rate.Start(moment(t, d, at))
		} else {
			w.rate.Stop(moment(t, d, at))
		}
	case "done": // at=DUR tokens=N
		var at string
		var tokens int
		d.ScanArgs(t, "at", &at)
		d.ScanArgs(t, "tokens", &tokens)
		w.rate.Done(moment(t, d, at), int64(tokens))
	case "wait": // at=DUR NAME: when the item is expected to be taken
		var at string
		d.ScanArgs(t, "at", &at)
		it := w.items[d.CmdArgs[0].Key]
		wait, ok := w.rate.Time(moment(t, d, at), w.queue.Before(it)+it.Tokens)
		return fmt.Sprintf("%v %v\n", wait.Round(time.Millisecond), ok && w.rate.Known())
	case "split": // ttft=DUR tpot=DUR encode=DUR prefill=DUR token=DUR
		var s [5]string
		for i, name := range []string{"ttft", "tpot", "encode", "prefill", "token"} {
			d.ScanArgs(t, name, &s[i])
		}
		b := sched.Targets{TTFT: moment(t, d, s[0]), TPOT: moment(t, d, s[1])}.Split(
			sched.Service{Encode: moment(t, d, s[2]), Prefill: moment(t, d, s[3]), Token: moment(t, d, s[4])})
		when := func(d time.Duration) string {
			if d == sched.Never {
				return "never"
			}
			return d.String()
		}
		return fmt.Sprintf("start %s, prefill %s, hopeless %v\n", when(b.Start), when(b.Prefill), b.Hopeless)
	default:
		d.Fatalf(t, "no command is called %s", d.Cmd)
	}
	return ""
}

func moment(t *testing.T, d *datadriven.TestData, s string) time.Duration {
	if s == "" {
		return 0
	}
	v, err := time.ParseDuration(s)
	if err != nil {
		d.Fatalf(t, "%v", err)
	}
	return v
}

func number(t *testing.T, d *datadriven.TestData, s string) float64 {
	v, err := strconv.ParseFloat(s, 64)
	if err != nil {
		d.Fatalf(t, "%v", err)
	}
	return v
}

func anItem(t *rapid.T, tenants, priorities int) *sched.Item {
	tenant := fmt.Sprint(rapid.IntRange(1, tenants).Draw(t, "tenant"))
	it := &sched.Item{
		Tenant:   tenant,
		Weight:   weights[tenant],
		Priority: rapid.IntRange(1, priorities).Draw(t, "priority"),
		Tokens:   rapid.Int64Range(0, 100).Draw(t, "tokens"),
		Arrived:  time.Duration(rapid.IntRange(0, 20).Draw(t, "arrived")) * time.Second,
		Due:      time.Duration(rapid.IntRange(0, 40).Draw(t, "due")) * time.Second,
	}
	if rapid.IntRange(0, 3).Draw(t, "without target") == 0 {
		it.Due = sched.Never
	}
	return it
}

// weights are those of some tenants.
var weights = map[string]float64{"1": 2, "2": 0.5}

func anOrder(t *rapid.T) sched.Order {
	return sched.Order{
		Policy:   sched.Policy(rapid.IntRange(0, 2).Draw(t, "policy")),
		Patience: 30 * time.Second,
		Every:    rapid.IntRange(2, 10).Draw(t, "every"),
	}
}

// Whatever comes, goes and is given up: as long as something waits, something comes next, each comes out once, the sums are
// those of what is there, and what is said to go before an item does.
func TestQueueConservesWork(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		q := sched.NewQueue(anOrder(t))
		var inside []*sched.Item
		drop := func(it *sched.Item) { inside = slices.DeleteFunc(inside, func(o *sched.Item) bool { return o == it }) }
		for range rapid.IntRange(1, 80).Draw(t, "operations") {
			switch rapid.IntRange(0, 7).Draw(t, "operation") {
			case 0, 1, 2, 3:
				it := anItem(t, 4, 3)
				it.Begun = rapid.IntRange(0, 9).Draw(t, "begun") == 0
				q.Push(it)
				inside = append(inside, it)
			case 4:
				next := q.Next()
				it := q.Take()
				if it != next || (it == nil) != (len(inside) == 0) || it != nil && !slices.Contains(inside, it) {
					t.Fatalf("took %v, next was %v, of %d", it, next, len(inside))
				}
				drop(it)
			case 5:
				if len(inside) > 0 {
					it := rapid.SampledFrom(inside).Draw(t, "removed")
					if !q.Remove(it) || q.Remove(it) {
						t.Fatal("removed not once")
					}
					drop(it)
				}
			case 6:
				now := time.Duration(rapid.IntRange(0, 40).Draw(t, "now")) * time.Second
				for _, it := range q.Overdue(now) {
					if it.Due >= now || it.Late() || it.Begun {
						t.Fatalf("%+v is not overdue at %v", it, now)
					}
					q.Demote(it)
				}
				if rest := q.Overdue(now); len(rest) > 0 {
					t.Fatalf("%d overdue twice", len(rest))
				}
			case 7:
				if last := q.Last(); last != nil && (last.Begun || !slices.Contains(inside, last)) {
					t.Fatalf("%v is to be given up", last)
				}
			}
			var sum int64
			for _, it := range inside {
				sum += max(1, it.Tokens)
			}
			if q.Len() != len(inside) || q.Tokens() != sum || (q.Next() == nil) != (len(inside) == 0) {
				t.Fatalf("%d items of %d tokens, want %d of %d", q.Len(), q.Tokens(), len(inside), sum)
			}
		}
		if len(inside) > 0 {
			it := rapid.SampledFrom(inside).Draw(t, "asked for")
			want, got := q.Before(it), int64(0)
			for o := q.Take(); o != it; o = q.Take() {
				got += max(1, o.Tokens)
			}
			if got != want {
				t.Fatalf("%d tokens went before it, %d were expected", got, want)
			}
		}
	})
}

// Of one tenant, with nothing out of turn, items come in the order of band, policy and arrival.
func TestQueueOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		o := anOrder(t)
		o.Every = math.MaxInt
		q := sched.NewQueue(o)
		items := make([]*sched.Item, rapid.IntRange(1, 40).Draw(t, "items"))
		for i := range items {
			items[i] = anItem(t, 1, 3)
			items[i].Begun = rapid.IntRange(0, 5).Draw(t, "begun") == 0
			q.Push(items[i])
		}
		due := func(it *sched.Item) time.Duration {
			if it.Due == sched.Never {
				return it.Arrived + o.Patience
			}
			return it.Due
		}
		slices.SortStableFunc(items, func(a, b *sched.Item) int { // stable: among equals, who came first
			if a.Begun != b.Begun {
				if a.Begun {
					return -1
				}
				return 1
			}
			by := 0
			switch o.Policy {
			case sched.SJF:
				by = cmp.Compare(max(1, a.Tokens), max(1, b.Tokens))
			case sched.SLO:
				by = cmp.Compare(due(a), due(b))
			}
			return cmp.Or(cmp.Compare(a.Priority, b.Priority), by, cmp.Compare(a.Arrived, b.Arrived))
		})
		for i, it := range items {
			if got := q.Take(); got != it {
				t.Fatalf("%+v came out as number %d, want %+v", got, i, it)
			}
		}
	})
}

// Two tenants that both have something waiting all the time get the same for their weights, but for an item of each,
// whatever sizes they bring, whatever the policy, and whoever else comes and goes.
func TestQueueIsFair(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		o := anOrder(t)
		q := sched.NewQueue(o)
		most := map[string]int64{"1": int64(rapid.IntRange(1, 200).Draw(t, "most of 1")), "3": int64(rapid.IntRange(1, 200).Draw(t, "most of 3"))}
		push := func(tenant string) {
			it := anItem(t, 1, 1)
			it.Tenant, it.Weight, it.Tokens = tenant, weights[tenant], rapid.Int64Range(1, max(1, most[tenant])).Draw(t, "size")
			q.Push(it)
		}
		for range 3 {
			push("1")
			push("3")
		}
		had := map[string]float64{}
		weight := func(tenant string) float64 {
			if w := weights[tenant]; w > 0 {
				return w
			}
			return 1
		}
		for range rapid.IntRange(1, 100).Draw(t, "picks") {
			if rapid.Bool().Draw(t, "another") {
				push("another")
			}
			it := q.Take()
			had[it.Tenant] += float64(it.Tokens) / weight(it.Tenant)
			if it.Tenant != "another" {
				push(it.Tenant)
			}
			bound := float64(most["1"])/weight("1") + float64(most["3"])/weight("3")
			if d := math.Abs(had["1"] - had["3"]); d > bound {
				t.Fatalf("one had %v more than the other, for its weight; the bound is %v", d, bound)
			}
		}
	})
}

// However many come that go before it, an item comes out within a bound: a band gets each so many'th pick for each band that
// there is, a tenant its turn among those of the band, and the oldest item of a tenant each so many'th of its picks.
func TestQueueStarvesNobody(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const tenants, priorities = 3, 3
		o := anOrder(t)
		q := sched.NewQueue(o)
		for range rapid.IntRange(0, 20).Draw(t, "before") {
			it := anItem(t, tenants, priorities)
			it.Tokens, it.Weight, it.Arrived = 10, 0, 0
			q.Push(it)
		}
		older := q.Len()
		victim := &sched.Item{Tenant: "1", Priority: priorities, Tokens: 10, Arrived: time.Second, Due: sched.Never}
		q.Push(victim)
		if rapid.Bool().Draw(t, "late") {
			q.Demote(victim)
		}
		bound := (older + 1) * o.Every * tenants * o.Every * 2 * priorities
		for n := 1; ; n++ {
			if q.Take() == victim {
				return
			}
			if n > bound {
				t.Fatalf("not served in %d picks", n)
			}
			for range 2 { // more come than go, and all go before it
				q.Push(&sched.Item{Tenant: fmt.Sprint(1 + n%tenants), Priority: 1 + n%priorities, Tokens: 10, Arrived: 2 * time.Second, Due: 0})
			}
		}
	})
}

// A line through points of a line is that line, and never goes below nothing.
func TestLine(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		at0 := time.Duration(rapid.IntRange(0, 1000).Draw(t, "at 0")) * time.Millisecond
		each := time.Duration(rapid.IntRange(0, 1000).Draw(t, "each")) * time.Microsecond
		var l sched.Line
		if l.At(5) != 0 {
			t.Fatal("something from nothing")
		}
		for _, x := range rapid.SliceOfN(rapid.IntRange(1, 10000), 1, 300).Draw(t, "sizes") {
			l.Add(x, at0+time.Duration(x)*each)
			if got, want := l.At(x), at0+time.Duration(x)*each; (got - want).Abs() > want/100+time.Millisecond {
				t.Fatalf("%v at %d, want %v", got, x, want)
			}
		}
		var noise sched.Line
		for range 10 {
			noise.Add(rapid.IntRange(1, 1000).Draw(t, "size"), time.Duration(rapid.IntRange(0, 1000).Draw(t, "took"))*time.Millisecond)
			if noise.At(0) < 0 || noise.At(100000) < noise.At(1) {
				t.Fatalf("%v at 0, %v at 1, %v at 100000", noise.At(0), noise.At(1), noise.At(100000))
			}
		}
	})
}

func BenchmarkQueue(b *testing.B) {
	for _, n := range []int{1, 1024} {
		b.Run(fmt.Sprint("waiting=", n), func(b *testing.B) {
			q := sched.NewQueue(sched.Order{Policy: sched.SLO})
			item := func(i int) *sched.Item {
				return &sched.Item{Tenant: fmt.Sprint(i % 16), Tokens: int64(i % 100), Due: time.Duration(i*7919%n) * time.Millisecond}
			}
			for i := range n {
				q.Push(item(i))
			}
			b.ReportAllocs()
			for b.Loop() {
				it := q.Take()
				q.Push(it)
			}
		})
		b.Run(fmt.Sprint("before/waiting=", n), func(b *testing.B) {
			q := sched.NewQueue(sched.Order{Policy: sched.FCFS})
			var it *sched.Item
			for i := range n {
				it = &sched.Item{Tenant: fmt.Sprint(i % 16), Tokens: int64(i % 100)}
				q.Push(it)
			}
			for b.Loop() {
				q.Before(it)
			}
		})
	}
}
