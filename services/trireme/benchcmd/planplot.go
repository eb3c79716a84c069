package benchcmd

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"

	"trireme.dev/services/trireme/load"
	"trireme.dev/shared/conf"
	"trireme.dev/shared/plan"
)

// draw draws attainment over rate of the best, and, into a file of its own, goodput over how NPUs are shared by encode, prefill and decode.
func (s *planStudy) draw(path string) error {
	var curves []load.Curve
	for _, r := range s.report.rows[:min(len(s.report.rows), mostCurves)] {
		if r.Pooled < 0 {
			continue
		}
		c := load.Curve{Name: r.Topology.String()}
		for place := max(0, r.Pooled-16); place <= r.Pooled+16; place += 4 { // 3/4 to 4/3 of its goodput
			s.next("drawing " + c.Name)
			a, err := s.planner.Attainment(r.Config, plan.Rate(place))
			if err != nil {
				return err
			}
			c.Points = append(c.Points, load.Point{Rate: plan.Rate(place), Attainment: a})
		}
		curves = append(curves, c)
	}
	title := fmt.Sprintf("%s: simulated, NPUs as %s", s.SLO, s.profile.Name)
	if err := load.Plot(path, title, s.Percentile/100, curves); err != nil {
		return err
	}
	if !s.load.pictures {
		return nil
	}
	npus := s.report.NPUs
	var splits []conf.Topology
	for _, t := range plan.Splits(npus) {
		if len(t.Groups) == 3 && s.planner.Fits(t) == nil {
			splits = append(splits, t)
		}
	}
	s.next(fmt.Sprintf("drawing %d splits", len(splits)))
	found, err := s.planner.Measure(splits)
	if err != nil || len(found) == 0 {
		return err
	}
	p := plot.New()
	p.Title.Text = fmt.Sprintf("%d NPUs with each stage on its own: simulated, as %s", npus, s.profile.Name)
	p.X.Label.Text, p.Y.Label.Text = "encoders; the rest decodes", "goodput, requests a second"
	p.X.Min, p.Y.Min = 0, 0
	p.Legend.Left, p.Legend.Top = true, true
	p.Add(plotter.NewGrid())
	lines := map[int]plotter.XYs{} // by NPUs for prefill
	for _, f := range found {
		lines[f.Groups[1].Count] = append(lines[f.Groups[1].Count], plotter.XY{X: float64(f.Groups[0].Count), Y: plan.Rate(f.Place)})
	}
	for k := 1; k <= min(mostCurves, npus); k++ {
		if len(lines[k]) == 0 {
			continue
		}
		line, points, err := plotter.NewLinePoints(lines[k])
		if err != nil {
			return fmt.Errorf("plotting %d for prefill: %w", k, err)
		}
		line.Color, points.Color, points.Shape = plotutil.Color(k), plotutil.Color(k), plotutil.Shape(k)
		p.Add(line, points)
		p.Legend.Add(fmt.Sprintf("%dP", k), line, points)
	}
	ext := filepath.Ext(path)
	split := strings.TrimSuffix(path, ext) + "-split" + ext
	if err := drawRows(split, []*plot.Plot{p}); err != nil {
		_ = os.Remove(split)
		return fmt.Errorf("plotting to %s: %w", split, err)
	}
	return nil
}

// mostCurves are as many as can be told apart.
const mostCurves = 6
