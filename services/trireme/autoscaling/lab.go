package autoscaling

import (
	"fmt"
	"slices"
	"time"

	"trireme.dev/shared/conf"
	"trireme.dev/shared/npu/pace"
	"trireme.dev/shared/plan"
	"trireme.dev/shared/sched"
	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/sched/simulate"
)

// Lab is what all runs have in common.
type Lab struct {
	Profile *pace.Profile
	Seeds   []uint64 // at least one: each run is the mean of runs with these
	Policy  autoscale.Policy
	Step    func(what string) error // told of each run, if not nil; its error ends all
}

// Host is what a host does beside its NPUs, and a gateway with default settings. RATIONALE.md says where these figures are from.
func Host() simulate.Config {
	return simulate.Config{Order: sched.SLO, Front: 3 * time.Millisecond, Look: 8 * time.Millisecond, Hop: 2 * time.Millisecond}
}

// config is a fleet as the real ones are.
func (l *Lab) config(s *Scenario, topology string, seed uint64, c simulate.Controller) simulate.Config {
	t := fleet(topology)
	cfg := Host()
	cfg.Seed, cfg.Costs, cfg.Targets, cfg.Control = seed, Costs{l.Profile}, s.Targets, c
	cfg.KV, _ = l.Profile.Memory.Room("D", 1)
	cfg.Jitter, cfg.Drag, cfg.Lag, cfg.Lost = 0.2, 1.05, [2]time.Duration{50 * time.Millisecond, 900 * time.Millisecond}, 0.002
	cfg.Spare = map[string]int{plan.Node: t.Spare}
	cfg.Instances = plan.Instances(t, nil)
	return cfg
}

// Way is how a fleet is run.
type Way struct {
	Name     string
	Topology string                     // at the beginning
	Control  func() simulate.Controller // nil: nothing changes
}

// Rivals are the rules of others. They change the fleet by the same means and at the same cost; Kubernetes' replicas have one NPU each.
// Where NPUs can be added, EPD's trigger, which only switches roles, begins with as many as the best static topology of three separate
// stages has.
func (l *Lab) Rivals(s *Scenario, separate string) []Way {
	return []Way{
		{"epd-trigger", separate, func() simulate.Controller { return simulate.Switching{} }},
		{"elasticmoe-rule", s.Start, func() simulate.Controller { return new(simulate.Attaining) }},
		{"hpa-queue", singles(s.Start), func() simulate.Controller { return new(simulate.Replicas) }},
	}
}

// Scaler is the project's own way.
func (l *Lab) Scaler(s *Scenario) Way {
	p := l.Policy
	p.Mode = autoscale.Auto
	p.Targets.TTFT, p.Targets.TPOT = s.Targets.TTFT, s.Targets.TPOT
	if s.Keep {
		p.Actions = slices.DeleteFunc(slices.Clone(p.Actions), func(a autoscale.Action) bool { return a == autoscale.Narrow || a == autoscale.Remove })
	}
	return Way{"trireme", s.Start, func() simulate.Controller { return simulate.NewScaler(p) }}
}

// Static is a topology that stays as it is.
func Static(topology string) Way { return Way{"static", topology, nil} }

// Run is what came of a scenario: means over the seeds.
type Run struct {
	Scenario   string  `json:"scenario"`
	By         string  `json:"by"`       // the way
	Topology   string  `json:"topology"` // at the beginning
	Rate       float64 `json:"rate"`
	Requests   float64 `json:"requests"`
	Attainment float64 `json:"attainment"`      // part of requests within both targets
	Least      float64 `json:"attainment_low"`  // of the seeds
	Most       float64 `json:"attainment_high"` // "
	TTFT       float64 `json:"ttft_met"`
	TPOT       float64 `json:"tpot_met"`
	Latency    float64 `json:"mean_latency_s"` // to the last token
	MeanTTFT   float64 `json:"mean_ttft_s"`
	TTFT90     float64 `json:"p90_ttft_s"`
	NPUHours   float64 `json:"npu_hours"`
	MeanNPUs   float64 `json:"mean_npus"`
	Changes    float64 `json:"changes"` // begun after the time to settle
	Hours      float64 `json:"hours"`   // that count

	Detail *simulate.Result `json:"-"` // of the first seed
}

