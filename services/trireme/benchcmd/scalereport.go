package benchcmd

import (
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgimg"
	"gonum.org/v1/plot/vg/vgsvg"

	"trireme.dev/shared/conf"
)

func (r *ScaleReport) writeTable(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "WAY\tNPUS\tLATENCY s\tDOWNTIME s\tLONGEST GAP s\tBEFORE s\tPEAK MEMORY\tBEFORE\tAFTER\tFAILED\tCHANGED\tOF")
	for i := range r.Changes {
		f := &r.Changes[i]
		fmt.Fprintf(t, "%s\t%d to %d\t%.3f\t%.3f\t%.3f\t%.3f\t%v\t%v\t%v\t%d\t%d\t%d\n", f.Strategy, f.From, f.To, f.Latency, f.Downtime, f.During.Gap,
			f.Before.Gap, conf.Bytes(f.Peak), conf.Bytes(f.Held), conf.Bytes(f.Settled), f.Failed, f.Changed, f.Sent)
	}
	fmt.Fprintln(t, "\nWAY\tTOKENS/s BEFORE\tDURING\tAFTER\tREQUESTS/s BEFORE\tDURING\tAFTER\tIN TIME BEFORE\tDURING\tAFTER")
	for i := range r.Changes {
		f := &r.Changes[i]
		b, d, a := &f.Before, &f.During, &f.After
		fmt.Fprintf(t, "%s\t%.1f\t%.1f\t%.1f\t%.2f\t%.2f\t%.2f\t%.0f%%\t%.0f%%\t%.0f%%\n", f.Strategy, b.Rate, d.Rate, a.Rate, b.Requests, d.Requests, a.Requests,
			100*b.Attainment, 100*d.Attainment, 100*a.Attainment)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for i := range r.Changes {
		f := &r.Changes[i]
		if len(f.Parts) == 0 {
			continue
		}
		fmt.Fprintf(w, "%s:", f.Strategy)
		for _, name := range slices.Sorted(maps.Keys(f.Parts)) {
			fmt.Fprintf(w, " %s %.4g", name, f.Parts[name])
		}
		fmt.Fprintln(w)
	}
	paced := "NPUs as fast as the host"
	if r.Paced != "" {
		paced = "NPUs paced as " + r.Paced
	}
	_, err := fmt.Fprintf(w, "%s, domains %s; experts of %v; copies at %v/s at most, disk at %v/s; %.2f requests a second; in time: TTFT %.0f ms, TPOT %.0f ms\n",
		paced, r.Domains, conf.Bytes(r.Bytes), conf.Bytes(r.CopyRate), conf.Bytes(r.DiskRate), r.Rate, r.TTFT, r.TPOT)
	return err
}

// plotStep is the width of what is drawn as a point.
const plotStep = 500 * time.Millisecond

// draw draws, for each trial, tokens a second and the longest gap in each step.
func (c *Scale) draw(trials []trial) error {
	ext := filepath.Ext(c.Plot)
	count := map[string]int{}
	for _, t := range trials {
		name := t.way.name
		if count[name]++; c.Repeats > 1 {
			name = fmt.Sprintf("%s-%d", name, count[name])
		}
		path := strings.TrimSuffix(c.Plot, ext) + "-" + name + ext
		if err := c.drawOne(path, name, t); err != nil {
			_ = os.Remove(path) // half a picture is none
			return fmt.Errorf("plotting to %s: %w", path, err)
		}
	}
	return nil
}

func (c *Scale) drawOne(path, name string, t trial) error {
	curve := func(title, unit string, values []float64) (*plot.Plot, error) {
		p := plot.New()
		p.Title.Text, p.X.Label.Text, p.Y.Label.Text = title, "seconds from the command", unit
		p.Y.Min = 0
		from := t.report.Began.Sub(t.event.Command).Seconds()
		xy := make(plotter.XYs, len(values))
		most := 0.0
		for i, v := range values {
			xy[i] = plotter.XY{X: from + float64(i)*plotStep.Seconds(), Y: v}
			most = max(most, v)
		}
		line, err := plotter.NewLine(xy)
		if err != nil {
			return nil, err
		}
		line.Color = plotutil.Color(0)
		p.Add(plotter.NewGrid(), line)
		for _, at := range []float64{0, t.event.Full.Sub(t.event.Command).Seconds()} {
			mark, err := plotter.NewLine(plotter.XYs{{X: at, Y: 0}, {X: at, Y: most}})
			if err != nil {
				return nil, err
			}
			mark.Dashes = []vg.Length{vg.Points(4), vg.Points(4)}
			p.Add(mark)
		}
		return p, nil
	}
	rates, err := curve(fmt.Sprintf("%s, %d to %d NPUs", name, c.From, c.To), "tokens a second", t.report.Rates(plotStep))
	if err != nil {
		return err
	}
	gaps, err := curve("", "longest token gap, seconds", t.report.Gaps(plotStep))
	if err != nil {
		return err
	}
	const width, height = 16 * vg.Centimeter, 16 * vg.Centimeter
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	both := func(d draw.Canvas) {
		tiles := draw.Tiles{Rows: 2, Cols: 1}
		for i, row := range plot.Align([][]*plot.Plot{{rates}, {gaps}}, tiles, d) {
			[]*plot.Plot{rates, gaps}[i].Draw(row[0])
		}
	}
	switch strings.ToLower(filepath.Ext(path)) {
	case ".svg":
		canvas := vgsvg.New(width, height)
		both(draw.New(canvas))
		_, err = canvas.WriteTo(f)
	default:
		canvas := vgimg.New(width, height)
		both(draw.New(canvas))
		_, err = vgimg.PngCanvas{Canvas: canvas}.WriteTo(f)
	}
	return err
}
