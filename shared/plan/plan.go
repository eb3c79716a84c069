// Package plan finds the topology that serves a load best: EPD's module that finds the best configuration (arXiv:2501.05460, section 3.2.3
// and appendix D). It searches a Space of topologies by simulation (shared/sched/simulate, over the services' own scheduling code) and has
// no clock, no I/O and no goroutine: the same Problem gives the same answer, on any number of processors.
//
// Goodput, as in the papers, is the greatest rate at which a part of all requests, usually 90%, meets its targets. Here it is a place on a
// grid of rates, each 2% above the one before (Rate), so that equal means equal. All topologies and rates meet the same requests, which only
// come faster or slower.
//
// The search is exhaustive in effect and not in cost. Arithmetic bounds each topology's goodput from above (bound.go), and those that can do
// most are tried first. Who comes later is simulated once, a step above the last of those that are best so far, and that run ends as soon as
// too many requests have missed their targets; only who attains there is looked at more closely. The search ends at the first bound that is
// not above. As far as more load never helps, that is what halving the range of rates for every topology finds.
package plan

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"trireme.dev/shared/sched"
	"trireme.dev/shared/sched/simulate"
)

// ErrPlan is wrapped by errors of New for what cannot be planned.
var ErrPlan = errors.New("this cannot be planned")

// Problem is what is to be served, by what, and how well.
type Problem struct {
	// Costs are what work takes an NPU. Bounds hold for costs as profiles have them: a step has a fixed part, and parts that are proportional
	// to what is in it; those of decoding may be others for large batches.
	Costs simulate.Costs
	// Room is the tokens of KV for which an NPU of an instance with so many has memory beside its weights, 0: for any number; and whether
	// the weights fit at all. nil: everything fits.
	Room    func(roles string, npus int) (tokens int, fits bool)
	Targets sched.Targets // both above 0
	Part    float64       // of requests that have to meet them, above 0 and below 1
	// Load is the first n requests of a seed as they come at one a second on average, rising in Arrive.
	Load   func(seed uint64, n int) []simulate.Request
	Seeds  []uint64 // by which topologies are found
	Judges []uint64 // by which those that were found are judged: others, as the best of many is lucky, too

	Length time.Duration   // of each simulation, but not
	Least  int             // less than so many requests and
	Most   int             // not more
	Fleet  simulate.Config // what else is to be said of fleets: Costs, Instances, Targets, Misses, Rows and StepTokens are set here
	Space  Space

	// Each calls do with 0 to n-1, in any order or at once, and returns when all have returned. nil: one after the other.
	Each func(n int, do func(i int))
	// Step is told before each batch of work; its error ends the search. nil: nobody is.
	Step func(what string) error
}

// Rates of the grid.
const (
	slowest = 0.001 // requests a second
	factor  = 1.02  // from one place to the next
	places  = 812   // up to some 9,000 a second
)

// Rate is the requests a second at a place of the grid; below 0 it is 0.
func Rate(place int) float64 {
	if place < 0 {
		return 0
	}
	return slowest * math.Pow(factor, float64(place))
}

// Place is the first place of the grid whose rate is not below.
func Place(rate float64) int {
	return max(0, int(math.Ceil(math.Log(rate/slowest)/math.Log(factor)-1e-9)))
}

// Highest is the greatest place from low to high that attains, if those that do come before those that do not, by halving the range; low-1 if
// none does.
func Highest(low, high int, attains func(place int) (bool, error)) (int, error) {
	for low--; low < high; {
		middle := low + (high-low+1)/2
		ok, err := attains(middle)
		if err != nil {
			return low, err
		}
		if ok {
			low = middle
		} else {
			high = middle - 1
		}
	}
	return low, nil
}

// Planner plans. It is for one goroutine.
type Planner struct {
	p        Problem
	loads    [][]simulate.Request // by seed, at one a second
	judges   [][]simulate.Request
	pictures bool        // there are any
	limit    [sets][]int // see bound.go

	Unfit int // kinds of instances that memory has no room for, of those that Space names
	Tried int // topologies that were simulated
	Runs  int // simulations
}

// New checks a problem and works out its bounds.
func New(p Problem) (*Planner, error) {
	bad := func(format string, args ...any) (*Planner, error) {
		return nil, fmt.Errorf("%w: %s", ErrPlan, fmt.Sprintf(format, args...))
	}
	switch {
	case p.Costs == nil || p.Load == nil:
		return bad("costs and a load have to be given")
	case p.Targets.TTFT <= 0 || p.Targets.TPOT <= 0:
		return bad("targets for the first token and for those after it have to be above 0: %v and %v", p.Targets.TTFT, p.Targets.TPOT)
	case !(p.Part > 0 && p.Part < 1):
		return bad("a part of %g of the requests that meet their targets: it has to be above 0 and below 1", p.Part)
	case len(p.Seeds) == 0 || len(p.Judges) == 0 || p.Length <= 0 || p.Least < 1 || p.Most < p.Least:
		return bad("%d and %d seeds, %v of load, %d to %d requests", len(p.Seeds), len(p.Judges), p.Length, p.Least, p.Most)
	}
	if p.Room == nil {
		p.Room = func(string, int) (int, bool) { return 0, true }
	}
	if p.Each == nil {
		p.Each = func(n int, do func(int)) {
			for i := range n {
				do(i)
			}
		}
	}
	if p.Step == nil {
		p.Step = func(string) error { return nil }
	}
	if err := p.Space.complete(); err != nil {
		return nil, err
	}
	l := &Planner{p: p}
	for _, seed := range p.Seeds {
		l.loads = append(l.loads, p.Load(seed, p.Most))
	}
	for _, seed := range p.Judges {
		l.judges = append(l.judges, p.Load(seed, p.Most))
	}
	for _, load := range append(slices.Clone(l.loads), l.judges...) {
		if len(load) != p.Most {
			return bad("%d requests, want %d", len(load), p.Most)
		}
		l.pictures = l.pictures || slices.ContainsFunc(load, func(r simulate.Request) bool { return r.Pictures > 0 })
	}
	l.shape()
	l.bound()
	return l, nil
}

// requests is how many there are at a rate.
func (p *Problem) requests(rate float64) int {
	return min(p.Most, max(p.Least, int(math.Ceil(rate*p.Length.Seconds()))))
}

// misses is how many of so many requests may miss their targets.
func (p *Problem) misses(requests int) int { return int((1-p.Part)*float64(requests) + 1e-9) }
