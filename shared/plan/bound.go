package plan

import (
	"cmp"
	"math"
	"slices"
	"strings"
	"time"

	"trireme.dev/shared/conf"
	"trireme.dev/shared/sched"
	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/sched/simulate"
)

// A set of stages is a bit for each.
const sets = 1 << autoscale.Stages

const (
	encode  = 1 << autoscale.Encode
	prefill = 1 << autoscale.Prefill
	decode  = 1 << autoscale.Decode
)

// work is the least NPU time, in seconds, that requests take of a set of stages.
type work struct {
	set  int
	each func(*simulate.Request) float64
}

// works bound what requests that meet their targets take of each set of stages from below, on any NPUs and in any company; of some sets there
// are two bounds, and both hold.
//
// A picture is computed alone. A prompt takes what its tokens and pairs add to a step, and its part of the fixed time of full steps. A token
// that is decoded takes what its context adds, and its part of a step with the batch for which that is least, among those whose steps keep the
// TPOT target on average (the lower convex hull: batches may differ from step to step) and for whose sequences there is memory. Where a stage
// of both is on one NPU a step's fixed time may serve both, so the set of both has it for one of them only.
func works(c simulate.Costs, rows, kv, pieces int, t sched.Targets, loads [][]simulate.Request) []work {
	step := func(w simulate.Work) float64 { return c.Step(w).Seconds() }
	shortest, leastKV := math.MaxInt, math.MaxInt
	for _, load := range loads {
		for i := range load {
			r := &load[i]
			shortest, leastKV = min(shortest, r.Prompt+1), min(leastKV, r.Prompt+r.Output)
		}
	}
	batches := simulate.Sequences
	if kv > 0 {
		batches = min(batches, kv/leastKV)
	}
	const many = 1 << 20
	one := step(simulate.Work{Prompt: 1})
	fixed := max(0, 2*one-step(simulate.Work{Prompt: 2})) / float64(rows) // for each prompt token
	context, beside := math.Inf(1), math.Inf(1)
	for b := 1; b <= batches; b++ {
		context = min(context, (step(simulate.Work{Decoding: b, Context: many})-step(simulate.Work{Decoding: b}))/many)
		beside = min(beside, (step(simulate.Work{Prompt: 1, Decoding: b})-one)/float64(b))
	}
	type point struct{ took, each float64 } // of a batch: a step, and a token's part of it
	points := make([]point, batches)
	for b := 1; b <= batches; b++ {
		took := step(simulate.Work{Decoding: b})
		points[b-1] = point{took + context*float64(b*shortest), took / float64(b)}
	}
	token := math.Inf(1) // with no batch that keeps the target nothing is possible
	for _, x := range points {
		switch limit := t.TPOT.Seconds(); {
		case x.took <= limit:
			token = min(token, x.each)
			for _, y := range points {
				if y.took > limit {
					token = min(token, x.each+(y.each-x.each)*(limit-x.took)/(y.took-x.took))
				}
			}
		}
	}
	pictures := func(r *simulate.Request) float64 {
		return float64(r.Pictures) * (c.Encode(r.Visual) / time.Duration(pieces) * time.Duration(pieces)).Seconds()
	}
	prompt := func(r *simulate.Request) float64 { // without fixed times
		return step(simulate.Work{Prompt: r.Prompt + 1, Visual: r.Pictures * r.Visual, Pairs: r.Prompt * (r.Prompt + 1) / 2}) - one
	}
	decoded := func(r *simulate.Request) float64 { return float64(r.Output - 1) }
	attended := func(r *simulate.Request) float64 {
		return context * decoded(r) * (float64(r.Prompt) + float64(r.Output)/2)
	}
	both := func(a, b func(*simulate.Request) float64) func(*simulate.Request) float64 {
		return func(r *simulate.Request) float64 { return a(r) + b(r) }
	}
	first := both(prompt, func(r *simulate.Request) float64 { return fixed * float64(r.Prompt) })
	others := both(attended, func(r *simulate.Request) float64 { // 0 tokens take 0, also where none is possible
		if r.Output == 1 {
			return 0
		}
		return token * decoded(r)
	})
	joined := []func(*simulate.Request) float64{
		both(first, both(attended, func(r *simulate.Request) float64 { return max(0, beside) * decoded(r) })), both(prompt, others),
	}
	all := []work{{encode, pictures}, {prefill, first}, {decode, others}, {encode | prefill, both(pictures, first)}, {encode | decode, both(pictures, others)}}
	for _, j := range joined {
		all = append(all, work{prefill | decode, j}, work{encode | prefill | decode, both(pictures, j)})
	}
	return all
}

