package autoscale

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// State is what is remembered from one View to the next.
type State struct {
	policy   Policy
	arrivals arrivals
	capacity capacity
	needs    []needed // in order of time, as far back as the longer window
	changed  bool     // something was, the last time at:
	last     time.Duration
	given    []given // in order of time: for whose sake NPUs were moved
}

// needed is how many NPUs were needed at a moment.
type needed struct {
	at    time.Duration
	least [Stages]float64 // that is sure
	most  [Stages]float64 // that is likely; where it is not known all that the stage has
}

// New returns a State that has seen nothing.
func New(p Policy) *State { return &State{policy: p} }

// SetPolicy changes the policy. What was seen stays.
func (s *State) SetPolicy(p Policy) { s.policy = p }

// Policy is the policy in force.
func (s *State) Policy() Policy { return s.policy }

// Decide says what is to be done now. It is to be called about once a second, with each View once; a Decision that changes
// something is taken to be carried out, or advised, from then on, and what becomes of it later Views tell.
func (s *State) Decide(v *View) Decision {
	d := Decision{Now: v.Now, Change: Change{Action: None}, Inputs: Inputs{TTFT: -1, TPOT: -1}}
	if s.policy.Mode == Off {
		d.Why = "the mode is off"
		return d
	}
	if missing := s.missing(v); missing != "" {
		s.needs = s.needs[:0] // what was needed meanwhile nobody knows
		d.Why, d.Blind = "nothing is changed without knowing: "+missing, true
		return d
	}
	s.arrivals.see(v.Now, v.Demand.totals())
	arriving, within, ok := s.arrivals.rates()
	if !ok {
		d.Why = "what arrives is measured from now on"
		return d
	}
	o := &options{v: v, p: &s.policy, now: fleetOf(v), all: sortedInstances(v)}
	s.capacity.see(v, arriving)
	var has [Stages]int
	for k := range Stages {
		has[k] = o.now.with(Stage(k))
	}
	d.Inputs.Stages = s.capacity.need(v, &s.policy, arriving, has)
	// What is sure is given, and what is sure not to be wanted is taken away: by a standard error less, and more, than is likely.
	w := s.window(v.Now, &d.Inputs,
		s.capacity.need(v, &s.policy, arriving.plus(-1, within), has), s.capacity.need(v, &s.policy, arriving.plus(1, within), has))
	d.Inputs.NPUs = o.now.all()
	d.Inputs.Utilisation = o.now.utilisation(d.Inputs.needs())
	for _, n := range v.Spare {
		d.Inputs.Spare += len(n)
	}
	missed := s.attained(v, &d.Inputs)
	switch {
	case v.Pending:
		d.Why = "a change is under way"
	case w.seen < s.policy.Grow.Window:
		d.Why = fmt.Sprintf("the need is known for %v, %v are wanted before something changes", w.seen.Round(time.Second), s.policy.Grow.Window)
	case s.grow(&d, o, w, missed, arriving), s.shrink(&d, o, w, missed), s.rebalance(&d, o):
		s.changed, s.last = true, v.Now
		if d.Change.Action == Move {
			s.give(v.Now, d.Change, &o.best().after, arriving)
		}
	}
	d.LeftOut = max(0, len(o.listed)-told)
	return d
}

// missing says which signal is missing or too old; empty: none.
func (s *State) missing(v *View) string {
	bad := func(what string, g Signal) string {
		switch {
		case !g.Known:
			return what + " is not known"
		case g.Age > s.policy.Stale:
			return fmt.Sprintf("%s is %v old, at most %v are wanted", what, g.Age.Round(time.Millisecond), s.policy.Stale)
		}
		return ""
	}
	if m := bad("demand", v.Demand.Signal); m != "" {
		return m
	}
	for k, q := range v.Queues {
		if m := bad("the queue of "+Stage(k).String(), q.Signal); m != "" {
			return m
		}
	}
	if len(v.Instances) == 0 {
		return "there are no instances"
	}
	for k := range v.Instances {
		if m := bad("instance "+v.Instances[k].Name, v.Instances[k].Signal); m != "" {
			return m
		}
	}
	return ""
}

