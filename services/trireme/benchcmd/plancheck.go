package benchcmd

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"text/tabwriter"
	"time"

	"trireme.dev/models"
	"trireme.dev/services/trireme/autoscaling"
	"trireme.dev/services/trireme/load"
	"trireme.dev/shared/plan"
	"trireme.dev/shared/sched/simulate"
)

// planCheck is a load on a real fleet, and what is simulated of the same requests.
type planCheck struct {
	Topology  string            `json:"topology"`
	Rate      float64           `json:"rate"`
	Requests  int               `json:"requests"`
	Real      *autoscaling.Felt `json:"real"`
	Simulated *autoscaling.Felt `json:"simulated"`
	RealIn    float64           `json:"real_attainment"`
	SimIn     float64           `json:"simulated_attainment"`
	Kept      float64           `json:"pace_kept"`
}

// checkedRates are those at which a fleet is run, to the goodput that is simulated.
var checkedRates = []float64{0.8, 1.25}

// validate runs the best topology, the last and one between on real fleets of paced NPUs, each below its goodput and above.
func (c *Plan) validate(e Env, s *planStudy) error {
	rows := slices.DeleteFunc(slices.Clone(s.report.rows), func(r plan.Row) bool { return r.Pooled < 0 })
	if len(rows) > 3 {
		rows = []plan.Row{rows[0], rows[len(rows)/2], rows[len(rows)-1]}
	}
	next, end := progress(e.Err, len(rows)*len(checkedRates))
	defer end()
	s.report.Kept = 1
	for _, row := range rows {
		args, done, err := settings(row.Config)
		if err != nil {
			return err
		}
		err = onFleet(e, row.Topology.String(), c.Profile, append(args, "--mm-cache", "0", "--kv-cache", "0"), func(f *fleet) error {
			for _, part := range checkedRates {
				rate := part * plan.Rate(row.Pooled)
				next(fmt.Sprintf("%s, %.3g/s", row.Topology, rate))
				k, err := c.check(f, s, row.Config, rate)
				if err != nil {
					return err
				}
				s.report.Validated = append(s.report.Validated, *k)
				s.report.Kept = min(s.report.Kept, k.Kept)
			}
			return nil
		})
		done()
		if err != nil {
			return fmt.Errorf("%s: %w", row.Topology, err)
		}
	}
	return nil
}

// settings are a file with budgets, as arguments.
func settings(c plan.Config) (args []string, done func(), err error) {
	dir, err := os.MkdirTemp("", "trireme-plan-")
	if err != nil {
		return nil, nil, fmt.Errorf("a folder for settings: %w", err)
	}
	file := filepath.Join(dir, "settings.yaml")
	text := fmt.Sprintf("prefill:\n  rows: %d\nstage:\n  rows: %d\n  step-tokens: %d\n", c.Rows, c.Rows, c.Steps)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("writing settings: %w", err), os.RemoveAll(dir))
	}
	return []string{"--config", file}, func() { _ = os.RemoveAll(dir) }, nil
}

// check sends a load to a fleet, and simulates the same requests at the times at which they were sent.
func (c *Plan) check(f *fleet, s *planStudy, config plan.Config, rate float64) (*planCheck, error) {
	arrivals, err := load.ParseArrivals("poisson", rate)
	if err != nil {
		return nil, err
	}
	words := func(tokens int) int { return max(1, (tokens-template)/2) } // about: what it was is known afterwards
	shape := load.Shape{Words: load.Span{Min: words(c.Prompt.Min), Max: words(c.Prompt.Max)}, Output: c.Output, Pictures: c.Pictures, Sizes: []load.Size{c.Size}}
	busy, behind, err := f.paced()
	if err != nil {
		return nil, err
	}
	report, err := load.Run(f.ctx, load.Config{
		URL: f.url, Model: models.Default, Requests: max(leastSent, int(rate*c.Real.Seconds())), Warmup: compareWarm, Arrivals: arrivals, Seed: c.Seed,
		Timeout: 2 * time.Minute, Shape: shape,
	})
	if err != nil {
		return nil, err
	}
	busy2, behind2, err := f.paced()
	if err != nil {
		return nil, err
	}
	if report.Failed > 0 || len(report.Samples) == 0 {
		return nil, fmt.Errorf("%d of %d requests failed: %v", report.Failed, len(report.Samples), report.Failures(1))
	}
	k := &planCheck{Topology: config.Topology.String(), Rate: rate, Requests: len(report.Samples)}
	k.Kept = (busy2 - busy).Seconds() / (busy2 - busy + behind2 - behind).Seconds()
	targets := load.Goodput{TTFT: 1e3 * s.targets.TTFT.Seconds(), TPOT: 1e3 * s.targets.TPOT.Seconds()}
	k.RealIn = report.Attainment(targets)
	var all []simulate.Request
	k.Real, all = felt(report, func(x *load.Sample) int { return shape.PicturesOf(c.Seed, compareWarm+x.Number) }, s.visual)
	r, err := s.planner.Replay(config, all)
	if err != nil {
		return nil, err
	}
	k.Simulated = autoscaling.FeltOf(r)
	k.SimIn = 1 - float64(r.Missed)/float64(len(all))
	return k, nil
}

// template is about how many tokens the bundled model's chat template adds to a question, of which a word has two.
const template = 16

// felt is what clients felt of a run, and its requests as the simulator has them.
func felt(report *load.Report, pictures func(*load.Sample) int, visual int) (*autoscaling.Felt, []simulate.Request) {
	var all []simulate.Request
	f := autoscaling.NewFelt(len(report.Samples))
	for i := range report.Samples {
		x := &report.Samples[i]
		tpot, _ := x.TPOT()
		sent := x.Sent.Sub(report.Began)
		f.Add(sent, x.TTFT, tpot, x.E2EL, x.Output)
		all = append(all, simulate.Request{Arrive: max(0, sent), Pictures: pictures(x), Visual: visual, Prompt: x.Input, Output: x.Output})
	}
	slices.SortStableFunc(all, func(a, b simulate.Request) int { return cmp.Compare(a.Arrive, b.Arrive) })
	return f.End(), all
}

func (r *PlanReport) writeValidated(w io.Writer) error {
	fmt.Fprintf(w, "\nREAL: `trireme up` with NPUs paced as %s, in real time; SIM: the same requests at the same times, simulated\n", r.Profile)
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "TOPOLOGY\tREQUESTS/s\tREQUESTS\tWITHIN REAL\tSIM\tTTFT ms REAL\tSIM\t\tP90 REAL\tSIM\t\tTPOT ms REAL\tSIM\t\tPACE KEPT")
	for _, k := range r.Validated {
		fmt.Fprintf(t, "%s\t%.2f\t%d\t%.0f%%\t%.0f%%\t%s\t%s\t%s\t%.1f%%\n", k.Topology, k.Rate, k.Requests, 100*k.RealIn, 100*k.SimIn, pair(k.Real.TTFT, k.Simulated.TTFT),
			pair(k.Real.TTFT90, k.Simulated.TTFT90), pair(k.Real.TPOT, k.Simulated.TPOT), 100*k.Kept)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if r.Kept < leastKept {
		_, err := fmt.Fprintln(w, "This machine was too slow or too busy for the profile: what is real is its own in part.")
		return err
	}
	return nil
}
