package autoscale_test

import (
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"trireme.dev/shared/sched/autoscale"
)

var update = flag.Bool("update", false, "write the golden traces anew")

func policy(change func(*autoscale.Policy)) autoscale.Policy {
	p := autoscale.Default()
	p.Mode = autoscale.Auto
	if change != nil {
		change(&p)
	}
	return p
}

// drawn is a fleet, a load and a policy, by chance.
func drawn(t *rapid.T) (*world, autoscale.Policy) {
	kinds := []string{"E", "P", "D", "EP", "PD", "ED", "EPD"}
	var all []string
	for _, must := range []string{"E", "P", "D"} { // each stage has somebody
		var able []string
		for _, k := range kinds {
			if strings.Contains(k, must) {
				able = append(able, k)
			}
		}
		all = append(all, fmt.Sprintf("%s*%d", rapid.SampledFrom(able).Draw(t, "kind"), rapid.IntRange(1, 4).Draw(t, "npus")))
	}
	for range rapid.IntRange(0, 4).Draw(t, "more") {
		all = append(all, fmt.Sprintf("%s*%d", rapid.SampledFrom(kinds).Draw(t, "kind"), rapid.IntRange(1, 4).Draw(t, "npus")))
	}
	for _, standby := range []string{"e", "p", "d"} {
		if rapid.Bool().Draw(t, "standby") {
			all = append(all, standby)
		}
	}
	w := newWorld(strings.Join(all, " "), rapid.IntRange(0, 6).Draw(t, "spare"))
	for k := range w.view.Instances {
		w.view.Instances[k].Replica = rapid.Bool().Draw(t, "replica")
	}
	w.noise = rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 1))
	p := policy(func(p *autoscale.Policy) {
		p.Shrink.Window = time.Duration(rapid.IntRange(2, 60).Draw(t, "window")) * time.Second
		if rapid.Bool().Draw(t, "bounded") {
			for s := range p.Bounds {
				has := w.npus(autoscale.Stage(s))
				p.Bounds[s].Min = rapid.IntRange(0, has).Draw(t, "min")
				p.Bounds[s].Max = has + rapid.IntRange(0, 3).Draw(t, "max")
			}
			p.Budget = w.all() + rapid.IntRange(0, 3).Draw(t, "budget")
		}
		for _, a := range autoscale.Actions {
			if rapid.IntRange(0, 4).Draw(t, "without "+string(a)) == 0 {
				allowed := p.Actions[:0]
				for _, b := range p.Actions {
					if a != b {
						allowed = append(allowed, b)
					}
				}
				p.Actions = allowed
			}
		}
	})
	if err := p.Check(); err != nil {
		t.Fatal(err)
	}
	return w, p
}

// Whatever the load does, no stage is ever without an NPU, below its least, or above its most, and the budget holds; and every change
// can be carried out as it is told.
func TestBounds(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		w, p := drawn(rt)
		s := autoscale.New(p)
		changes := 0
		for range rapid.IntRange(1, 4).Draw(rt, "phases") {
			w.load = rapid.SampledFrom([]float64{0, 0.5, 2, 6, 20}).Draw(rt, "load")
			for k := range w.mix {
				w.mix[k] = rapid.SampledFrom([]float64{0, 1, 1, 8}).Draw(rt, "mix")
			}
			changes += len(w.run(rt, s, rapid.IntRange(5, 60).Draw(rt, "seconds"), func(d autoscale.Decision) {
				for k, b := range p.Bounds {
					n := w.npus(autoscale.Stage(k))
					if n < max(1, b.Min) || b.Max > 0 && n > b.Max {
						rt.Fatalf("%s has %d NPUs, bounds %+v, after %+v", autoscale.Stage(k), n, b, d.Change)
					}
				}
				if p.Budget > 0 && w.all() > p.Budget {
					rt.Fatalf("%d NPUs of a budget of %d after %+v", w.all(), p.Budget, d.Change)
				}
				for _, a := range d.Alternatives {
					if a.Refused == "" && a.Score < d.Alternatives[0].Score && d.Change.Action != autoscale.None {
						rt.Fatalf("chosen is %+v, better is %+v", d.Alternatives[0], a)
					}
				}
			}))
		}
		rt.Logf("%d changes", changes)
	})
}

// After a step in the load the fleet has what it needs within as many changes as there are NPUs that have to change hands, and
// then stays as it is as long as the load does.
func TestConverges(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		w, p := drawn(rt)
		p = policy(func(q *autoscale.Policy) { q.Shrink = p.Shrink })
		w.noise = nil
		s := autoscale.New(p)
		w.load = rapid.Float64Range(0.2, 10).Draw(rt, "before")
		w.run(rt, s, 250, nil)
		w.load = rapid.Float64Range(0.2, 10).Draw(rt, "after")
		before := w.all() + len(w.view.Spare["n"])
		made := w.run(rt, s, 250, nil)
		if len(made) > before {
			rt.Fatalf("%d changes with %d NPUs: %+v", len(made), before, made)
		}
		if again := w.run(rt, s, 150, nil); len(again) > 0 {
			rt.Fatalf("the load has not changed for 250 s, and there is %+v, after %+v", again, made)
		}
	})
}

