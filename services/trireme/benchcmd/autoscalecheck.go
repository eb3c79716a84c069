package benchcmd

import (
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"trireme.dev/models"
	"trireme.dev/services/trireme/autoscaling"
	"trireme.dev/services/trireme/load"
	"trireme.dev/shared/npu/pace"
	"trireme.dev/shared/obs"
	"trireme.dev/shared/sched/simulate"
)

// checked are the fleets and loads that the simulator is compared with: pictures on NPUs of their own, in one wide instance and with all
// roles together, and text, each below and near what the fleet can do. Requests are few enough for two cores.
var checked = []struct {
	topology string
	pictures int
	output   load.Span
	rate     float64
}{
	{"2E1P1D", 1, load.Span{Min: 16, Max: 48}, 2},
	{"2E1P1D", 1, load.Span{Min: 16, Max: 48}, 4},
	{"1Ex2,1P,1D", 2, load.Span{Min: 16, Max: 48}, 1.5},
	{"4EPD", 1, load.Span{Min: 16, Max: 48}, 4},
	{"1E1P1D", 0, load.Span{Min: 32, Max: 96}, 6},
}

// CheckReport is what Autoscale writes with --validate.
type CheckReport struct {
	Version string  `json:"version"`
	Profile string  `json:"profile"`
	Kept    float64 `json:"pace_kept"` // of the profile's rate, in the worst fleet
	Runs    []check `json:"runs"`
}

type check struct {
	Topology  string            `json:"topology"`
	Pictures  int               `json:"pictures"`
	Rate      float64           `json:"rate"`
	Requests  int               `json:"requests"`
	Real      *autoscaling.Felt `json:"real"`
	Simulated *autoscaling.Felt `json:"simulated"`
	Kept      float64           `json:"pace_kept"`
}

// validate runs loads on real fleets of paced NPUs and simulates the same requests, at the times at which they were sent.
func (c *Autoscale) validate(e Env, profile *pace.Profile) error {
	r := &CheckReport{Version: obs.Version(), Profile: profile.Name, Kept: 1}
	next, end := progress(e.Err, len(checked))
	defer end()
	lab := &autoscaling.Lab{Profile: profile, Seeds: []uint64{c.Seed}}
	for _, x := range checked {
		next(fmt.Sprintf("%s, %d pictures, %g/s", x.topology, x.pictures, x.rate))
		arrivals, err := load.ParseArrivals("poisson", x.rate)
		if err != nil {
			return err
		}
		k := check{Topology: x.topology, Pictures: x.pictures, Rate: x.rate}
		err = onFleet(e, x.topology, c.Pace, []string{"--mm-cache", "0", "--kv-cache", "0"}, func(f *fleet) error {
			report, err := load.Run(f.ctx, load.Config{
				URL: f.url, Model: models.Default, Requests: int(x.rate * c.Real.Seconds()), Warmup: compareWarm, Arrivals: arrivals, Seed: c.Seed,
				Timeout: 2 * time.Minute,
				Shape: load.Shape{
					Words: load.Span{Min: 8, Max: 24}, Output: x.output, Pictures: load.Span{Min: x.pictures, Max: x.pictures}, Sizes: []load.Size{{W: 256, H: 256}},
				},
			})
			if err != nil {
				return err
			}
			if report.Failed > 0 || len(report.Samples) == 0 {
				return fmt.Errorf("%d of %d requests failed", report.Failed, len(report.Samples))
			}
			var all []simulate.Request
			k.Real, all = felt(report, func(*load.Sample) int { return x.pictures }, picture256)
			k.Requests = len(all)
			if k.Simulated, err = lab.Replay(x.topology, all); err != nil {
				return err
			}
			k.Kept, err = f.kept()
			return err
		})
		if err != nil {
			return fmt.Errorf("%s: %w", x.topology, err)
		}
		r.Runs, r.Kept = append(r.Runs, k), min(r.Kept, k.Kept)
	}
	end()
	return write(e.Out, c.JSON, r)
}

// picture256 is the multimodal tokens of a picture of 256 x 256 with the bundled model.
const picture256 = 64

// pair is a figure that was measured, the same one simulated, and how far that is off.
func pair(real, simulated float64) string {
	return fmt.Sprintf("%.1f\t%.1f\t%+.1f%%", real, simulated, 100*(simulated-real)/real)
}

func (r *CheckReport) writeTable(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "TOPOLOGY\tPICTURES\tREQUESTS/S\tREQUESTS\tTTFT ms REAL\tSIMULATED\t\tP90 REAL\tSIMULATED\t\tTPOT ms REAL\tSIMULATED\t\tTOKENS/s REAL\tSIMULATED\t\tPACE KEPT")
	for _, k := range r.Runs {
		fmt.Fprintf(t, "%s\t%d\t%g\t%d\t%s\t%s\t%s\t%s\t%.1f%%\n", k.Topology, k.Pictures, k.Rate, k.Requests, pair(k.Real.TTFT, k.Simulated.TTFT),
			pair(k.Real.TTFT90, k.Simulated.TTFT90), pair(k.Real.TPOT, k.Simulated.TPOT), pair(k.Real.Tokens, k.Simulated.Tokens), 100*k.Kept)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "real: `trireme up` with NPUs paced as %s, in real time; simulated: the same requests at the same times\n", r.Profile)
	if err == nil && r.Kept < leastKept {
		_, err = fmt.Fprintln(w, "This machine was too slow or too busy for the profile: what is real is its own in part.")
	}
	return err
}
