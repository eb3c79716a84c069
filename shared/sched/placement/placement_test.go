package placement_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"
	"pgregory.net/rapid"

	"trireme.dev/shared/sched/placement"
)

// TestTraces replays testdata: changes of an instance, each from where the one before has led. go test -rewrite writes them
// anew; read the difference.
func TestTraces(t *testing.T) {
	datadriven.Walk(t, "testdata", func(t *testing.T, path string) {
		var present placement.Layout
		var load placement.Load
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			switch d.Cmd {
			case "even": // npus=N, a line of the numbers of experts of the layers
				var n int
				d.ScanArgs(t, "npus", &n)
				present, load = placement.Even(numbers[int](t, d.Input), placement.First(n)), nil
				return show(present)
			case "load": // a line a layer
				load = nil
				for line := range strings.Lines(d.Input) {
					load = append(load, numbers[uint64](t, line))
				}
				return ""
			case "plan": // npus=(N,…) slots=N [slack=X] [lost=N]
				var o placement.Options
				var npus []int
				lost, percent := -1, 0
				d.ScanArgs(t, "slots", &o.Slots)
				d.MaybeScanArgs(t, "percent", &percent)
				d.MaybeScanArgs(t, "lost", &lost)
				for _, a := range d.CmdArgs {
					if a.Key == "npus" {
						for _, v := range a.Vals {
							npus = append(npus, numbers[int](t, v)...)
						}
					}
				}
				o.Slack = float64(percent) / 100
				if lost >= 0 {
					for _, layer := range present {
						for e := range layer {
							layer[e] = layer[e].Without(lost)
						}
					}
				}
				set := placement.Of(npus...)
				c, err := placement.Plan(present, load, set, o)
				if err != nil {
					return err.Error() + "\n"
				}
				present = c.Layout
				return change(c) + show(present) + fmt.Sprintf("balance %.3f\n", present.Balance(load, set))
			}
			d.Fatalf(t, "no command %q", d.Cmd)
			return ""
		})
	})
}

func numbers[T any](t *testing.T, s string) []T {
	t.Helper()
	var out []T
	for _, f := range strings.Fields(s) {
		var n T
		if _, err := fmt.Sscan(f, &n); err != nil {
			t.Fatalf("%q: %v", f, err)
		}
		out = append(out, n)
	}
	return out
}

func show(p placement.Layout) string {
	var b strings.Builder
	for l, layer := range p {
		fmt.Fprintf(&b, "layer %d:", l)
		for _, s := range layer {
			fmt.Fprintf(&b, " %s", strings.ReplaceAll(s.String(), ",", "+"))
		}
		b.WriteByte('\n')
	}
	return b.String()
}

func change(c *placement.Change) string {
	var b strings.Builder
	for _, x := range c.Copies {
		from := fmt.Sprint(x.From)
		if x.From == placement.Nowhere {
			from = "nowhere"
		}
		fmt.Fprintf(&b, "copy %d.%d from %s to %d\n", x.Layer, x.Expert, from, x.To)
	}
	for _, x := range c.Drops {
		fmt.Fprintf(&b, "drop %d.%d on %d\n", x.Layer, x.Expert, x.NPU)
	}
	return b.String()
}

// problem is what a plan is made of.
type problem struct {
	present placement.Layout
	load    placement.Load
	npus    placement.Set
	o       placement.Options
}