// A fleet that is too small for its load comes to rest, too. In this one an NPU once went to and fro between decode and encode for as long
// as the load lasted, as each needed it more than the other when it had not got it.
func TestTooSmallAFleetComesToRest(t *testing.T) {
	w := newWorld("EP P D e e", 3)
	s := autoscale.New(policy(func(p *autoscale.Policy) { p.Shrink.Window = 2 * time.Second }))
	w.run(t, s, 250, nil)
	w.load = 8
	if made := w.run(t, s, 250, nil); len(made) > 6 {
		t.Errorf("%d changes with 6 NPUs: %+v", len(made), made)
	}
	if made := w.run(t, s, 3000, nil); len(made) > 0 {
		t.Errorf("the load has not changed for 250 s, and there is %+v", made)
	}
}

// A load that is noise around a threshold, wherever it is, makes a change now and then at most: an hour of it.
func TestNoiseChangesNothing(t *testing.T) {
	const hours = 40
	changes := 0
	for seed := range uint64(hours) {
		w := newWorld("E E E E P P D D", 4)
		w.noise = rand.New(rand.NewPCG(seed, 7))
		w.load = 2.5 + 0.1*float64(seed%10) // around where another encoder would be needed, or is not any more
		s := autoscale.New(policy(nil))
		w.run(t, s, 600, nil) // it finds what it needs
		made := w.run(t, s, 3600, nil)
		changes += len(made)
		if len(made) > 2 {
			t.Errorf("load %.1f: %d changes in an hour of noise: %+v", w.load, len(made), made)
		}
	}
	t.Logf("%d changes in %d hours", changes, hours)
	if changes > hours/2 {
		t.Errorf("%d changes in %d hours of noise", changes, hours)
	}
}

// What is missing, or too old, changes nothing, whatever the load; and an hour without any traffic is no missing signal.
func TestStaleSignalsChangeNothing(t *testing.T) {
	spoil := map[string]func(*autoscale.View){
		"demand unknown":   func(v *autoscale.View) { v.Demand.Known = false },
		"demand old":       func(v *autoscale.View) { v.Demand.Age = 2 * time.Second },
		"queue unknown":    func(v *autoscale.View) { v.Queues[1].Known = false },
		"queue old":        func(v *autoscale.View) { v.Queues[2].Age = time.Minute },
		"instance unknown": func(v *autoscale.View) { v.Instances[0].Known = false },
		"instance old":     func(v *autoscale.View) { v.Instances[2].Age = 1501 * time.Millisecond },
		"no instances":     func(v *autoscale.View) { v.Instances = nil },
	}
	for name, spoil := range spoil {
		for _, load := range []float64{0, 1, 50} {
			w := newWorld("E E P D D", 4)
			w.load = load
			s := autoscale.New(policy(nil))
			for range 300 {
				v := *w.tick()
				v.Instances = append([]autoscale.Instance(nil), v.Instances...)
				spoil(&v)
				if d := s.Decide(&v); d.Change.Action != autoscale.None || !d.Blind || d.Why == "" {
					t.Fatalf("%s, load %g: %+v", name, load, d)
				}
			}
		}
	}
	w := newWorld("E E P P D D", 0)
	w.load = 0
	made := w.run(t, autoscale.New(policy(nil)), 3600, nil)
	if w.all() != 3 {
		t.Errorf("after an hour without traffic there are %d NPUs in use, by %+v", w.all(), made)
	}
}

// The same Views lead to the same Decisions, to the letter, also when they were written down and read again.
func TestReplay(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		w, p := drawn(rt)
		s := autoscale.New(p)
		var views, decisions [][]byte
		for range 3 {
			w.load = rapid.SampledFrom([]float64{0, 1, 5, 20}).Draw(rt, "load")
			for range 60 {
				v := w.tick()
				views = append(views, marshal(rt, v))
				d := s.Decide(v)
				decisions = append(decisions, marshal(rt, d))
				w.do(rt, d.Change)
			}
		}
		again := autoscale.New(p)
		for i, text := range views {
			var v autoscale.View
			if err := json.Unmarshal(text, &v); err != nil {
				rt.Fatal(err)
			}
			if got := marshal(rt, again.Decide(&v)); string(got) != string(decisions[i]) {
				rt.Fatalf("second %d: %s, and replayed: %s", i, decisions[i], got)
			}
		}
	})
}

