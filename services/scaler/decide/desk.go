// Package decide has the scaler's decisions made and follows what becomes of them: Desk is autoscale.State with what is under way, what
// has failed, what changes took, what was advised already, and what was expected of changes whose outcome is yet to be measured. It is
// pure: no clock, no goroutine, no I/O. Times are durations since some moment, the same for all.
package decide

import (
	"maps"
	"slices"
	"time"

	"trireme.dev/services/scaler/explain"
	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/wire"
)

const (
	// Settle is how long after a change its outcome is measured: by then what waited before should be gone (autoscale.Policy.Drain), and
	// the work of instances is measured in a window (signals) that lies behind the change.
	Settle = 20 * time.Second
	// remind is how long the same advice is not given again.
	remind = 10 * time.Minute
)

// Options of a Desk.
type Options struct {
	Scaler string        // instance id of the process
	NewID  func() string // makes ids of decisions: letters and digits
	Settle time.Duration // 0: Settle
}

// Desk is not safe for concurrent use.
type Desk struct {
	options Options
	state   *autoscale.State

	underWay *explain.Decision // that is carried out; nil: none is
	adopted  bool              // by a predecessor: what was expected is not known
	costs    map[autoscale.Action]autoscale.Cost
	failed   []failure
	advised  map[string]time.Duration // when it was, by what it is
	awaiting *awaiting
	last     explain.Measured
}

type failure struct {
	change autoscale.Change
	at     time.Duration
	why    string
}

// awaiting is a change that was made, and whose outcome is to be measured.
type awaiting struct {
	outcome explain.Outcome
	made    time.Duration
}

// New returns a Desk that has seen nothing.
func New(p autoscale.Policy, o Options) *Desk {
	if o.Settle == 0 {
		o.Settle = Settle
	}
	return &Desk{options: o, state: autoscale.New(p), costs: map[autoscale.Action]autoscale.Cost{}, advised: map[string]time.Duration{}}
}

// SetPolicy changes the policy. What was seen stays.
func (d *Desk) SetPolicy(p autoscale.Policy) { d.state.SetPolicy(p) }

// Policy is the policy in force.
func (d *Desk) Policy() autoscale.Policy { return d.state.Policy() }

// Able says whether the caller can make a change, and if not what a person has to do for it.
type Able func(autoscale.Change) (advice string, ok bool)

// Turn is what comes of one view.
type Turn struct {
	Decision autoscale.Decision
	Events   []wire.Event
	// Do is set when the caller is to carry the change of Decision out, under this id, and to say Ended when it is.
	Do string
}

// Turn decides once. It completes the view by what the Desk knows: what is under way, has failed, and what changes took. Who leads tells
// its decisions, and acts where the policy's mode is auto. Who does not lead decides all the same, so that it knows as much when it does.
func (d *Desk) Turn(v *autoscale.View, leads bool, able Able) (t Turn) {
	v.Pending = v.Pending || d.underWay != nil
	p := d.state.Policy()
	d.failed = slices.DeleteFunc(d.failed, func(f failure) bool { return v.Now-f.at >= p.Retry })
	v.Failed = nil
	for _, f := range d.failed {
		v.Failed = append(v.Failed, autoscale.Failure{Change: f.change, Ago: v.Now - f.at, Why: f.why})
	}
	v.Costs = nil
	if len(d.costs) > 0 {
		v.Costs = maps.Clone(d.costs)
	}
	t.Decision = d.state.Decide(v)
	measured := d.last
	if !t.Decision.Blind && p.Mode != autoscale.Off {
		measured = explain.Measure(v, &t.Decision)
		d.last = measured
		t.Events = d.measure(v.Now, false, t.Events)
	}
	if t.Decision.Change.Action == autoscale.None || !leads {
		return t
	}
	told := explain.Decision{
		ID: d.options.NewID(), Scaler: d.options.Scaler, Mode: p.Mode, Decision: t.Decision, Before: measured, Queues: v.Queues, Ages: explain.AgesOf(v),
	}
	advice, ok := able(t.Decision.Change)
	switch {
	case p.Mode != autoscale.Auto && ok:
		told.Advice = explain.Command(t.Decision.Change, v)
	case p.Mode != autoscale.Auto:
		told.Advice = advice
	case !ok: // others are looked for next time
		told.Advice = advice
		d.failed = append(d.failed, failure{t.Decision.Change, v.Now, "it is for a person to do: " + advice})
	default:
		t.Do = told.ID
		d.underWay, d.adopted = &told, false
		t.Events = append(d.measure(v.Now, true, t.Events), explain.DecisionEvent(told))
		return t
	}
	if d.news(v.Now, t.Decision.Change) {
		t.Events = append(t.Events, explain.DecisionEvent(told))
	}
	return t
}

