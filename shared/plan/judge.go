package plan

import (
	"cmp"
	"fmt"
	"slices"

	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/sched/simulate"
)

// Row is what is known of a topology.
type Row struct {
	Found
	Each   []float64 // goodput, requests a second, with each of the judges' seeds
	Alike  bool      // the one with the greatest mean is not better with every seed
	Pooled int       // place at which it attains with all of these seeds together; -1: at none, and no more is known
	Detail Detail    // there
	// Limit is the stage whose work, done in four fifths of the time, would bring most requests within their targets beyond that place; None:
	// no stage alone brings many.
	Limit autoscale.Stage
	// LateTTFT and LateTPOT are the parts of the requests that miss either target there.
	LateTTFT, LateTPOT float64
}

// None is no stage.
const None = autoscale.Stage(autoscale.Stages)

// Mean is the mean of the seeds.
func (r *Row) Mean() float64 {
	sum := 0.0
	for _, x := range r.Each {
		sum += x
	}
	return sum / float64(len(r.Each))
}

// Low is the worst seed.
func (r *Row) Low() float64 { return slices.Min(r.Each) }

// High is the best seed.
func (r *Row) High() float64 { return slices.Max(r.Each) }

// Better reports whether it is better than another one with each seed: both meet the same requests then. Less is no difference, as another seed
// may say the opposite.
func (r *Row) Better(than *Row) bool {
	for i, x := range r.Each {
		if x <= than.Each[i] {
			return false
		}
	}
	return true
}

// Detail is what happens at a rate, with the judges' seeds together.
type Detail struct {
	Rate       float64    // requests a second
	Attainment float64    // part of the requests within both targets
	TTFT, TPOT [3]float64 // seconds: the medians, 90th and 99th percentiles
	Busy       []Busy     // by kind of instance
}

// Busy is how much of the time the NPUs of a kind of instance compute.
type Busy struct {
	Roles string
	NPUs  int
	Part  float64
}

// Judge looks closely at topologies, with the judges' seeds: those with the greatest mean goodput come first, and of those from which the very
// first does not differ the ones with the fewest kinds of instances. Those that are known already when Step or a simulation ends it come with the
// error.
func (l *Planner) Judge(found []Found) (rows []Row, err error) {
	for from := 0; from < len(found); from += batch {
		some := found[from:min(from+batch, len(found))]
		if err = l.p.Step(fmt.Sprintf("the %d best, with other seeds", len(found))); err != nil {
			break
		}
		all, errs, runs := make([]Row, len(some)), make([]error, len(some)), make([]int, len(some))
		l.p.Each(len(some), func(i int) { all[i], runs[i], errs[i] = l.p.judge(some[i], l.judges) })
		for i := range all {
			l.Runs += runs[i]
			if errs[i] != nil {
				return rows, fmt.Errorf("simulating %s: %w", some[i].Topology, errs[i])
			}
		}
		rows = append(rows, all...)
	}
	slices.SortStableFunc(rows, func(a, b Row) int { return cmp.Compare(b.Mean(), a.Mean()) })
	for i := range rows {
		rows[i].Alike = !rows[0].Better(&rows[i])
	}
	slices.SortStableFunc(rows, func(a, b Row) int {
		switch {
		case a.Alike && b.Alike:
			return cmp.Compare(len(a.Groups), len(b.Groups))
		case a.Alike:
			return -1
		case b.Alike:
			return 1
		}
		return 0
	})
	return rows, err
}

// Unjudged are rows of topologies of which no more is known than their goodput with the seeds of the search.
func Unjudged(found []Found) (rows []Row) {
	for _, f := range found {
		rows = append(rows, Row{Found: f, Pooled: f.Place, Each: []float64{Rate(f.Place)}, Limit: None})
	}
	return rows
}

// further is how many places above its goodput a topology is asked what limits it: 10% more requests.
const further = 5

func (p *Problem) judge(f Found, judges [][]simulate.Request) (r Row, runs int, err error) {
	r, runs, err = p.judgeOne(f, judges)
	first := Config{f.Topology, p.Space.Rows[0], p.Space.Steps[0]}
	if err != nil || f.Rows == first.Rows && f.Steps == first.Steps {
		return r, runs, err
	}
	// Other budgets have to be worth it.
	f.Config = first
	usual, more, err := p.judgeOne(f, judges)
	if err == nil && !r.Better(&usual) {
		r = usual
	}
	return r, runs + more, err
}

