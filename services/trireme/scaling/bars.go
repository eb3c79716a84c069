package scaling

import (
	"cmp"
	"math"
	"slices"
	"time"
)

// Elastic is the way that bars are about, Baselines are those of ElasticMoE (arXiv:2510.02613, section 7.1) that it is compared with.
const Elastic = "elastic"

// Standby is the way that Elastic has no bar against: a replica that runs already.
const Standby = "standby"

// Baselines are the ways that Elastic is compared with.
var Baselines = []string{"cold", "extravagant", "colocated", "horizontal"}

// What a change may cost on paced NPUs.
const (
	MostGap    = 2.0                    // times the longest gap of an equal time without a change
	LeastRate  = 0.95                   // of the tokens a second before
	MostTime   = 1.3                    // times what the bytes take at the copy rate; a warm-up step and Overhead come on top
	Overhead   = 100 * time.Millisecond // of the command, the plan and the switch
	MostMemory = 1.01                   // times the larger layout and each moving expert once
	LeastSpeed = 9.0                    // times as fast as the best of the other ways
)

// Gaps is how much longer the longest gap was in the change than in as much time without one; 0: there was none to compare with.
func (f *Figures) Gaps() float64 { return ratio(f.During.Gap, f.Before.Gap) }

// Throughput is the part of the tokens a second before that came in the change; 0: there were none.
func (f *Figures) Throughput() float64 { return ratio(f.During.Rate, f.Before.Rate) }

func ratio(a, b float64) float64 {
	if b == 0 {
		return 0
	}
	return a / b
}

// Allowed is the latency, in seconds, that the bar allows.
func (f *Figures) Allowed() float64 {
	return MostTime*float64(f.Moved)/float64(f.CopyRate) + f.Warm + Overhead.Seconds()
}

// Room is the memory that the bar allows.
func (f *Figures) Room() int64 { return int64(MostMemory * float64(max(f.Held, f.Settled)+f.Moved)) }

// Bar is a bound that was to be kept.
type Bar struct {
	Name     string  `json:"name"`
	Measured float64 `json:"measured"`
	Bound    float64 `json:"bound"`
	Least    bool    `json:"at_least"` // it is a lower bound, else an upper one
	Unit     string  `json:"unit"`
	Runs     int     `json:"runs"`
	Kept     bool    `json:"kept"`
}

// Bars are those of Elastic's runs at a copy rate. Of several runs the middle one counts, of memory and of what went wrong the worst. Of
// answers that were not compared nobody knows whether they changed.
func Bars(all []Figures, copyRate int64, compared bool) []Bar {
	var runs []Figures
	for _, f := range all {
		if f.Strategy == Elastic && f.CopyRate == copyRate {
			runs = append(runs, f)
		}
	}
	if len(runs) == 0 {
		return nil
	}
	bar := func(name, unit string, measured, bound float64, least bool) Bar {
		kept := measured <= bound
		if least {
			kept = measured >= bound
		}
		return Bar{Name: name, Measured: measured, Bound: bound, Least: least, Unit: unit, Runs: len(runs), Kept: kept}
	}
	late := middle(runs, func(f *Figures) float64 { return f.Latency / f.Allowed() })
	large := worst(runs, func(f *Figures) float64 { return float64(f.Peak) / float64(f.Room()) })
	wrong := 0
	for _, f := range runs {
		wrong += f.Failed + f.Changed
	}
	nothing := "requests lost, refused or changed"
	if !compared {
		nothing = "requests lost or refused; changes unknown"
	}
	gaps := middle(runs, (*Figures).Gaps)
	rate := middle(runs, func(f *Figures) float64 { return -f.Throughput() })
	bars := []Bar{
		bar("longest token gap, to one without a change", "x", gaps.Gaps(), MostGap, false),
		bar("throughput during the change, to before", "", rate.Throughput(), LeastRate, true),
		bar("time to full capacity: 1.3 bytes/rate + a warm-up step + 100 ms", "s", late.Latency, late.Allowed(), false),
		bar("peak memory: larger layout + each moving expert once + 1%", "MiB", float64(large.Peak)/(1<<20), float64(large.Room())/(1<<20), false),
		bar(nothing, "", float64(wrong), 0, false),
	}
	if gaps.Gaps() == 0 {
		bars[0].Kept = false
	}
	return bars
}

// Speed is the bar of how many times as fast as the best of Baselines Elastic is at its first copy rate; ok is false if one of them was not
// run. It is one for changes of the number of NPUs only: of those ElasticMoE speaks. Where an NPU changes its role all that it is to
// have has to be copied, and copies are some times as fast as a disk, not nine.
func Speed(all []Figures) (b Bar, ok bool) {
	for _, name := range Baselines {
		if x := Faster(all, name); x > 0 && (!ok || x < b.Measured) {
			b, ok = Bar{Name: "faster than the best of the other ways", Measured: x, Bound: LeastSpeed, Least: true, Unit: "x", Kept: x >= LeastSpeed}, true
		}
	}
	b.Runs = len(ownRuns(all))
	return b, ok
}

// latency is that of the middle run.
func latency(runs []Figures) float64 {
	return middle(runs, func(f *Figures) float64 { return f.Latency }).Latency
}

// Faster is how many times as fast as another way Elastic is, of the middle run of each; 0: one of them was not run.
func Faster(all []Figures, than string) float64 {
	own, other := ownRuns(all), of(all, than)
	if len(own) == 0 || len(other) == 0 {
		return 0
	}
	return ratio(latency(other), latency(own))
}