// anyProblem draws one: up to 64 NPUs of which some join, some leave and some are lost, layers of any number of experts, and
// loads with large differences, none at all, or unknown.
func anyProblem(rt *rapid.T) problem {
	r := rand.New(rand.NewPCG(rapid.Uint64().Draw(rt, "seed"), 0))
	before := placement.Set(r.Uint64()&r.Uint64()) | placement.Of(r.IntN(64))
	p := problem{npus: before}
	switch rapid.IntRange(0, 4).Draw(rt, "change") {
	case 0: // none
	case 1:
		p.npus |= placement.Set(r.Uint64() & r.Uint64() & r.Uint64())
	case 2:
		p.npus &= placement.Set(r.Uint64() | r.Uint64())
	case 3:
		p.npus = placement.Set(r.Uint64() & r.Uint64() & r.Uint64())
	case 4:
		p.npus = placement.First(rapid.IntRange(1, 64).Draw(rt, "npus"))
	}
	if p.npus == 0 {
		p.npus = placement.Of(3)
	}
	var counts []int
	most := 0
	for range rapid.IntRange(1, 3).Draw(rt, "layers") {
		n := rapid.IntRange(0, 130).Draw(rt, "experts")
		counts = append(counts, n)
		most = max(most, n)
	}
	p.present = placement.Even(counts, before)
	for _, layer := range p.present {
		for e := range layer {
			if r.IntN(5) == 0 {
				layer[e] |= placement.Set(r.Uint64()&r.Uint64()) & before
			}
			if r.IntN(40) == 0 {
				layer[e] = 0
			}
		}
	}
	p.o.Slots = (most+p.npus.Len()-1)/p.npus.Len() + rapid.IntRange(0, 3).Draw(rt, "more slots")
	p.o.Slack = rapid.SampledFrom([]float64{0, 0.01, 0.05, 0.2}).Draw(rt, "slack")
	if rapid.Bool().Draw(rt, "measured") {
		top := rapid.SampledFrom([]uint64{1, 2, 1000, 1 << 40}).Draw(rt, "largest")
		for _, n := range counts {
			layer := make([]uint64, n)
			for e := range layer {
				layer[e] = r.Uint64N(top) >> r.UintN(12)
			}
			p.load = append(p.load, layer)
		}
	}
	return p
}

// check fails unless a plan is well-formed: it is the layout that it says, reached by its copies from where experts are, on the
// right NPUs, within their slots, and a second plan from there finds nothing to do.
func (p *problem) check(t interface{ Fatalf(string, ...any) }) {
	was := clone(p.present)
	c, err := placement.Plan(p.present, p.load, p.npus, p.o)
	if err != nil {
		t.Fatalf("%v", err)
	}
	if !reflect.DeepEqual(was, p.present) {
		t.Fatalf("the plan changed what it was made from")
	}
	if err := c.Layout.Check(p.npus); err != nil {
		t.Fatalf("%v", err)
	}
	for l := range c.Layout {
		for n := range p.npus.All() {
			if has := c.Layout.On(l, n); len(has) > p.o.Slots {
				t.Fatalf("NPU %d has %d experts of layer %d in %d slots", n, len(has), l, p.o.Slots)
			}
		}
	}
	for _, x := range c.Copies {
		if was[x.Layer][x.Expert].Has(x.To) {
			t.Fatalf("%+v is there already", x)
		}
		if x.From == placement.Nowhere && p.present[x.Layer][x.Expert] != 0 ||
			x.From != placement.Nowhere && !p.present[x.Layer][x.Expert].Has(x.From) {
			t.Fatalf("%+v comes from where it is not: {%s}", x, p.present[x.Layer][x.Expert])
		}
		was[x.Layer][x.Expert] = was[x.Layer][x.Expert].With(x.To)
	}
	for _, x := range c.Drops {
		if !was[x.Layer][x.Expert].Has(x.NPU) {
			t.Fatalf("%+v is not there", x)
		}
		was[x.Layer][x.Expert] = was[x.Layer][x.Expert].Without(x.NPU)
	}
	if !reflect.DeepEqual(was, c.Layout) {
		t.Fatalf("copies and drops lead to %v, not %v", was, c.Layout)
	}
	again, err := placement.Plan(p.present, p.load, p.npus, p.o)
	if err != nil || !reflect.DeepEqual(again, c) {
		t.Fatalf("the same plan made again is another: %v", err)
	}
	stay, err := placement.Plan(c.Layout, p.load, p.npus, p.o)
	if err != nil || len(stay.Copies) > 0 {
		t.Fatalf("a second plan wants %d copies more: %v", len(stay.Copies), err)
	}
}

