package load

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
)

// Point is one run of a sweep: at a rate, the share of requests that kept their bounds.
type Point struct {
	Rate       float64 // requests a second
	Attainment float64 // 0 to 1
}

// Curve is a sweep.
type Curve struct {
	Name   string
	Points []Point // rising in Rate
}

// Goal is the attainment that papers about goodput ask for (EPD, arXiv:2501.05460, section 4: 90%).
const Goal = 0.9

// Capacity is the highest rate up to which attainment stays at goal or above, between two measured points on the line
// through them; 0 when already the first is below.
func (c *Curve) Capacity(goal float64) float64 {
	best := 0.0
	for i, p := range c.Points {
		if p.Attainment < goal {
			if i > 0 {
				before := c.Points[i-1]
				best += (p.Rate - before.Rate) * (before.Attainment - goal) / (before.Attainment - p.Attainment)
			}
			return best
		}
		best = p.Rate
	}
	return best
}

// Plot draws attainment against rate, with a line at goal, into a file, whose ending, .svg or .png, says how.
func Plot(path, title string, goal float64, curves []Curve) error {
	if ext := strings.ToLower(filepath.Ext(path)); ext != ".svg" && ext != ".png" {
		return fmt.Errorf("plot file %s: its name must end in .svg or .png", path)
	}
	p := plot.New()
	p.Title.Text = title
	p.X.Label.Text = "requests a second"
	p.Y.Label.Text = "requests within their bounds, %"
	p.X.Min, p.Y.Min, p.Y.Max = 0, 0, 105
	p.Legend.Left, p.Legend.Top = true, false
	p.Add(plotter.NewGrid())
	for i, c := range curves {
		xy := make(plotter.XYs, len(c.Points))
		for k, pt := range c.Points {
			xy[k] = plotter.XY{X: pt.Rate, Y: 100 * pt.Attainment}
		}
		line, points, err := plotter.NewLinePoints(xy)
		if err != nil {
			return fmt.Errorf("plotting %s: %w", c.Name, err)
		}
		line.Color, points.Color = plotutil.Color(i), plotutil.Color(i)
		points.Shape = plotutil.Shape(i)
		p.Add(line, points)
		p.Legend.Add(c.Name, line, points)
	}
	line := plotter.NewFunction(func(float64) float64 { return 100 * goal })
	line.Dashes = []vg.Length{vg.Points(4), vg.Points(4)}
	p.Add(line)
	if err := p.Save(16*vg.Centimeter, 10*vg.Centimeter, path); err != nil {
		_ = os.Remove(path) // half a picture is none
		return fmt.Errorf("plotting to %s: %w", path, err)
	}
	return nil
}
