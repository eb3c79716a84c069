// Package compare draws conclusions from runs of the same loads on several topologies of equal NPU count: up to which rate each
// keeps its bounds, how far repeats of the same run differ, and when it pays that pictures are encoded on NPUs of their own. It is
// arithmetic on what was measured; `trireme bench compare` measures.
package compare

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"

	"trireme.dev/services/trireme/load"
	"trireme.dev/shared/conf"
)

// Workload is what requests are like.
type Workload struct {
	Pictures  string  `json:"pictures"`   // of a request, N or N-M
	Encode    float64 `json:"encode_ms"`  // that a request's pictures take an NPU, by the profile, on average
	Prefill   float64 `json:"prefill_ms"` // that its prompt takes
	TTFTBound float64 `json:"ttft_bound_ms"`
	TPOTBound float64 `json:"tpot_bound_ms"`
}

// Ratio is how many times as long as its prompt a request's pictures take.
func (w *Workload) Ratio() float64 { return w.Encode / w.Prefill }

// Run is one rate of one workload on one topology, once.
type Run struct {
	Topology   string  `json:"topology"`
	Workload   int     `json:"workload"` // index in Study.Workloads
	Rate       float64 `json:"rate"`     // requests a second
	Repeat     int     `json:"repeat"`   // from 0
	Requests   int     `json:"requests"`
	Failed     int     `json:"failed"`
	Attainment float64 `json:"attainment"` // share of requests within both bounds, 0 to 1
	TTFT       float64 `json:"median_ttft_ms"`
	TTFT99     float64 `json:"p99_ttft_ms"`
	TPOT       float64 `json:"mean_tpot_ms"`
}

// Study is all that was measured. A run that is missing was left out because the one at the rate before it was hopeless.
type Study struct {
	Topologies []string   `json:"topologies"`
	Workloads  []Workload `json:"workloads"`
	Repeats    int        `json:"repeats"`
	Runs       []Run      `json:"runs"`
}

// Hopeless is the attainment below which higher rates need not be tried.
const Hopeless = 0.5

// Separate reports whether a topology encodes pictures on NPUs that do nothing else.
func Separate(topology string) bool {
	t, err := conf.ParseTopology(topology)
	if err != nil {
		return false
	}
	for _, g := range t.Groups {
		if strings.Contains(g.Roles, "E") && g.Roles != "E" {
			return false
		}
	}
	return t.Instances('E') > 0
}

// Capacity is the highest rate up to which a topology keeps the bounds of load.Goal of a workload's requests, in each repeat.
type Capacity struct {
	Topology string    `json:"topology"`
	Each     []float64 `json:"requests_per_s"` // by repeat
	AtLeast  bool      `json:"at_least"`       // the highest rate tried is kept in all repeats: it may be more
}

// Low is the worst repeat.
func (c *Capacity) Low() float64 { return slices.Min(c.Each) }

// High is the best repeat.
func (c *Capacity) High() float64 { return slices.Max(c.Each) }

// Mean is the mean of the repeats.
func (c *Capacity) Mean() float64 {
	sum := 0.0
	for _, x := range c.Each {
		sum += x
	}
	return sum / float64(len(c.Each))
}

// Rates are the rates that a workload was run at, rising.
func (s *Study) Rates(workload int) []float64 {
	var rates []float64
	for _, r := range s.Runs {
		if r.Workload == workload && !slices.Contains(rates, r.Rate) {
			rates = append(rates, r.Rate)
		}
	}
	slices.Sort(rates)
	return rates
}

// Capacities are those of all topologies in a workload, the best first.
func (s *Study) Capacities(workload int) []Capacity {
	top := 0.0
	if rates := s.Rates(workload); len(rates) > 0 {
		top = rates[len(rates)-1]
	}
	var all []Capacity
	for _, t := range s.Topologies {
		c := Capacity{Topology: t, AtLeast: true}
		for repeat := range s.Repeats {
			curve := load.Curve{}
			for _, r := range s.Runs {
				if r.Topology == t && r.Workload == workload && r.Repeat == repeat {
					curve.Points = append(curve.Points, load.Point{Rate: r.Rate, Attainment: r.Attainment})
				}
			}
			slices.SortFunc(curve.Points, func(a, b load.Point) int { return cmp.Compare(a.Rate, b.Rate) })
			x := curve.Capacity(load.Goal)
			c.Each = append(c.Each, x)
			c.AtLeast = c.AtLeast && x == top
		}
		all = append(all, c)
	}
	slices.SortStableFunc(all, func(a, b Capacity) int { return cmp.Compare(b.Mean(), a.Mean()) })
	return all
}