// bound works out limit: by set of stages and NPUs that have one of them, the greatest place at which these can do the least work of the requests
// that have to meet their targets, those that take least, until the last of them is due. No topology attains at a greater one.
func (l *Planner) bound() {
	p := &l.p
	kv := 0
	for _, kinds := range p.Space.kinds {
		for _, k := range kinds {
			if strings.Contains(k.roles, "D") {
				if kv = max(kv, k.kv); k.kv == 0 {
					kv = math.MaxInt
				}
			}
		}
	}
	pieces := p.Fleet.Pieces
	if pieces == 0 {
		pieces = 7
	}
	var need [sets][places]float64
	type one struct {
		index int
		took  float64
	}
	for _, w := range works(p.Costs, slices.Max(p.Space.Rows), kv, pieces, p.Targets, l.loads) {
		var all []one
		for _, load := range l.loads {
			for i := range load {
				all = append(all, one{i, w.each(&load[i])})
			}
		}
		slices.SortFunc(all, func(a, b one) int { return cmp.Compare(a.took, b.took) })
		for place := range need[w.set] {
			rate := Rate(place)
			n := p.requests(rate)
			left := n*len(l.loads) - p.misses(n*len(l.loads))
			sum := 0.0
			for _, x := range all {
				if x.index < n {
					if sum += x.took; left == 1 {
						break
					}
					left--
				}
			}
			need[w.set][place] = max(need[w.set][place], sum*(1-1e-6)/l.window(w.set, n, rate)) // 1e-6: times are whole nanoseconds
		}
	}
	for set := range l.limit {
		for npus := 0; ; npus++ {
			place := places - 1
			for place >= 0 && need[set][place] > float64(npus) {
				place--
			}
			l.limit[set] = append(l.limit[set], place)
			if place == places-1 || npus == MostNPUs {
				break
			}
		}
	}
}

// MostNPUs is the most NPUs of a topology.
const MostNPUs = 1024

// window is the seconds, of all seeds together, from the first of n requests until the last is due in a set of stages.
func (l *Planner) window(set, n int, rate float64) (seconds float64) {
	for _, load := range l.loads {
		longest := 0
		for i := range load[:n] {
			longest = max(longest, load[i].Output)
		}
		seconds += load[n-1].Arrive.Seconds()/rate + l.p.Targets.TTFT.Seconds()
		if set&decode != 0 {
			seconds += float64(longest-1) * l.p.Targets.TPOT.Seconds()
		}
	}
	return seconds
}

// Bound is a place above which a topology does not attain.
func (l *Planner) Bound(t conf.Topology) int {
	least := places - 1
	for set := 1; set < sets; set++ {
		if limits := l.limit[set]; len(limits) > 0 {
			least = min(least, limits[min(Having(t, set), len(limits)-1)])
		}
	}
	return least
}

// Having is the NPUs of a topology that have one of a set of stages.
func Having(t conf.Topology, set int) (npus int) {
	for _, g := range t.Groups {
		for s := range autoscale.Stages {
			if set>>s&1 != 0 && strings.Contains(g.Roles, autoscale.Stage(s).Letter()) {
				npus += g.Count * g.NPUs
				break
			}
		}
	}
	return npus
}

// Needs is the least NPUs that each set of stages needs, so that all of a load is done as fast as it comes at a rate; as works have it.
func Needs(c simulate.Costs, t sched.Targets, load []simulate.Request, rate float64) (npus [sets]float64) {
	for _, w := range works(c, simulate.Rows, 0, 1, t, [][]simulate.Request{load}) {
		sum := 0.0
		for i := range load {
			sum += w.each(&load[i])
		}
		npus[w.set] = max(npus[w.set], rate*sum/float64(len(load)))
	}
	return npus
}