// news reports whether an advice is one, and takes note of it.
func (d *Desk) news(now time.Duration, c autoscale.Change) bool {
	maps.DeleteFunc(d.advised, func(_ string, at time.Duration) bool { return now-at >= remind })
	key := c.Sentence()
	_, old := d.advised[key]
	if !old {
		d.advised[key] = now
	}
	return !old
}

// Adopt takes over a change that a predecessor has begun.
func (d *Desk) Adopt(id string, c autoscale.Change) {
	d.underWay = &explain.Decision{ID: id, Scaler: d.options.Scaler, Decision: autoscale.Decision{Change: c}}
	d.adopted = true
}

// Await takes over an outcome that a predecessor has told, and perhaps not measured: of one that was made it is measured here. When that was
// is not known by this one's clock, so that the time is counted from now.
func (d *Desk) Await(now time.Duration, o explain.Outcome) {
	if o.Made && o.Measured == nil {
		o.Succeeded = o.Succeeded || o.Scaler != d.options.Scaler
		o.Scaler = d.options.Scaler
		d.awaiting = &awaiting{o, now}
	}
}

// Drop forgets what is under way, and what waits to be measured: another scaler leads now, and tells what becomes of it.
func (d *Desk) Drop() { d.underWay, d.awaiting = nil, nil }

// UnderWay is what is being carried out; nil: nothing.
func (d *Desk) UnderWay() *explain.Decision { return d.underWay }

// Result is how a change has ended.
type Result struct {
	Made  bool
	Why   string // it was not made, or what went wrong beside
	Took  time.Duration
	Bytes int64 // that were copied
}

// Ended takes note of how the change under way has ended, which is told at once; of one that was made the outcome is told again when it
// can be measured.
func (d *Desk) Ended(now time.Duration, r Result) (events []wire.Event) {
	u := d.underWay
	if u == nil {
		return nil
	}
	d.underWay = nil
	o := explain.Outcome{ID: u.ID, Scaler: d.options.Scaler, Change: u.Decision.Change, Made: r.Made, Why: r.Why, Took: r.Took, Succeeded: d.adopted}
	if !r.Made {
		d.failed = append(d.failed, failure{u.Decision.Change, now, r.Why})
		return []wire.Event{explain.OutcomeEvent(o)}
	}
	if !d.adopted {
		o.Before = &u.Before
		if a := u.Decision.Alternatives; len(a) > 0 {
			o.Expected = &a[0].Effect
		}
		d.cost(u.Decision.Change.Action, r)
	}
	events = append(d.measure(now, true, nil), explain.OutcomeEvent(o)) // of the change before, and of this one
	d.awaiting = &awaiting{o, now}
	return events
}

// cost takes note of what a change took: the average of the last few.
func (d *Desk) cost(a autoscale.Action, r Result) {
	c, ok := d.costs[a]
	if !ok {
		d.costs[a] = autoscale.Cost{Time: r.Took, Bytes: r.Bytes}
		return
	}
	d.costs[a] = autoscale.Cost{Time: (c.Time + r.Took) / 2, Bytes: (c.Bytes + r.Bytes) / 2}
}

// measure appends the outcome of the change that was made last, once it is time, or the next one is to be made.
func (d *Desk) measure(now time.Duration, next bool, events []wire.Event) []wire.Event {
	a := d.awaiting
	if a == nil || !next && now-a.made < d.options.Settle {
		return events
	}
	d.awaiting = nil
	a.outcome.After, a.outcome.Measured = now-a.made, new(d.last)
	return append(events, explain.OutcomeEvent(a.outcome))
}