// Play runs a scenario at a rate, once for each seed.
func (l *Lab) Play(s *Scenario, rate float64, w Way) (*Run, error) {
	if l.Step != nil {
		if err := l.Step(fmt.Sprintf("%s: %s %s", s.Name, w.Name, w.Topology)); err != nil {
			return nil, err
		}
	}
	mean := &Run{Scenario: s.Name, By: w.Name, Topology: w.Topology, Rate: rate, Least: 1}
	for k, seed := range l.Seeds {
		r, err := l.once(s, rate, w, seed)
		if err != nil {
			return nil, fmt.Errorf("%s on %s: %w", s.Name, w.Topology, err)
		}
		if k == 0 {
			mean.Detail = r.Detail
		}
		n := float64(len(l.Seeds))
		for _, x := range []struct {
			to *float64
			of float64
		}{
			{&mean.Requests, r.Requests}, {&mean.Attainment, r.Attainment}, {&mean.TTFT, r.TTFT}, {&mean.TPOT, r.TPOT}, {&mean.Latency, r.Latency},
			{&mean.TTFT90, r.TTFT90}, {&mean.MeanTTFT, r.MeanTTFT}, {&mean.NPUHours, r.NPUHours}, {&mean.MeanNPUs, r.MeanNPUs}, {&mean.Changes, r.Changes}, {&mean.Hours, r.Hours},
		} {
			*x.to += x.of / n
		}
		mean.Least, mean.Most = min(mean.Least, r.Attainment), max(mean.Most, r.Attainment)
	}
	return mean, nil
}

func (l *Lab) once(s *Scenario, rate float64, w Way, seed uint64) (*Run, error) {
	var c simulate.Controller
	if w.Control != nil {
		c = w.Control()
	}
	f, err := simulate.New(l.config(s, w.Topology, seed, c))
	if err != nil {
		return nil, err
	}
	load, length := simulate.Draw(seed, s.Phases(rate))
	d, err := f.Run(load, length)
	if err != nil {
		return nil, err
	}
	r := &Run{Detail: d, Hours: (length - s.Settle).Hours(), NPUHours: d.NPUTime.Hours(), MeanNPUs: d.NPUTime.Seconds() / length.Seconds()}
	var ttfts []float64
	met := func(to *float64, ok bool) {
		if ok {
			*to++
		}
	}
	for i := range d.Outcomes {
		o := &d.Outcomes[i]
		if o.Arrive < s.Settle {
			continue
		}
		r.Requests++
		met(&r.Attainment, o.Good(s.Targets))
		met(&r.TTFT, !o.Refused && o.TTFT <= s.Targets.TTFT)
		met(&r.TPOT, !o.Refused && o.TPOT <= s.Targets.TPOT)
		r.Latency += o.E2E.Seconds()
		r.MeanTTFT += o.TTFT.Seconds()
		ttfts = append(ttfts, o.TTFT.Seconds())
	}
	if n := r.Requests; n > 0 {
		r.Attainment, r.TTFT, r.TPOT, r.Latency = r.Attainment/n, r.TTFT/n, r.TPOT/n, r.Latency/n
		r.MeanTTFT /= n
		slices.Sort(ttfts)
		r.TTFT90 = ttfts[len(ttfts)*9/10]
	}
	for _, m := range d.Made {
		if m.At >= s.Settle {
			r.Changes++
		}
	}
	return r, nil
}

// Best is the static topology of so many NPUs that attains most, of all plan.Splits; of those alike the one with the least latency. separate is
// the best of those in which each stage has its own NPUs.
func (l *Lab) Best(s *Scenario, rate float64, npus int) (best, separate *Run, err error) {
	better := func(r, than *Run) bool {
		return than == nil || r.Attainment > than.Attainment || r.Attainment == than.Attainment && r.Latency < than.Latency
	}
	for _, t := range plan.Splits(npus) {
		r, err := l.Play(s, rate, Static(t.String()))
		if err != nil {
			return nil, nil, err
		}
		r.By = "best static"
		if better(r, best) {
			best = r
		}
		if len(t.Groups) == 3 && better(r, separate) {
			separate = r
		}
	}
	return best, separate, nil
}