// Verdict is whether encoding on NPUs of its own pays in a workload.
type Verdict string

// Verdicts. Pays and Costs say that even the worst repeat of the one kind of topology is better than the best of the other.
const (
	Pays  Verdict = "pays"
	Costs Verdict = "costs"
	Same  Verdict = "no difference beyond the spread of repeats"
	Mute  Verdict = "not compared" // there is only one kind
)

// Finding is what a workload has shown.
type Finding struct {
	Workload Workload  `json:"workload"`
	Ratio    float64   `json:"encode_to_prefill"`
	Verdict  Verdict   `json:"separate_encode"`
	Separate *Capacity `json:"best_separate,omitempty"` // of the topologies that encode on NPUs of their own
	Joint    *Capacity `json:"best_joint,omitempty"`    // of the others
	AnyUpTo  float64   `json:"any_up_to"`               // requests a second that every topology keeps: below, the choice does not matter
}

// Findings are those of all workloads, the ratio of encode to prefill rising.
func (s *Study) Findings() []Finding {
	var all []Finding
	for i, w := range s.Workloads {
		f := Finding{Workload: w, Ratio: w.Ratio(), AnyUpTo: math.Inf(1)}
		for _, c := range s.Capacities(i) {
			best := &f.Joint
			if Separate(c.Topology) {
				best = &f.Separate
			}
			if *best == nil {
				*best = &c
			}
			f.AnyUpTo = min(f.AnyUpTo, c.Low())
		}
		switch {
		case f.Separate == nil || f.Joint == nil:
			f.Verdict = Mute
		case f.Separate.Low() > f.Joint.High():
			f.Verdict = Pays
		case f.Joint.Low() > f.Separate.High():
			f.Verdict = Costs
		default:
			f.Verdict = Same
		}
		all = append(all, f)
	}
	slices.SortStableFunc(all, func(a, b Finding) int { return cmp.Compare(a.Ratio, b.Ratio) })
	return all
}

// Count is a number, or a range, of pictures in words.
func Count(pictures string) string {
	if pictures == "1" {
		return "1 picture"
	}
	return pictures + " pictures"
}

// Rule says in a sentence when separate encoding pays, as far as these findings tell; findings are as Findings gives them.
func Rule(findings []Finding) string {
	first, last := -1, -1 // of those in which it pays
	costs, clean := 0, true
	for i, f := range findings {
		switch f.Verdict {
		case Pays:
			if first < 0 {
				first = i
			} else if last != i-1 {
				clean = false
			}
			last = i
		case Costs:
			costs++
		case Mute:
			return "Nothing can be said: topologies that encode on NPUs of their own, as 5E2P1D, and others, as 8EPD, are both needed."
		}
	}
	what := func(f Finding) string {
		return fmt.Sprintf("%s a request (encoding takes %.3g times as long as the prompt)", Count(f.Workload.Pictures), f.Ratio)
	}
	switch {
	case first < 0 && costs == 0:
		return "Not here: in no workload does encoding on NPUs of its own change the rate that is kept by more than repeats differ."
	case first < 0:
		return fmt.Sprintf("Not here: encoding on NPUs of its own pays in none of the workloads, and costs in %d of %d.", costs, len(findings))
	case !clean || last < len(findings)-1:
		var where []string
		for _, f := range findings {
			if f.Verdict == Pays {
				where = append(where, what(f))
			}
		}
		return "No one bound: encoding on NPUs of its own pays with " + strings.Join(where, "; with ") + "; not in the other workloads."
	}
	f := findings[first]
	rule := "Encoding on NPUs of its own pays from " + what(f) + " on"
	if first == 0 {
		rule = "Encoding on NPUs of its own pays in all workloads, the least of which has " + what(f)
	} else {
		rule += ", not at " + what(findings[first-1])
	}
	if f.AnyUpTo > 0 {
		rule += fmt.Sprintf("; and only above %.3g requests a second there: below, every topology keeps the bounds", f.AnyUpTo)
	}
	return rule + "."
}