func (p *Problem) judgeOne(f Found, judges [][]simulate.Request) (r Row, runs int, err error) {
	r = Row{Found: f, Limit: None}
	if f.Place < 0 {
		r.Pooled, r.Each = -1, make([]float64, len(judges))
		return r, 0, nil
	}
	goodput := func(loads [][]simulate.Request) (int, error) {
		return around(f.Place, func(place int) (bool, error) {
			o, err := p.play(f.Config, Rate(place), loads, true)
			runs += o.runs
			return o.attained, err
		})
	}
	for k := range judges {
		place, err := goodput(judges[k : k+1])
		if err != nil {
			return r, runs, err
		}
		r.Each = append(r.Each, Rate(place))
	}
	if r.Pooled, err = goodput(judges); err != nil {
		return r, runs, err
	}
	if r.Pooled < 0 {
		return r, runs, nil
	}
	if r.Detail, err = p.look(f.Config, Rate(r.Pooled), judges); err != nil {
		return r, runs, err
	}
	beyond := func(by [autoscale.Stages]float64) (outcome, error) {
		q := *p
		q.Costs = slower{p.Costs, by}
		o, err := q.play(f.Config, Rate(r.Pooled+further), judges, false)
		runs += o.runs
		return o, err
	}
	now, err := beyond([...]float64{1, 1, 1})
	if err != nil {
		return r, runs, err
	}
	for _, d := range now.results {
		for i := range d.Outcomes {
			if o := &d.Outcomes[i]; o.TTFT > p.Targets.TTFT {
				r.LateTTFT += 1 / float64(now.requests)
			} else if o.TPOT > p.Targets.TPOT {
				r.LateTPOT += 1 / float64(now.requests)
			}
		}
	}
	most := now.missed - now.requests/100 // less is chance
	for s := range autoscale.Stages {
		by := [...]float64{1, 1, 1}
		by[s] = 0.8
		o, err := beyond(by)
		if err != nil {
			return r, runs, err
		}
		if o.missed < most {
			r.Limit, most = autoscale.Stage(s), o.missed
		}
	}
	return r, runs + 1, nil
}

// around is Highest for a place that is near another one: steps of growing width from there, then halves.
func around(near int, attains func(place int) (bool, error)) (int, error) {
	near = min(max(0, near), places-1)
	ok, err := attains(near)
	up := ok
	for step := 2; err == nil; step *= 2 {
		next := min(near+step, places-1)
		if !up {
			next = near - step
		}
		if next == near || next < 0 {
			break
		}
		if ok, err = attains(next); err == nil && ok != up {
			return Highest(min(near, next)+1, max(near, next)-1, attains)
		}
		near = next
	}
	if up || err != nil {
		return near, err
	}
	return Highest(0, near-1, attains)
}

// look plays loads on a configuration at a rate, to the end.
func (p *Problem) look(c Config, rate float64, loads [][]simulate.Request) (d Detail, err error) {
	o, err := p.play(c, rate, loads, false)
	if err != nil {
		return d, err
	}
	d = Detail{Rate: rate, Attainment: 1 - float64(o.missed)/float64(o.requests)}
	var ttft, tpot []float64
	for _, g := range c.Groups {
		b := Busy{Roles: g.Roles, NPUs: g.Count * g.NPUs}
		for _, r := range o.results {
			for _, u := range r.Used {
				if u.Roles == g.Roles {
					b.Part += u.Busy.Seconds() / (float64(b.NPUs) * r.Length.Seconds() * float64(len(o.results)))
				}
			}
		}
		d.Busy = append(d.Busy, b)
	}
	for _, r := range o.results {
		for i := range r.Outcomes {
			x := &r.Outcomes[i]
			ttft = append(ttft, x.TTFT.Seconds())
			if x.Output > 1 {
				tpot = append(tpot, x.TPOT.Seconds())
			}
		}
	}
	d.TTFT, d.TPOT = percentiles(ttft), percentiles(tpot)
	return d, nil
}

// Attainment is the part of requests within both targets at a rate, with the judges' seeds.
func (l *Planner) Attainment(c Config, rate float64) (float64, error) {
	d, err := l.p.look(c, rate, l.judges)
	return d.Attainment, err
}

func percentiles(all []float64) (at [3]float64) {
	if len(all) == 0 {
		return at
	}
	slices.Sort(all)
	for i, p := range []int{50, 90, 99} {
		at[i] = all[min(len(all)-1, len(all)*p/100)]
	}
	return at
}
