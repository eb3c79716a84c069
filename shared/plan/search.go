package plan

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"trireme.dev/shared/conf"
	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/sched/simulate"
)

// Found is a topology with the budgets that serve it best, and its goodput with the seeds of the search.
type Found struct {
	Config
	Place int // -1: it does not attain at any rate
	Bound int // above which it does not, by arithmetic
}

// batch is how many topologies are simulated before the search goes on by what came of them: the same on any number of processors.
const batch = 8

// candidates are topologies and their bounds, those that may do most first; of those alike the ones with fewer kinds of instances.
func (l *Planner) candidates(npus int) (all []Found) {
	for _, t := range l.Topologies(npus) {
		all = append(all, Found{Config: Config{Topology: t}, Bound: l.Bound(t)})
	}
	slices.SortStableFunc(all, func(a, b Found) int {
		return cmp.Or(cmp.Compare(b.Bound, a.Bound), cmp.Compare(len(a.Groups), len(b.Groups)))
	})
	return all
}

// Best are the k topologies of so many NPUs with the greatest goodput, the best first, of those that attain at a place at least (-1: at any). An
// error of Step, or of a simulation, comes with what was found until then.
func (l *Planner) Best(npus, k, least int) (best []Found, err error) {
	all := l.candidates(npus)
	for from := 0; from < len(all); from += batch {
		worth := least // what a topology must be above
		if worth >= 0 {
			worth--
		}
		if len(best) == k {
			worth = best[k-1].Place
		}
		some := all[from:min(from+batch, len(all))]
		for len(some) > 0 && some[len(some)-1].Bound <= worth {
			some = some[:len(some)-1]
		}
		if len(some) == 0 {
			break
		}
		if err := l.p.Step(fmt.Sprintf("%d NPUs, %d of %d topologies", npus, from+len(some), len(all))); err != nil {
			return best, err
		}
		if err := l.measure(some, worth); err != nil {
			return best, err
		}
		for _, f := range some {
			if f.Place > worth {
				best = append(best, f)
			}
		}
		slices.SortStableFunc(best, func(a, b Found) int { return cmp.Compare(b.Place, a.Place) })
		best = best[:min(k, len(best))]
	}
	return best, nil
}

// Fewest are the topologies of the fewest NPUs that attain at a place, up to the space's NPUs, the one with the greatest goodput first; none if
// there is none.
func (l *Planner) Fewest(k, place, most int) ([]Found, error) {
	for npus := 1; npus <= most; npus++ {
		if best, err := l.Best(npus, k, place); err != nil || len(best) > 0 {
			return best, err
		}
	}
	return nil, nil
}

// Random are so many topologies, each as likely, and their goodput: what one gets who does not search (the paper's table 5).
func (l *Planner) Random(npus, n int, seed uint64) ([]Found, error) {
	all := l.candidates(npus)
	r := rand.New(rand.NewPCG(seed, 0x9a))
	r.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	all = all[:min(n, len(all))]
	if err := l.p.Step(fmt.Sprintf("%d topologies by chance", len(all))); err != nil {
		return nil, err
	}
	return all, l.measure(all, -1)
}

// Measure finds the goodput of certain topologies, whether they are in the space or not.
func (l *Planner) Measure(all []conf.Topology) (found []Found, err error) {
	for _, t := range all {
		if err := l.Fits(t); err != nil {
			return nil, err
		}
		found = append(found, Found{Config: Config{Topology: t}, Bound: places - 1})
	}
	return found, l.measure(found, -1)
}

// usual is how many places goodput is below the bound, about.
const usual = 20

// measure finds the goodput of topologies, all at once, where it is above a place.
func (l *Planner) measure(some []Found, above int) error {
	errs, runs := make([]error, len(some)), make([]int, len(some))
	l.p.Each(len(some), func(i int) {
		f := &some[i]
		f.Place = -1
		worth := above
		for _, c := range l.p.Space.configs(f.Topology) {
			attains := func(place int) (bool, error) {
				o, err := l.p.play(c, Rate(place), l.loads, true)
				runs[i] += o.runs
				return o.attained, err
			}
			place, err := -1, error(nil)
			if worth < 0 && f.Bound >= 0 {
				place, err = around(f.Bound-usual, attains)
			} else if f.Bound > worth { // one step first: most do not come so far
				var ok bool
				if ok, err = attains(worth + 1); ok {
					place, err = Highest(worth+2, f.Bound, attains)
				}
			}
			if errs[i] = err; err != nil {
				return
			}
			if f.Rows == 0 { // those that it has if none attain
				f.Config = c
			}
			if place > worth {
				f.Config, f.Place, worth = c, place, place
			}
		}
	})
	for i := range some {
		if errs[i] != nil {
			return fmt.Errorf("simulating %s: %w", some[i].Topology, errs[i])
		}
		l.Tried++
		l.Runs += runs[i]
	}
	return nil
}

// outcome is what came of a configuration with some loads.
type outcome struct {
	attained bool
	runs     int
	results  []*simulate.Result // with each load, if it was not a verdict only
	requests int
	missed   int
}

// play simulates loads one after the other, at a rate; if only the verdict is wanted it ends as soon as that is known.
func (p *Problem) play(c Config, rate float64, loads [][]simulate.Request, verdict bool) (o outcome, err error) {
	n := p.requests(rate)
	allowed := p.misses(n * len(loads))
	at := make([]simulate.Request, n)
	for _, load := range loads {
		copy(at, load)
		for i := range at {
			at[i].Arrive = time.Duration(float64(at[i].Arrive) / rate)
		}
		enough := 0
		if verdict {
			enough = allowed - o.missed + 1
		}
		r, err := p.run(c, at, enough)
		if err != nil {
			return o, err
		}
		o.runs++
		o.requests += n
		if o.missed += r.Missed; verdict && o.missed > allowed {
			return o, nil
		}
		if !verdict {
			o.results = append(o.results, r)
		}
	}
	o.attained = o.missed <= allowed
	return o, nil
}

// run simulates a load, to its end or until enough requests have missed their targets.
func (p *Problem) run(c Config, load []simulate.Request, enough int) (*simulate.Result, error) {
	cfg := p.Fleet
	cfg.Costs, cfg.Targets, cfg.Misses, cfg.Rows, cfg.StepTokens = p.Costs, p.Targets, enough, c.Rows, c.Steps
	cfg.Instances = Instances(c.Topology, func(roles string, npus int) int {
		tokens, _ := p.Room(roles, npus)
		return tokens
	})
	f, err := simulate.New(cfg)
	if err != nil {
		return nil, err
	}
	return f.Run(load, 0)
}

// Replay simulates certain requests on a configuration.
func (l *Planner) Replay(c Config, load []simulate.Request) (*simulate.Result, error) {
	return l.p.run(c, load, 0)
}

// slower are costs of which those of some stages are multiplied.
type slower struct {
	simulate.Costs
	by [autoscale.Stages]float64
}

// Encode implements simulate.Costs.
func (s slower) Encode(tokens int) time.Duration {
	return time.Duration(float64(s.Costs.Encode(tokens)) * s.by[autoscale.Encode])
}

// Step implements simulate.Costs: what a step takes longer for its prompts is theirs.
func (s slower) Step(w simulate.Work) time.Duration {
	all := s.Costs.Step(w)
	decoding := time.Duration(0)
	if w.Decoding > 0 {
		decoding = s.Costs.Step(simulate.Work{Decoding: w.Decoding, Context: w.Context})
	}
	return time.Duration(float64(all-decoding)*s.by[autoscale.Prefill] + float64(decoding)*s.by[autoscale.Decode])
}
