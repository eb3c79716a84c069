package benchcmd

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"

	"trireme.dev/services/trireme/autoscaling"
	"trireme.dev/shared/npu/pace"
	"trireme.dev/shared/obs"
	"trireme.dev/shared/sched/autoscale"
)

// Autoscale is `trireme bench autoscale`.
type Autoscale struct {
	Scenarios []string      `arg:"" optional:"" help:"Of burst, ramp, wave, mix, paper and noise; by default all."`
	Pace      string        `help:"Profile of the NPUs: ${profiles}, or a file FILE.yaml." default:"distserve-opt-13b-a100" placeholder:"NAME"`
	Policy    string        `help:"Policy file of the scaler (scaler.yaml); its mode and its targets for latency are the scenario's." placeholder:"FILE" type:"path" env:"-"` // TRIREME_POLICY is of gateways
	Rate      float64       `help:"Requests a second, of the peak where the load changes; by default the scenario's, and in the mix the one at which the static topology attains 40%." placeholder:"N"`
	Seed      uint64        `help:"Of arrivals, delays of signals, and how long changes take. The same seed gives the same figures." default:"1"`
	Seeds     int           `help:"Runs of each, with one seed after the other: figures are their means." default:"5"`
	Validate  bool          `help:"Instead: run small loads on real fleets of paced NPUs, and print what the simulator says of the same requests beside it."`
	Live      bool          `help:"Instead: run a burst of 50 s on a real fleet of paced NPUs with the real scaler, and on a static one of as many NPUs on average; both are simulated beside."`
	Real      time.Duration `help:"Time that each load of --validate is sent for." default:"40s"`
	JSON      bool          `name:"json" help:"Write one JSON object instead of tables."`
	CSV       string        `name:"csv" help:"Write load, NPUs by role, queues and attainment over time to a file besides." placeholder:"FILE" type:"path"`
	Plot      string        `help:"Draw them, a file for each scenario; the ending is .svg or .png." placeholder:"FILE" type:"path"`
}

// Help is shown by `trireme bench autoscale --help`.
func (Autoscale) Help() string {
	return `Simulates a fleet under loads that change, sized and re-roled by the scaler, by the rules of others, and by nobody: the best static
topology of as many NPUs (all splits are tried), EPD's trigger (the longest queue, every 5 s), ElasticMoE's rule (more while under 90%
meet their targets), and Kubernetes' HPA on queues. The schedulers are the services' own code; NPUs take the time that the profile says.
Everything is simulated, nothing is measured here: figures are labelled so, and RATIONALE.md tells how far the simulator is off.

  burst   ten times the load for two minutes          mix     text, then eight pictures a request, then long answers
  ramp    up and down in ten minutes                  paper   EPD's experiment of role switching
  wave    a day's load                                noise   hours of a steady load that only chance varies

Examples:
  trireme bench autoscale                                 all, some minutes
  trireme bench autoscale mix --plot mix.svg              one, drawn as mix-mix.svg
  trireme bench autoscale burst --rate 20 --seeds 1
  trireme bench autoscale wave --policy scaler.yaml --json
  trireme bench autoscale noise --csv noise.csv
  trireme bench autoscale --validate                      the simulator beside the real thing, four minutes
  trireme bench autoscale --live                          the real scaler, in real time, four minutes`
}

// AutoscaleReport is what Autoscale writes with --json.
type AutoscaleReport struct {
	Version   string                `json:"version"`
	Simulated bool                  `json:"simulated"` // always
	Profile   string                `json:"profile"`   // whose NPUs these are
	Source    string                `json:"source"`    // of the profile
	Seed      uint64                `json:"seed"`
	Seeds     int                   `json:"seeds"`
	Reports   []*autoscaling.Report `json:"scenarios"`
	// Changes are those that the scaler made, by scenario, with the first seed.
	Changes map[string][]autoscaling.Change `json:"changes"`
}

// Run simulates and prints.
func (c *Autoscale) Run(e Env) error {
	profile, err := pace.Load(c.Pace)
	if err != nil {
		return fmt.Errorf("--pace: %w", err)
	}
	if c.Seeds < 1 || c.Seeds > 100 || c.Rate < 0 || c.Rate > 1000 {
		return fmt.Errorf("--seeds 1 to 100, --rate above 0 and at most 1000%w", ErrUsage)
	}
	if ext := strings.ToLower(filepath.Ext(c.Plot)); c.Plot != "" && ext != ".svg" && ext != ".png" {
		return fmt.Errorf("--plot %s: its name must end in .svg or .png%w", c.Plot, ErrUsage)
	}
	if c.Validate {
		if c.Real < time.Second || c.Real > time.Hour {
			return fmt.Errorf("--real 1s to 1h%w", ErrUsage)
		}
		return c.validate(e, profile)
	}
	if c.Live {
		return c.live(e, profile)
	}
	policy := autoscale.Default()
	if c.Policy != "" {
		data, err := os.ReadFile(c.Policy)
		if err != nil {
			return fmt.Errorf("--policy: %w", err)
		}
		if policy, err = autoscale.Parse(data); err != nil {
			return fmt.Errorf("--policy %s: %w", c.Policy, err)
		}
	}
	names := c.Scenarios
	if len(names) == 0 {
		for _, s := range autoscaling.Scenarios {
			names = append(names, s.Name)
		}
	}
	scenarios := make([]*autoscaling.Scenario, len(names))
	for i, name := range names {
		if scenarios[i], err = autoscaling.Find(name); err != nil {
			return fmt.Errorf("%w%w", err, ErrUsage)
		}
	}
	r := &AutoscaleReport{
		Version: obs.Version(), Simulated: true, Profile: profile.Name, Source: profile.Source, Seed: c.Seed, Seeds: c.Seeds,
		Changes: map[string][]autoscaling.Change{},
	}
	next, end := progress(e.Err, -1) // how many topologies have to be tried is not known before
	defer end()
	lab := &autoscaling.Lab{Profile: profile, Policy: policy, Step: func(what string) error {
		next(what)
		return e.Context.Err()
	}}
	for k := range uint64(c.Seeds) {
		lab.Seeds = append(lab.Seeds, c.Seed+k)
	}
	for _, s := range scenarios {
		report, err := lab.Compare(s, c.Rate)
		if err != nil {
			return fmt.Errorf("simulating %s: %w", s.Name, err)
		}
		r.Reports = append(r.Reports, report)
		r.Changes[s.Name] = report.Ours().Made()
	}
	end()
	var errs []error
	if c.CSV != "" {
		errs = append(errs, toFile(c.CSV, func(w io.Writer) error { return autoscaling.WriteCSV(w, r.Reports) }))
	}
	if c.Plot != "" {
		for _, report := range r.Reports {
			errs = append(errs, c.draw(report, profile.Name))
		}
	}
	return errors.Join(append(errs, write(e.Out, c.JSON, r))...)
}