// window is what was needed lately.
type window struct {
	seen time.Duration   // for so long it is known
	low  [Stages]float64 // least of the window for growing
	near [Stages]float64 // greatest of the window for growing
	high [Stages]float64 // greatest of the window for shrinking
}

// window adds what is needed now.
func (s *State) window(now time.Duration, in *Inputs, least, most [Stages]StageInputs) window {
	n := needed{at: now}
	for k := range n.least {
		n.least[k], n.most[k] = least[k].Need, most[k].Need
		if least[k].AtMost {
			n.least[k] = 0
		}
		if in.Stages[k].Unknown {
			n.most[k] = float64(in.Stages[k].NPUs)
		}
	}
	s.needs = append(s.needs, n)
	keep := max(s.policy.Grow.Window, s.policy.Shrink.Window)
	drop := 0
	for drop < len(s.needs)-2 && now-s.needs[drop+1].at >= keep {
		drop++
	}
	s.needs = slices.Delete(s.needs, 0, drop)
	w := window{seen: now - s.needs[0].at, low: n.least, near: n.most, high: n.most}
	for _, o := range s.needs {
		for k, least := range o.least {
			if now-o.at <= s.policy.Grow.Window {
				w.low[k], w.near[k] = min(w.low[k], least), max(w.near[k], o.most[k])
			}
			if now-o.at <= s.policy.Shrink.Window {
				w.high[k] = max(w.high[k], o.most[k])
			}
		}
	}
	for k := range in.Stages {
		in.Stages[k].Grow, in.Stages[k].Shrink = w.low[k], w.high[k]
	}
	return w
}

// enough is how many requests an attainment has to be of.
const enough = 20

// attained notes the attainment, and reports whether targets are missed.
func (s *State) attained(v *View, in *Inputs) (missed bool) {
	for _, a := range []struct {
		of *Attainment
		to *float64
	}{{&v.TTFT, &in.TTFT}, {&v.TPOT, &in.TPOT}} {
		if !a.of.Known || a.of.Age > s.policy.Stale || a.of.Requests == 0 {
			continue
		}
		*a.to = a.of.Met
		missed = missed || a.of.Requests >= enough && a.of.Met < s.policy.Targets.Percentile/100
	}
	return missed
}

// grow gives NPUs to stages that have too few. While targets are missed it takes less for that: what NPUs can do was overestimated.
func (s *State) grow(d *Decision, o *options, w window, missed bool, arriving amounts) bool {
	band := 1 + s.policy.Band
	if missed {
		band = 1
	}
	u := o.now.utilisation(w.low)
	var short [Stages]bool
	for k := range short {
		short[k] = u[k] > band || o.now.with(Stage(k)) < s.policy.Bounds[k].Min
	}
	o.need = w.near // others may be asked to give: what they needed at most
	var why []string
	for k := range Stages {
		if short[k] {
			// That there is too little is sure; how much more there should be is what is likely now.
			o.need[k] = max(w.low[k], d.Inputs.Stages[k].Need)
			likely := ""
			if o.need[k] > w.low[k]+0.5 {
				likely = fmt.Sprintf(", likely %.1f,", o.need[k])
			}
			has := o.now.with(Stage(k))
			if u[k] > band {
				why = append(why, fmt.Sprintf("%s needs %.1f NPUs%s and has %d", Stage(k), w.low[k], likely, has))
			} else { // what it needs is not why
				why = append(why, fmt.Sprintf("%s is to have at least %d NPUs (stages.%s.min) and has %d", Stage(k), s.policy.Bounds[k].Min, Stage(k), has))
			}
		}
	}
	u = o.now.utilisation(o.need)
	if len(why) == 0 {
		d.Why = "every stage has what it needs"
		return false
	}
	d.Why = strings.Join(why, ", ")
	if s.changed && d.Now-s.last < s.policy.Grow.Cooldown {
		d.Why += fmt.Sprintf("; the last change was %v ago", (d.Now - s.last).Round(time.Millisecond))
		return false
	}
	for k := range Stages {
		if short[k] {
			o.more(Stage(k), o.lacking(Stage(k)))
		}
	}
	// What is as it is costs nothing; a change has to be better, and where it takes from a stage that has too little itself, by so
	// much that noise would not turn it round.
	before, worst := o.score(&o.now, u, 0), slices.Max(u[:])
	for i := range o.listed {
		a := &o.listed[i]
		if a.Refused == "" && a.Change.Action == Move && slices.Max(a.Effect.Utilisation[:]) > max(1, worst/(1+s.policy.Band)) {
			a.Refused = "the stage that gives would be as badly off"
		}
		if a.Refused == "" && a.Change.Action == Move {
			a.Refused = s.keeps(d.Now, &a.after, arriving)
		}
		if a.Refused == "" && a.Score >= before {
			a.Refused = "it would not be worth what it costs"
		}
	}
	best := o.best()
	d.Alternatives = o.alternatives()
	if best == nil {
		d.Why += "; nothing can be done about it"
		return false
	}
	d.Change = best.Change
	d.Why += ": " + best.Change.Sentence()
	return true
}