// ownRuns are those of Elastic at its first copy rate: others are run at that one only.
func ownRuns(all []Figures) []Figures {
	own := of(all, Elastic)
	return slices.DeleteFunc(own, func(f Figures) bool { return f.CopyRate != own[0].CopyRate })
}

// of are the runs of a way.
func of(all []Figures, strategy string) (runs []Figures) {
	for _, f := range all {
		if f.Strategy == strategy {
			runs = append(runs, f)
		}
	}
	return runs
}

// middle is the run in the middle by a figure that should be small; of an even number the worse one.
func middle(runs []Figures, by func(*Figures) float64) *Figures {
	sorted := slices.Clone(runs)
	slices.SortStableFunc(sorted, func(a, b Figures) int { return cmp.Compare(by(&a), by(&b)) })
	return &sorted[len(sorted)/2]
}

func worst(runs []Figures, by func(*Figures) float64) *Figures {
	f := slices.MaxFunc(runs, func(a, b Figures) int { return cmp.Compare(by(&a), by(&b)) })
	return &f
}

// Summary is several runs of a way at a copy rate: the median of each figure, but for what its comment says.
type Summary struct {
	Strategy   string             `json:"strategy"`
	CopyRate   int64              `json:"copy_bytes_per_s"`
	Runs       int                `json:"runs"`
	Latency    float64            `json:"latency_s"`    // mean
	Deviation  float64            `json:"latency_sd_s"` // of the runs
	Allowed    float64            `json:"allowed_s"`
	Downtime   float64            `json:"downtime_s"`
	Gaps       float64            `json:"gap_ratio"`        // see Figures.Gaps
	Throughput float64            `json:"throughput_ratio"` // see Figures.Throughput
	Before     Part               `json:"before"`
	During     Part               `json:"during"`
	After      Part               `json:"after"`
	Held       int64              `json:"held_bytes"`
	Peak       int64              `json:"peak_bytes"` // most
	Settled    int64              `json:"after_bytes"`
	Sent       int                `json:"requests"` // of all, as the next two
	Failed     int                `json:"failed"`
	Changed    int                `json:"changed"`
	Parts      map[string]float64 `json:"parts,omitempty"`
}

// Summaries are the ways and copy rates in the order in which they first come.
func Summaries(all []Figures) []Summary {
	type kind struct {
		strategy string
		rate     int64
	}
	var order []kind
	runs := map[kind][]Figures{}
	for _, f := range all {
		k := kind{f.Strategy, f.CopyRate}
		if len(runs[k]) == 0 {
			order = append(order, k)
		}
		runs[k] = append(runs[k], f)
	}
	sums := make([]Summary, len(order))
	for i, k := range order {
		sums[i] = summarise(runs[k])
	}
	return sums
}

func summarise(runs []Figures) Summary {
	of := func(by func(*Figures) float64) float64 { return median(runs, by) }
	parts := func(of func(*Figures) *Part) Part {
		of2 := func(by func(*Part) float64) float64 {
			return median(runs, func(f *Figures) float64 { return by(of(f)) })
		}
		return Part{
			Seconds:    of2(func(p *Part) float64 { return p.Seconds }),
			Rate:       of2(func(p *Part) float64 { return p.Rate }),
			Requests:   of2(func(p *Part) float64 { return p.Requests }),
			Attainment: of2(func(p *Part) float64 { return p.Attainment }),
			Gap:        of2(func(p *Part) float64 { return p.Gap }),
		}
	}
	n := float64(len(runs))
	s := Summary{
		Strategy: runs[0].Strategy, CopyRate: runs[0].CopyRate, Runs: len(runs),
		Allowed:    of((*Figures).Allowed),
		Downtime:   of(func(f *Figures) float64 { return f.Downtime }),
		Gaps:       of((*Figures).Gaps),
		Throughput: of((*Figures).Throughput),
		Before:     parts(func(f *Figures) *Part { return &f.Before }),
		During:     parts(func(f *Figures) *Part { return &f.During }),
		After:      parts(func(f *Figures) *Part { return &f.After }),
		Held:       int64(of(func(f *Figures) float64 { return float64(f.Held) })),
		Settled:    int64(of(func(f *Figures) float64 { return float64(f.Settled) })),
	}
	for i := range runs {
		f := &runs[i]
		s.Latency += f.Latency / n
		s.Peak = max(s.Peak, f.Peak)
		s.Sent, s.Failed, s.Changed = s.Sent+f.Sent, s.Failed+f.Failed, s.Changed+f.Changed
	}
	for i := range runs {
		s.Deviation += (runs[i].Latency - s.Latency) * (runs[i].Latency - s.Latency) / n
	}
	s.Deviation = math.Sqrt(s.Deviation)
	for name := range runs[0].Parts {
		if s.Parts == nil {
			s.Parts = map[string]float64{}
		}
		s.Parts[name] = of(func(f *Figures) float64 { return f.Parts[name] })
	}
	return s
}

// median is that of a figure, of an even number of runs the mean of the two in the middle.
func median(runs []Figures, by func(*Figures) float64) float64 {
	values := make([]float64, len(runs))
	for i := range runs {
		values[i] = by(&runs[i])
	}
	slices.Sort(values)
	n := len(values)
	return (values[(n-1)/2] + values[n/2]) / 2
}
