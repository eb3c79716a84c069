package decide_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"trireme.dev/services/scaler/decide"
	"trireme.dev/services/scaler/explain"
	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/wire"
)

// fleet is an encoder, a prefill and a decoder that a load meets, and spare NPUs.
type fleet struct {
	view autoscale.View
	load float64 // requests a second, of 100 prompt tokens; an NPU computes 1000 in a second
}

func newFleet(spare ...int) *fleet {
	f := &fleet{load: 1}
	for i, roles := range []string{"E", "P", "D"} {
		f.view.Instances = append(f.view.Instances, autoscale.Instance{
			ID: roles + "-id", Name: roles, Node: "n", Roles: roles, NPUs: []int{i}, Ready: true,
		})
	}
	f.view.Spare = map[string][]int{"n": spare}
	return f
}

func (f *fleet) tick() *autoscale.View {
	known := autoscale.Signal{Known: true}
	f.view.Now += time.Second
	f.view.Pending = false
	f.view.Demand.Signal = known
	f.view.Demand.Requests += f.load
	f.view.Demand.Prompt += 100 * f.load
	for s := range f.view.Queues {
		f.view.Queues[s] = autoscale.Queue{Signal: known}
	}
	for k := range f.view.Instances {
		i := &f.view.Instances[k]
		i.Signal, i.Busy, i.Rate = known, 0.5, [autoscale.Stages]float64{}
		i.Rate[k] = 1000
	}
	v := f.view
	return &v
}

func policy(mode autoscale.Mode) autoscale.Policy {
	p := autoscale.Default()
	p.Mode = mode
	p.Actions = []autoscale.Action{autoscale.Widen, autoscale.Narrow}
	return p
}

func newDesk(mode autoscale.Mode) *decide.Desk {
	n := 0
	return decide.New(policy(mode), decide.Options{Scaler: "s", NewID: func() string { n++; return fmt.Sprint("d", n) }})
}

func able(autoscale.Change) (string, bool) { return "", true }

func read[T any](t *testing.T, e wire.Event, kind string) T {
	t.Helper()
	var x T
	if e.Kind != kind {
		t.Fatalf("event %s, want %s: %s", e.Kind, kind, e.Text)
	}
	if err := json.Unmarshal(e.Data, &x); err != nil {
		t.Fatal(err)
	}
	return x
}

// until turns until something is told.
func until(t *testing.T, d *decide.Desk, f *fleet, a decide.Able) decide.Turn {
	t.Helper()
	for range 100 {
		if turn := d.Turn(f.tick(), true, a); len(turn.Events) > 0 {
			return turn
		}
	}
	t.Fatal("nothing is told in 100 s")
	return decide.Turn{}
}

// A burst: one decision, told and to be carried out; nothing else meanwhile; then what came of it, measured when it has settled.
func TestAutoDecidesAndMeasures(t *testing.T) {
	t.Parallel()
	d, f := newDesk(autoscale.Auto), newFleet(3, 4, 5)
	for range 70 {
		if turn := d.Turn(f.tick(), true, able); len(turn.Events) > 0 {
			t.Fatalf("a steady load that is borne: %+v", turn.Events)
		}
	}
	f.load = 10 // 1000 tokens a second, of which an NPU is to do 700
	turn := until(t, d, f, able)
	told := read[explain.Decision](t, turn.Events[0], wire.EventScalerDecision)
	if c := told.Decision.Change; turn.Do != told.ID || c.Action != autoscale.Widen || c.Instance != "P" || told.Advice != "" {
		t.Fatalf("%+v", told)
	}
	if told.Before.Stage != [3]int{1, 1, 1} || told.Before.Spare != 3 || told.Before.Busy != [3]float64{0.5, 0.5, 0.5} || told.Before.Need[1] <= 1 {
		t.Errorf("before: %+v", told.Before)
	}
	for range 10 {
		v := f.tick()
		if turn := d.Turn(v, true, able); len(turn.Events) > 0 || turn.Do != "" || !v.Pending {
			t.Fatalf("while a change is under way: %+v", turn)
		}
	}
	c := told.Decision.Change
	p := &f.view.Instances[1]
	p.NPUs = append(p.NPUs, c.Numbers...)
	f.view.Spare["n"] = f.view.Spare["n"][len(c.Numbers):]
	e := d.Ended(f.view.Now, decide.Result{Made: true, Took: 3 * time.Second, Bytes: 7})
	if o := read[explain.Outcome](t, e[0], wire.EventScalerOutcome); len(e) != 1 || !o.Made || o.Measured != nil {
		t.Fatalf("%+v", e)
	}
	v := f.tick()
	d.Turn(v, true, able)
	if v.Costs[autoscale.Widen] != (autoscale.Cost{Time: 3 * time.Second, Bytes: 7}) {
		t.Errorf("costs: %v", v.Costs)
	}
	turn = until(t, d, f, able)
	o := read[explain.Outcome](t, turn.Events[0], wire.EventScalerOutcome)
	if !o.Made || o.ID != told.ID || o.After < decide.Settle || o.Took != 3*time.Second || o.Measured.NPUs != o.Expected.NPUs || o.Before.NPUs != 3 {
		t.Errorf("%+v", o)
	}
	if !strings.Contains(turn.Events[0].Text, "of what prefill is sized for is asked of it") {
		t.Error(turn.Events[0].Text)
	}
}