func clone(p placement.Layout) placement.Layout {
	to := make(placement.Layout, len(p))
	for l := range p {
		to[l] = append([]placement.Set{}, p[l]...)
	}
	return to
}

func TestPlans(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		p := anyProblem(rt)
		p.check(rt)
	})
}

func FuzzPlan(f *testing.F) {
	f.Fuzz(rapid.MakeFuzz(func(rt *rapid.T) {
		p := anyProblem(rt)
		p.check(rt)
	}))
}

func TestRefusals(t *testing.T) {
	present := placement.Even([]int{10}, placement.First(2))
	if _, err := placement.Plan(present, nil, placement.First(3), placement.Options{Slots: 3}); !errors.Is(err, placement.ErrNoRoom) {
		t.Errorf("10 experts in 9 slots: %v", err)
	}
	for name, try := range map[string]func() (*placement.Change, error){
		"no NPU": func() (*placement.Change, error) {
			return placement.Plan(present, nil, 0, placement.Options{Slots: 10})
		},
		"layers": func() (*placement.Change, error) {
			return placement.Plan(present, placement.Load{{}, {}}, placement.First(2), placement.Options{Slots: 10})
		},
		"experts": func() (*placement.Change, error) {
			return placement.Plan(present, placement.Load{{1, 2}}, placement.First(2), placement.Options{Slots: 10})
		},
		"slack": func() (*placement.Change, error) {
			return placement.Plan(present, nil, placement.First(2), placement.Options{Slots: 10, Slack: -1})
		},
	} {
		if c, err := try(); err == nil {
			t.Errorf("%s: %+v", name, c)
		}
	}
	if err := placement.Even([]int{4, 0, 7}, placement.Of(1, 5)).Check(placement.Of(1, 5)); err != nil {
		t.Error(err)
	}
	if err := present.Check(placement.First(1)); err == nil {
		t.Error("a layout on an NPU outside the instance is accepted")
	}
}

// TestMoves compares what is copied with plain EPLB, when the load drifts and when NPUs join and leave.
func TestMoves(t *testing.T) {
	const layers, experts, slack = 8, 128, 0.05
	for _, step := range []struct{ from, to int }{{4, 4}, {4, 6}, {6, 8}, {8, 6}, {5, 4}, {16, 17}} {
		r := rand.New(rand.NewPCG(uint64(step.from), uint64(step.to)))
		before := skewed(r, layers, experts, 0.5)
		drifted := make(placement.Load, layers)
		for l := range before {
			for _, v := range before[l] {
				drifted[l] = append(drifted[l], uint64(float64(v)*(0.7+0.6*r.Float64())))
			}
		}
		slots := func(n int) int { return (experts+n-1)/n + 2 }
		from, to := placement.First(step.from), placement.First(step.to)
		start, err := placement.Plan(placement.Even(even(layers, experts), from), before, from, placement.Options{Slots: slots(step.from), Slack: slack})
		if err != nil {
			t.Fatal(err)
		}
		c, err := placement.Plan(start.Layout, drifted, to, placement.Options{Slots: slots(step.to), Slack: slack})
		if err != nil {
			t.Fatal(err)
		}
		was, is := make(placement.Layout, layers), make(placement.Layout, layers)
		moved := 0
		for l := range layers {
			was[l], is[l] = eplb(before[l], step.from, slots(step.from)), eplb(drifted[l], step.to, slots(step.to))
			moved += copies(was[l], is[l])
		}
		got, theirs := c.Layout.Balance(drifted, to), is.Balance(drifted, to)
		t.Logf("%d to %d NPUs: %d copies, EPLB %d; balance %.3f, EPLB %.3f", step.from, step.to, len(c.Copies), moved, got, theirs)
		if got < theirs/(1+slack)-1e-6 {
			t.Errorf("%d to %d NPUs: balance %.3f, EPLB %.3f", step.from, step.to, got, theirs)
		}
		if 2*len(c.Copies) > moved {
			t.Errorf("%d to %d NPUs: %d copies, EPLB makes %d", step.from, step.to, len(c.Copies), moved)
		}
	}
}
