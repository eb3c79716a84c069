package compare

import (
	"encoding/csv"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"

	"trireme.dev/services/trireme/load"
)

// Mean is what the repeats of a run have in common: means of their figures.
type Mean struct {
	Attainment, TTFT, TTFT99, TPOT float64   // see Run
	Each                           []float64 // attainment, by repeat; none: it was not run
}

// Low is the least attainment of the repeats.
func (m *Mean) Low() float64 { return slices.Min(m.Each) }

// High is the greatest attainment of the repeats.
func (m *Mean) High() float64 { return slices.Max(m.Each) }

// At is the mean of the repeats of a run.
func (s *Study) At(topology string, workload int, rate float64) Mean {
	var m Mean
	for _, r := range s.Runs {
		if r.Topology != topology || r.Workload != workload || r.Rate != rate {
			continue
		}
		m.Each = append(m.Each, r.Attainment)
		m.Attainment, m.TTFT, m.TTFT99, m.TPOT = m.Attainment+r.Attainment, m.TTFT+r.TTFT, m.TTFT99+r.TTFT99, m.TPOT+r.TPOT
	}
	if n := float64(len(m.Each)); n > 0 {
		m.Attainment, m.TTFT, m.TTFT99, m.TPOT = m.Attainment/n, m.TTFT/n, m.TTFT99/n, m.TPOT/n
	}
	return m
}

// Curves are attainment against rate of all topologies in a workload.
func (s *Study) Curves(workload int) []load.Curve {
	var all []load.Curve
	for _, t := range s.Topologies {
		c := load.Curve{Name: t}
		for _, rate := range s.Rates(workload) {
			if m := s.At(t, workload, rate); len(m.Each) > 0 {
				c.Points = append(c.Points, load.Point{Rate: rate, Attainment: m.Attainment})
			}
		}
		all = append(all, c)
	}
	return all
}

// WriteCSV writes all runs to a file, a line each.
func (s *Study) WriteCSV(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return fmt.Errorf("writing runs: %w", err)
	}
	w := csv.NewWriter(f)
	number := func(x float64) string { return strconv.FormatFloat(x, 'g', 6, 64) }
	rows := [][]string{{
		"topology", "pictures", "rate", "repeat", "requests", "failed", "attainment", "median_ttft_ms", "p99_ttft_ms", "mean_tpot_ms",
	}}
	for _, r := range s.Runs {
		rows = append(rows, []string{
			r.Topology, s.Workloads[r.Workload].Pictures, number(r.Rate), strconv.Itoa(r.Repeat), strconv.Itoa(r.Requests),
			strconv.Itoa(r.Failed), number(r.Attainment), number(r.TTFT), number(r.TTFT99), number(r.TPOT),
		})
	}
	if err := errors.Join(w.WriteAll(rows), f.Close()); err != nil {
		return fmt.Errorf("writing runs: %w", err)
	}
	return nil
}
