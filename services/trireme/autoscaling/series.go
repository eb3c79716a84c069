package autoscaling

import (
	"encoding/csv"
	"fmt"
	"io"
	"strconv"
	"time"

	"trireme.dev/shared/sched/autoscale"
)

// Point is a window of a run.
type Point struct {
	Second     float64 // the window's beginning
	Arrivals   float64 // a second
	NPUs       [autoscale.Stages]float64
	Held       float64 // NPUs that are not spare
	Queued     [autoscale.Stages]float64
	Waiting    float64
	Attainment float64 // of requests that arrived in the window; -1: none did
}

// Series is a run in windows of a width, of its first seed.
func (r *Run) Series(s *Scenario, width time.Duration) []Point {
	var all []Point
	var count []float64
	at := func(t time.Duration) int {
		k := int(t / width)
		for len(all) <= k {
			all = append(all, Point{Second: (time.Duration(len(all)) * width).Seconds()})
			count = append(count, 0)
		}
		return k
	}
	for _, m := range r.Detail.Timeline {
		k := at(m.At)
		p := &all[k]
		count[k]++
		for st := range m.NPUs {
			p.NPUs[st] += float64(m.NPUs[st])
			p.Queued[st] += float64(m.Queued[st])
		}
		p.Held += float64(m.Held)
		p.Waiting += float64(m.Waiting)
	}
	for k := range all {
		p, n := &all[k], max(1, count[k])
		for st := range p.NPUs {
			p.NPUs[st] /= n
			p.Queued[st] /= n
		}
		p.Held /= n
		p.Waiting /= n
	}
	good := make([]float64, len(all))
	sent := make([]float64, len(all))
	for i := range r.Detail.Outcomes {
		o := &r.Detail.Outcomes[i]
		k := min(int(o.Arrive/width), len(all)-1)
		sent[k]++
		if o.Good(s.Targets) {
			good[k]++
		}
	}
	for k := range all {
		all[k].Arrivals = sent[k] / width.Seconds()
		all[k].Attainment = -1
		if sent[k] > 0 {
			all[k].Attainment = good[k] / sent[k]
		}
	}
	return all
}

// Window is the width of a scenario's windows: a hundred or so.
func (s *Scenario) Window() time.Duration {
	var length time.Duration
	for _, p := range s.Phases(max(1, s.Rate)) {
		length += p.Length
	}
	return max(2*time.Second, (length / 120).Round(time.Second))
}

// WriteCSV writes all runs of reports in windows, a line each.
func WriteCSV(w io.Writer, reports []*Report) error {
	c := csv.NewWriter(w)
	number := func(x float64) string { return strconv.FormatFloat(x, 'f', -1, 64) }
	err := c.Write([]string{"scenario", "by", "topology", "rate", "second", "arrivals_per_s", "encode_npus", "prefill_npus", "decode_npus",
		"npus_held", "encode_queued", "prefill_queued", "decode_queued", "waiting", "attainment"})
	for _, r := range reports {
		for _, run := range r.Runs {
			for _, p := range run.Series(r.Scenario, r.Scenario.Window()) {
				if err != nil {
					return fmt.Errorf("writing the runs: %w", err)
				}
				attained := ""
				if p.Attainment >= 0 {
					attained = number(p.Attainment)
				}
				err = c.Write([]string{r.Name, run.By, run.Topology, number(run.Rate), number(p.Second), number(p.Arrivals), number(p.NPUs[0]),
					number(p.NPUs[1]), number(p.NPUs[2]), number(p.Held), number(p.Queued[0]), number(p.Queued[1]), number(p.Queued[2]),
					number(p.Waiting), attained})
			}
		}
	}
	c.Flush()
	if err == nil {
		err = c.Error()
	}
	if err != nil {
		return fmt.Errorf("writing the runs: %w", err)
	}
	return nil
}

// Change is one that a way has made, for reports.
type Change struct {
	At   float64 `json:"at_s"`
	Took float64 `json:"took_s"`
	What string  `json:"what"`
	Why  string  `json:"why"`
}

// Made are the changes of a run, of its first seed.
func (r *Run) Made() (all []Change) {
	for _, m := range r.Detail.Made {
		all = append(all, Change{m.At.Seconds(), m.Took.Seconds(), m.Sentence(), m.Why})
	}
	return all
}