func marshal(t rapid.TB, v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// Situations with what is done about them, second by second, in words.
func TestSituations(t *testing.T) {
	for _, c := range []struct {
		name   string
		world  func() *world
		policy func(*autoscale.Policy)
		script func(w *world, second int)
		time   int
	}{
		{name: "burst", world: func() *world { return newWorld("E P D", 12) }, time: 300,
			script: func(w *world, s int) {
				w.load = 0.5
				if s >= 60 && s < 180 {
					w.load = 5
				}
			}},
		{name: "pictures, then long answers", world: func() *world { return newWorld("E E E E E P P D", 0) }, time: 180,
			script: func(w *world, s int) {
				w.load, w.mix = 3, [3]float64{1, 1, 0.5}
				if s >= 60 {
					w.mix = [3]float64{0.3, 1, 5}
				}
			}},
		{name: "wide instances and a standby", world: func() *world { return newWorld("E*3 P*2 D*2 d", 3) }, time: 240,
			script: func(w *world, s int) {
				if w.load = 1.5; s >= 30 && s < 100 {
					w.mix[2] = 9
				} else {
					w.mix[2] = 1
				}
				for k := range w.view.Instances {
					w.view.Instances[k].Replica = false
				}
			}},
		{name: "all roles together", world: func() *world { return newWorld("EPD EPD", 6) }, time: 200,
			script: func(w *world, s int) {
				if w.load = 0.4; s >= 30 && s < 90 {
					w.load = 2.5
				}
			}},
		{name: "budget and bounds", world: func() *world { return newWorld("E P D", 12) }, time: 60,
			policy: func(p *autoscale.Policy) { p.Budget, p.Bounds[0].Max = 6, 2 },
			script: func(w *world, s int) { w.load = 8 }},
		{name: "a change that fails", world: func() *world { return newWorld("E P D", 2) }, time: 30,
			script: func(w *world, s int) {
				w.load = 2
				w.view.Failed = []autoscale.Failure{{Change: autoscale.Change{Action: autoscale.Add, Node: "n", Roles: "E"}, Ago: 10 * time.Second, Why: "no answer"}}
			}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := c.world()
			s := autoscale.New(policy(c.policy))
			var b strings.Builder
			last := ""
			for second := range c.time {
				c.script(w, second)
				d := s.Decide(w.tick())
				w.do(t, d.Change)
				if d.Change.Action != autoscale.None || d.Why != last && !strings.ContainsAny(d.Why, "0123456789") {
					fmt.Fprintf(&b, "%4d s  %s\n", second, d.Why)
				}
				last = d.Why
			}
			var end []string
			for _, i := range w.view.Instances {
				end = append(end, fmt.Sprintf("%s*%d", i.Roles, len(i.NPUs)))
			}
			fmt.Fprintf(&b, "end     %s, %d spare\n", strings.Join(end, " "), len(w.view.Spare["n"]))
			file := filepath.Join("testdata", strings.ReplaceAll(c.name, " ", "_")+".txt")
			if *update {
				if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if got := b.String(); got != string(want) {
				t.Errorf("%s: decided is now\n%swas\n%s", file, got, want)
			}
		})
	}
}

// Decoders whose steps had one batch only, as at night, give NPUs up that nobody needs; what a larger batch would take is not known, so
// that they get none for more than there is.
func TestOneBatchIsEnoughToTakeAway(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		output float64 // tokens a second; at 10 ms a step an NPU does 100 with a batch of 1
		want   autoscale.Action
	}{{20, autoscale.Narrow}, {300, autoscale.None}, {10000, autoscale.None}} {
		w := newWorld("E P D*4", 4)
		w.load = 0.2
		s := autoscale.New(policy(nil))
		got := autoscale.Change{Action: autoscale.None}
		for range 300 {
			v := w.tick()
			v.Demand.Output = c.output * v.Now.Seconds()
			v.Queues[autoscale.Decode].InWork = 1
			v.Instances[2].Steps = []autoscale.Step{{Batch: 1, Took: 10 * time.Millisecond}}
			if d := s.Decide(v); d.Change.Action != autoscale.None {
				got = d.Change
				break
			}
		}
		if got.Action != c.want || got.Action == autoscale.Narrow && got.NPUs != 1 {
			t.Errorf("%g tokens a second: %+v, want %s", c.output, got, c.want)
		}
	}
}

// A stage that has fewer NPUs than the policy wants at least is said to be short of that, and not of what little it needs.
func TestTooFewByThePolicy(t *testing.T) {
	t.Parallel()
	for bound, load := range map[int]float64{2: 0, 3: 0.2} {
		w := newWorld("E P D", 4)
		w.load = load
		s := autoscale.New(policy(func(p *autoscale.Policy) { p.Bounds[autoscale.Decode].Min = bound }))
		var why string
		for range 60 {
			if d := s.Decide(w.tick()); d.Change.Action != autoscale.None {
				why = d.Why
				break
			}
		}
		if want := fmt.Sprintf("decode is to have at least %d NPUs (stages.decode.min) and has 1: ", bound); !strings.HasPrefix(why, want) {
			t.Errorf("with stages.decode.min %d: %q, want %q…", bound, why, want)
		}
	}
}