// lacking is how many NPUs of its own a stage lacks.
func (o *options) lacking(s Stage) int {
	for k := 1; k < widest; k++ {
		f := o.now
		f.change(of(s), k, 0)
		if u := f.utilisation(o.need); u[s] <= 1 && f.with(s) >= o.p.Bounds[s].Min {
			return k
		}
	}
	return widest
}

// shrink makes NPUs spare that no stage has needed for a while.
func (s *State) shrink(d *Decision, o *options, w window, missed bool) bool {
	p, need := &s.policy, w.high
	switch {
	case d.Change.Action != None || len(o.listed) > 0:
		return false
	case missed:
		d.Why += ", but targets are missed"
		return false
	case w.seen < p.Shrink.Window:
		return false
	case s.changed && d.Now-s.last < p.Shrink.Cooldown:
		return false
	}
	o.need = need
	o.fewer(func(f *fleet) bool {
		u := f.utilisation(need)
		return slices.Max(u[:]) <= 1
	})
	best := o.best()
	d.Alternatives = o.alternatives()
	if best == nil {
		return false
	}
	d.Change = best.Change
	d.Why = fmt.Sprintf("encode, prefill and decode needed no more than %.1f, %.1f and %.1f NPUs in %v: %s", need[Encode], need[Prefill], need[Decode], p.Shrink.Window, best.Change.Sentence())
	return true
}

// rebalance places experts anew where that gains more than the band.
func (s *State) rebalance(d *Decision, o *options) bool {
	p := &s.policy
	if d.Change.Action != None || s.changed && d.Now-s.last < p.Grow.Cooldown {
		return false
	}
	for _, i := range o.all {
		if !i.Ready || i.Balance <= 0 || i.Planned < i.Balance*(1+p.Band) {
			continue
		}
		c := Change{Action: Rebalance, Stage: Decode, Instance: i.Name, Node: i.Node, Roles: i.Roles, NPUs: len(i.NPUs)}
		if !i.Has(Decode) {
			c.Stage = Prefill
		}
		r := &options{v: o.v, p: o.p, now: o.now, all: o.all, need: o.need}
		r.add(c, o.now, "")
		if best := r.best(); best != nil {
			d.Change = c
			d.Alternatives = append(r.alternatives(), d.Alternatives...)
			d.Why = fmt.Sprintf("NPUs of %s wait for the busiest in %.0f%% of the time, which can be %.0f%%: %s", i.Name, 100*(1-i.Balance), 100*(1-i.Planned), c.Sentence())
			return true
		}
	}
	return false
}