// What fails is told at once and not tried again for a while; what only a person can do is advice, once, and something else is looked for.
func TestFailuresAndAdvice(t *testing.T) {
	t.Parallel()
	d, f := newDesk(autoscale.Auto), newFleet(3, 4, 5)
	f.load = 20
	turn := until(t, d, f, able)
	e := d.Ended(f.view.Now, decide.Result{Why: "no memory"})
	if o := read[explain.Outcome](t, e[0], wire.EventScalerOutcome); o.Made || o.Why != "no memory" || o.ID != turn.Do || o.Measured != nil {
		t.Fatalf("%+v", o)
	}
	last := f.view.Now
	turn = until(t, d, f, able)
	if turn.Do == "" || f.view.Now-last < d.Policy().Retry {
		t.Errorf("tried again after %v: %+v", f.view.Now-last, turn)
	}
	v := f.tick()
	d.Drop() // another one leads
	if d.Turn(v, true, able); d.UnderWay() != nil && v.Pending {
		t.Error("what a successor carries out is under way")
	}

	d, f = newDesk(autoscale.Auto), newFleet(3, 4, 5)
	f.load = 20
	unable := func(autoscale.Change) (string, bool) { return "docker compose up", false }
	turn = until(t, d, f, unable)
	if told := read[explain.Decision](t, turn.Events[0], wire.EventScalerDecision); turn.Do != "" || told.Advice != "docker compose up" {
		t.Errorf("%+v", told)
	}
	n := 0
	for range 300 {
		n += len(d.Turn(f.tick(), true, unable).Events)
	}
	if n != 0 {
		t.Errorf("the same advice was given %d times more", n)
	}
}

// In mode advise everything is told, with the command, and nothing done; who does not lead says nothing; off decides nothing.
func TestModes(t *testing.T) {
	t.Parallel()
	d, f := newDesk(autoscale.Advise), newFleet(3, 4, 5)
	f.load = 20
	turn := until(t, d, f, able)
	told := read[explain.Decision](t, turn.Events[0], wire.EventScalerDecision)
	if want := fmt.Sprintf("trireme scale P %d", told.Decision.Change.NPUs); turn.Do != "" || told.Advice != want || !strings.Contains(turn.Events[0].Text, want) {
		t.Errorf("%+v, want the advice %q", told, want)
	}
	d, f = newDesk(autoscale.Advise), newFleet(3, 4, 5) // where the command would not do it either
	f.load = 20
	turn = until(t, d, f, func(autoscale.Change) (string, bool) { return "docker compose up", false })
	if told := read[explain.Decision](t, turn.Events[0], wire.EventScalerDecision); told.Advice != "docker compose up" {
		t.Errorf("%+v", told)
	}
	for _, leads := range []bool{false, true} {
		mode := map[bool]autoscale.Mode{false: autoscale.Auto, true: autoscale.Off}[leads]
		d, f = newDesk(mode), newFleet(3, 4, 5)
		f.load = 20
		for range 100 {
			if turn := d.Turn(f.tick(), leads, able); len(turn.Events) > 0 || turn.Do != "" {
				t.Fatalf("leads %v, mode %s: %+v", leads, mode, turn)
			}
		}
	}
}

// A change that a predecessor began is brought to its end: its outcome is told, though not what was expected.
func TestAdopted(t *testing.T) {
	t.Parallel()
	d, f := newDesk(autoscale.Auto), newFleet(3)
	d.Adopt("old", autoscale.Change{Action: autoscale.Widen, Instance: "P", NPUs: 2, Stage: autoscale.Prefill})
	v := f.tick()
	if turn := d.Turn(v, true, able); !v.Pending || turn.Do != "" {
		t.Errorf("%+v", turn)
	}
	d.Ended(f.view.Now, decide.Result{Made: true})
	turn := until(t, d, f, able)
	if o := read[explain.Outcome](t, turn.Events[0], wire.EventScalerOutcome); !o.Made || !o.Succeeded || o.ID != "old" || o.Expected != nil || o.Measured == nil {
		t.Errorf("%+v", o)
	}
}

// An outcome that waits to be measured when another scaler comes to lead is that one's: it measures it when it is time, beside what its
// predecessor has expected, and the one that leads no more says nothing of it.
func TestOutcomeOfAPredecessor(t *testing.T) {
	t.Parallel()
	d, f := newDesk(autoscale.Auto), newFleet(3, 4, 5)
	f.load = 20
	told := until(t, d, f, able)
	made := read[explain.Outcome](t, d.Ended(f.view.Now, decide.Result{Made: true, Took: time.Second})[0], wire.EventScalerOutcome)
	d.Drop()
	f.load = 1
	for range 30 {
		if turn := d.Turn(f.tick(), false, able); len(turn.Events) > 0 {
			t.Fatalf("who does not lead tells %+v", turn.Events)
		}
	}

	n := decide.New(policy(autoscale.Auto), decide.Options{Scaler: "next", NewID: func() string { return "n" }})
	n.Turn(f.tick(), false, able)
	n.Await(f.view.Now, made)
	began := f.view.Now
	turn := until(t, n, f, able)
	o := read[explain.Outcome](t, turn.Events[0], wire.EventScalerOutcome)
	if o.ID != told.Do || o.Scaler != "next" || !o.Succeeded || o.Measured == nil || o.Expected == nil || o.Before == nil || o.Took != time.Second || f.view.Now-began < decide.Settle {
		t.Errorf("after %v: %+v", f.view.Now-began, o)
	}

	n.Await(f.view.Now, explain.Outcome{ID: "failed", Why: "no memory"})
	o.Measured = new(explain.Measured)
	n.Await(f.view.Now, o)
	for range 30 {
		if turn := n.Turn(f.tick(), true, able); len(turn.Events) > 0 && turn.Events[0].Kind == wire.EventScalerOutcome {
			t.Fatalf("of one that was not made, or is measured: %+v", turn.Events)
		}
	}
}