// toFile has f write a file, which is whole or is not.
func toFile(path string, f func(io.Writer) error) error {
	out, err := os.Create(path)
	if err != nil {
		return err
	}
	if err := errors.Join(f(out), out.Close()); err != nil {
		_ = os.Remove(path)
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}

func (r *AutoscaleReport) writeTable(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	for _, x := range r.Reports {
		fmt.Fprintf(t, "%s: %s; %.2f requests a second, %d NPUs; SIMULATED\n", strings.ToUpper(x.Name), x.Text, x.Rate, x.NPUs)
		fmt.Fprintln(t, "BY\tBEGINS AS\tWITHIN TARGETS\tSEEDS\tTTFT MET\tTPOT MET\tMEAN LATENCY s\tTTFT P90 s\tMEAN NPUS\tNPU-HOURS\tCHANGES")
		for _, run := range x.Runs {
			fmt.Fprintf(t, "%s\t%s\t%.1f%%\t%.0f-%.0f%%\t%.1f%%\t%.1f%%\t%.1f\t%.2f\t%.2f\t%.2f\t%.1f\n", run.By, run.Topology, 100*run.Attainment,
				100*run.Least, 100*run.Most, 100*run.TTFT, 100*run.TPOT, run.Latency, run.TTFT90, run.MeanNPUs, run.NPUHours, run.Changes)
		}
		fmt.Fprintln(t)
	}
	header := "BAR\tWANTED\t\tFIGURES\n"
	for _, x := range r.Reports {
		for _, b := range x.Bars {
			fmt.Fprint(t, header)
			header = ""
			verdict := "missed"
			if b.Met {
				verdict = "met"
			}
			fmt.Fprintf(t, "%s, %s\t%s\t%s\t%s\n", b.Scenario, b.What, b.Want, verdict, b.Figures)
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "\nsimulated, not measured; NPUs as %s (%s); means of %d runs with seeds from %d\n", r.Profile, r.Source, r.Seeds, r.Seed)
	return err
}

// draw draws a scenario: the load, NPUs by role under the scaler, NPUs of all ways, and their attainment over time.
func (c *Autoscale) draw(r *autoscaling.Report, profile string) error {
	width := r.Scenario.Window()
	panel := func(title, unit string) *plot.Plot {
		p := plot.New()
		p.Title.Text, p.Y.Label.Text, p.X.Label.Text = title, unit, "seconds"
		p.Y.Min = 0
		p.Legend.Top, p.Legend.Left = true, true
		p.Add(plotter.NewGrid())
		return p
	}
	add := func(p *plot.Plot, k int, name string, points []autoscaling.Point, of func(*autoscaling.Point) float64) {
		var xy plotter.XYs
		for i := range points {
			if y := of(&points[i]); y >= 0 {
				xy = append(xy, plotter.XY{X: points[i].Second, Y: y})
			}
		}
		if len(xy) == 0 {
			return
		}
		line := lineOf(xy)
		line.Color, line.Dashes = plotutil.Color(k), plotutil.Dashes(k)
		p.Add(line)
		if name != "" {
			p.Legend.Add(name, line)
		}
	}
	ours := r.Ours().Series(r.Scenario, width)
	arrivals := panel(fmt.Sprintf("%s, simulated with NPUs as %s", r.Name, profile), "requests a second")
	add(arrivals, 0, "", ours, func(p *autoscaling.Point) float64 { return p.Arrivals })
	roles := panel("", "NPUs by role, trireme")
	for s := range autoscale.Stages {
		add(roles, s, autoscale.Stage(s).String(), ours, func(p *autoscaling.Point) float64 { return p.NPUs[s] })
	}
	held, attained := panel("", "NPUs in use"), panel("", "requests within targets, %")
	attained.Y.Max = 105
	for k, run := range r.Runs {
		points := run.Series(r.Scenario, width)
		name := run.By
		if strings.Contains(name, "static") {
			name += " " + run.Topology
		}
		add(held, k, name, points, func(p *autoscaling.Point) float64 { return p.Held })
		add(attained, k, "", points, func(p *autoscaling.Point) float64 { return 100 * p.Attainment })
	}
	roles.Y.Max, held.Y.Max = 1.4*roles.Y.Max, 1.8*held.Y.Max // room for their legends
	ext := filepath.Ext(c.Plot)
	path := strings.TrimSuffix(c.Plot, ext) + "-" + r.Name + ext
	if err := drawRows(path, []*plot.Plot{arrivals, roles, held, attained}); err != nil {
		_ = os.Remove(path)
		return fmt.Errorf("plotting to %s: %w", path, err)
	}
	return nil
}
