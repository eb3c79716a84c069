package benchcmd

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgimg"
	"gonum.org/v1/plot/vg/vgsvg"

	"trireme.dev/services/trireme/scaling"
)

// plotStep is the width of what is drawn as a point.
const plotStep = 500 * time.Millisecond

// draw draws, for each run, tokens a second and the longest gap in each step, and for several copy rates what they cost.
func (c *Scale) draw(runs []trial, r *ScaleReport) error {
	ext := filepath.Ext(c.Plot)
	file := func(name string, rows ...*plot.Plot) error {
		path := strings.TrimSuffix(c.Plot, ext) + "-" + name + ext
		if err := drawRows(path, rows); err != nil {
			_ = os.Remove(path) // half a picture is none
			return fmt.Errorf("plotting to %s: %w", path, err)
		}
		return nil
	}
	count := map[string]int{}
	for _, t := range runs {
		name := t.way.name
		if len(c.CopyRate) > 1 && name == scaling.Elastic {
			name += "-" + t.rate.String()
		}
		name = strings.ReplaceAll(name, " ", "")
		if count[name]++; count[name] > 1 {
			name = fmt.Sprintf("%s-%d", name, count[name])
		}
		title := fmt.Sprintf("%s, %d to %d NPUs", name, c.From, c.To)
		if err := file(name, t.curve(title, "tokens a second", t.report.Rates(plotStep)),
			t.curve("", "longest token gap, seconds", t.report.Gaps(plotStep))); err != nil {
			return err
		}
	}
	curve := r.curve()
	if len(curve) < 2 {
		return nil
	}
	against := func(unit string, of func(*scaling.Summary) float64) *plot.Plot {
		p := plot.New()
		p.X.Label.Text, p.Y.Label.Text = "copy rate, MiB a second", unit
		p.X.Min, p.Y.Min = 0, 0
		var xy plotter.XYs
		for i := range curve {
			xy = append(xy, plotter.XY{X: float64(curve[i].CopyRate) / (1 << 20), Y: of(&curve[i])})
		}
		p.Add(plotter.NewGrid(), lineOf(xy))
		return p
	}
	return file("curve", against("latency, seconds", func(x *scaling.Summary) float64 { return x.Latency }),
		against("longest token gap, to one without a change", func(x *scaling.Summary) float64 { return x.Gaps }),
		against("throughput during, to before", func(x *scaling.Summary) float64 { return x.Throughput }))
}

func lineOf(xy plotter.XYs) *plotter.Line {
	line, err := plotter.NewLine(xy)
	if err != nil {
		panic("BUG: a line of no points, or of infinite ones: " + err.Error())
	}
	line.Color = plotutil.Color(0)
	return line
}

// curve draws values of steps of the run, with marks where the change began and where it was complete.
func (t *trial) curve(title, unit string, values []float64) *plot.Plot {
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
	p.Add(plotter.NewGrid(), lineOf(xy))
	for _, at := range []float64{0, t.event.Full.Sub(t.event.Command).Seconds()} {
		mark := lineOf(plotter.XYs{{X: at, Y: 0}, {X: at, Y: most}})
		mark.Dashes = []vg.Length{vg.Points(4), vg.Points(4)}
		p.Add(mark)
	}
	return p
}

// drawRows draws plots below one another.
func drawRows(path string, plots []*plot.Plot) error {
	width, height := 16*vg.Centimeter, vg.Length(len(plots))*8*vg.Centimeter
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	all := func(d draw.Canvas) {
		rows := make([][]*plot.Plot, len(plots))
		for i, p := range plots {
			rows[i] = []*plot.Plot{p}
		}
		for i, row := range plot.Align(rows, draw.Tiles{Rows: len(plots), Cols: 1}, d) {
			plots[i].Draw(row[0])
		}
	}
	switch strings.ToLower(filepath.Ext(path)) {
	case ".svg":
		canvas := vgsvg.New(width, height)
		all(draw.New(canvas))
		_, err = canvas.WriteTo(f)
	default:
		canvas := vgimg.New(width, height)
		all(draw.New(canvas))
		_, err = vgimg.PngCanvas{Canvas: canvas}.WriteTo(f)
	}
	return err
}
