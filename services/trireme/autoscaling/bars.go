package autoscaling

import (
	"fmt"
	"math"

	"trireme.dev/shared/plan"
)

// Bar is what is asked for, and what came of it.
type Bar struct {
	Scenario string  `json:"scenario"`
	What     string  `json:"what"`
	Want     string  `json:"want"`
	Got      float64 `json:"got"` // a part, or a number, as Want says
	Figures  string  `json:"figures"`
	Met      bool    `json:"met"`
}

// Report is all runs of a scenario, and what they say of its bars.
type Report struct {
	Scenario *Scenario `json:"-"`
	Name     string    `json:"scenario"`
	Text     string    `json:"text"`
	Rate     float64   `json:"rate"`
	NPUs     int       `json:"npus"` // that there are
	Runs     []*Run    `json:"runs"`
	Bars     []Bar     `json:"bars"`
}

// Compare runs a scenario in all ways, and what its bars compare with besides; rate 0 is the scenario's own.
func (l *Lab) Compare(s *Scenario, rate float64) (*Report, error) {
	r := &Report{Scenario: s, Name: s.Name, Text: s.Text, Rate: rate, NPUs: s.NPUs(), Bars: []Bar{}}
	if r.Rate == 0 {
		r.Rate = s.Rate
	}
	if r.Rate == 0 {
		x, err := l.Overload(s, s.Start, staticMix)
		if err != nil {
			return nil, err
		}
		r.Rate = x.Rate
	}
	play := func(w Way) (*Run, error) {
		x, err := l.Play(s, r.Rate, w)
		if err == nil {
			r.Runs = append(r.Runs, x)
		}
		return x, err
	}
	ours, err := play(l.Scaler(s))
	if err != nil {
		return nil, err
	}
	// The best static topology: of as many NPUs as there are where none are spare, else of as many as ours had on average, rounded up.
	npus, separate := r.NPUs, s.Start
	var static, best *Run
	if fleet(s.Start).Spare == 0 {
		if static, err = play(Static(s.Start)); err != nil {
			return nil, err
		}
	} else {
		npus = max(3, int(math.Ceil(ours.MeanNPUs-0.01)))
		separate = wide(fmt.Sprintf("%dE1P1D", npus-2))
	}
	if s.Search {
		var apart *Run
		if best, apart, err = l.Best(s, r.Rate, npus); err != nil {
			return nil, err
		}
		r.Runs = append(r.Runs, best)
		if fleet(s.Start).Spare > 0 {
			separate = wide(apart.Topology)
		}
	}
	for _, w := range l.Rivals(s, separate) {
		if _, err := play(w); err != nil {
			return nil, err
		}
	}
	percent := func(x float64) string { return fmt.Sprintf("%.1f%%", 100*x) }
	bar := func(what, want string, got float64, met bool, figures string) {
		r.Bars = append(r.Bars, Bar{s.Name, what, want, got, figures, met})
	}
	switch s.Name {
	case "mix":
		at := fmt.Sprintf("at %.2f requests a second, where %s attains %s", r.Rate, s.Start, percent(static.Attainment))
		bar("attainment", "at least 80%", ours.Attainment, ours.Attainment >= 0.8, percent(ours.Attainment)+" "+at)
		bar("mean latency", "at most half", ours.Latency/static.Latency, ours.Latency <= static.Latency/2,
			fmt.Sprintf("%.1f s of %.1f s", ours.Latency, static.Latency))
	case "burst":
		bar("attainment", "at least 90%", ours.Attainment, ours.Attainment >= 0.9, percent(ours.Attainment)+fmt.Sprintf(" with %.2f NPUs on average", ours.MeanNPUs))
		bar("static of as many NPUs", "under 60%", best.Attainment, best.Attainment < 0.6,
			fmt.Sprintf("%s, the best of %d topologies, attains %s", best.Topology, len(plan.Splits(npus)), percent(best.Attainment)))
	case "wave":
		peak, err := l.Peak(s, r.Rate, l.Policy.Targets.Percentile/100)
		if err != nil {
			return nil, err
		}
		r.Runs = append(r.Runs, peak)
		bar("attainment", "at least 90%", ours.Attainment, ours.Attainment >= 0.9, percent(ours.Attainment))
		bar("NPU-hours", "at most 60%", ours.NPUHours/peak.NPUHours, ours.NPUHours <= 0.6*peak.NPUHours,
			fmt.Sprintf("%.1f of %.1f, of %s, the smallest topology that attains 90%% of the wave (%s)", ours.NPUHours, peak.NPUHours, peak.Topology, percent(peak.Attainment)))
	case "noise":
		bar("changes", "at most 1 an hour", ours.Changes/ours.Hours, ours.Changes <= ours.Hours,
			fmt.Sprintf("%.2f an hour, of %.0f hours, all counted as needless", ours.Changes/ours.Hours, ours.Hours*float64(len(l.Seeds))))
	}
	return r, nil
}

// Ours is the run of the scaler.
func (r *Report) Ours() *Run {
	for _, x := range r.Runs {
		if x.By == "trireme" {
			return x
		}
	}
	panic("BUG: a report without the scaler's run")
}

// staticMix is what the static topology attains of the mix at the rate of the comparison.
const staticMix = 0.4