// Overload is the rate of plan's grid at which a topology attains about so much of a scenario.
func (l *Lab) Overload(s *Scenario, topology string, attainment float64) (*Run, error) {
	var best *Run
	at := func(place int) (bool, error) {
		r, err := l.Play(s, plan.Rate(place), Static(topology))
		if err != nil {
			return false, err
		}
		if best == nil || off(r.Attainment, attainment) < off(best.Attainment, attainment) {
			best = r
		}
		return r.Attainment >= attainment, nil
	}
	high := plan.Place(0.1)
	for {
		ok, err := at(high)
		if err != nil {
			return nil, err
		}
		if !ok {
			break
		}
		if high += plan.Place(0.2) - plan.Place(0.1); plan.Rate(high) > 1000 {
			return nil, fmt.Errorf("%w: %s attains %.0f%% of %s at any rate", ErrScenario, topology, 100*attainment, s.Name)
		}
	}
	_, err := plan.Highest(max(0, high-plan.Place(0.2)+plan.Place(0.1)+1), high-1, at)
	return best, err
}

// Peak is the smallest static topology that attains so much of a scenario of one phase, of all plan.Splits. Those that are too small for its
// peak are not tried: for any set of stages the NPUs with their roles have to do tooSmall of its work at least. The others have to attain
// nearly as much of the fifth in its middle, where the peak is, before all of it is played.
func (l *Lab) Peak(s *Scenario, rate float64, attainment float64) (*Run, error) {
	need := l.needs(s, rate)
	middle := *s
	middle.Phases = func(rate float64) []simulate.Phase {
		p := s.Phases(rate)[0]
		from, whole := 2*p.Length/5, p.Rate
		p.Length /= 5
		p.Rate = func(since time.Duration) float64 { return whole(from + since) }
		return []simulate.Phase{p}
	}
	for n := 3; n <= 64; n++ {
		for _, t := range plan.Splits(n) {
			if !enough(t, need) {
				continue
			}
			text := t.String()
			r, err := l.Play(&middle, rate, Static(text))
			if err == nil && r.Attainment >= attainment-nearly {
				r, err = l.Play(s, rate, Static(text))
			}
			if err != nil {
				return nil, err
			}
			if r.Attainment >= attainment {
				r.By = "sized for the peak"
				return r, nil
			}
		}
	}
	return nil, fmt.Errorf("%w: no static topology of up to 64 NPUs attains %.0f%% of %s", ErrScenario, 100*attainment, s.Name)
}

// nearly is how much less of the middle than of all a topology may attain: the middle of the wave has less than half of its requests.
const nearly = 0.2

// tooSmall is the part of the work at the peak below which a topology is not even tried.
const tooSmall = 0.8

// needs is the NPUs that each set of stages of a scenario needs at its peak at least.
func (l *Lab) needs(s *Scenario, rate float64) (npus [1 << autoscale.Stages]float64) {
	for _, p := range s.Phases(rate) {
		of, peak := simulate.Steady(1)
		load, _ := simulate.Draw(1, []simulate.Phase{{Length: 1000 * time.Second, Rate: of, Peak: peak, Kind: p.Kind}})
		for set, n := range plan.Needs(Costs{l.Profile}, s.Targets, load, p.Peak) {
			npus[set] = max(npus[set], n)
		}
	}
	return npus
}

// enough reports whether a topology has tooSmall of the NPUs that every set of stages needs.
func enough(t conf.Topology, need [1 << autoscale.Stages]float64) bool {
	for set, n := range need {
		if float64(plan.Having(t, set)) < tooSmall*n {
			return false
		}
	}
	return true
}

func off(a, b float64) float64 { return max(a-b, b-a) }
