package benchcmd

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"text/tabwriter"
	"time"

	"trireme.dev/models"
	"trireme.dev/services/trireme/autoscaling"
	"trireme.dev/services/trireme/load"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/npu/pace"
	"trireme.dev/shared/obs"
	"trireme.dev/shared/sched"
	"trireme.dev/shared/sched/simulate"
)

// The burst of --live: small enough for two cores, and over in five minutes with its comparison.
const (
	liveStart = "1Ex1,1Px1,1Dx1+4"
	liveRate  = 3.0 // requests a second of two pictures in the burst
)

var (
	liveKind    = simulate.Kind{Pictures: [2]int{2, 2}, Visual: picture256, Words: [2]int{20, 60}, Output: [2]int{16, 48}}
	liveTargets = sched.Targets{TTFT: 5100 * time.Millisecond, TPOT: 60 * time.Millisecond}
)

func livePhases() []simulate.Phase {
	phase := func(length time.Duration, rate float64) simulate.Phase {
		of, peak := simulate.Steady(rate)
		return simulate.Phase{Length: length, Rate: of, Peak: peak, Kind: liveKind}
	}
	return []simulate.Phase{phase(20*time.Second, liveRate/10), phase(50*time.Second, liveRate), phase(20*time.Second, liveRate/10)}
}

// LiveReport is what Autoscale writes with --live.
type LiveReport struct {
	Version string    `json:"version"`
	Profile string    `json:"profile"`
	Runs    []liveRun `json:"runs"`
}

type liveRun struct {
	By         string  `json:"by"`
	Topology   string  `json:"topology"`
	Real       bool    `json:"real"`
	Requests   int     `json:"requests"`
	Attainment float64 `json:"attainment"`
	TTFT       float64 `json:"mean_ttft_ms"`
	MeanNPUs   float64 `json:"mean_npus"`
	MostNPUs   int     `json:"most_npus"`
	Kept       float64 `json:"pace_kept,omitempty"`
}

// live runs a burst on a real fleet of paced NPUs with the real scaler, and on one of as many NPUs on average without; and simulates both.
func (c *Autoscale) live(e Env, profile *pace.Profile) error {
	r := &LiveReport{Version: obs.Version(), Profile: profile.Name}
	next, end := progress(e.Err, 2)
	defer end()
	requests, length := simulate.Draw(c.Seed, livePhases())
	dir, err := os.MkdirTemp("", "trireme-bench-")
	if err != nil {
		return fmt.Errorf("a folder for the load: %w", err)
	}
	defer os.RemoveAll(dir)
	times, policy := filepath.Join(dir, "times"), filepath.Join(dir, "scaler.yaml")
	err = toFile(times, func(w io.Writer) (err error) {
		for _, q := range requests {
			if _, err = fmt.Fprintf(w, "%.6f\n", q.Arrive.Seconds()); err != nil {
				break
			}
		}
		return err
	})
	if err == nil {
		err = toFile(policy, func(w io.Writer) error {
			_, err := fmt.Fprintf(w, "mode: auto\ntargets: {ttft: %v, tpot: %v}\n", liveTargets.TTFT, liveTargets.TPOT)
			return err
		})
	}
	if err != nil {
		return err
	}
	lab := &autoscaling.Lab{Profile: profile, Seeds: []uint64{c.Seed}}
	static := ""
	for _, scaled := range []bool{true, false} {
		run := liveRun{By: "static", Topology: static, Real: true}
		args := []string{"--mm-cache", "0", "--kv-cache", "0"}
		if scaled {
			run.By, run.Topology = "trireme", liveStart
			args = append(args, "--scaler", "auto", "--scaler-policy", policy)
		}
		next(run.By + " " + run.Topology)
		err := onFleet(e, run.Topology, c.Pace, args, func(f *fleet) error { return c.burst(f, &run, times, len(requests), length) })
		if err != nil {
			return fmt.Errorf("%s: %w", run.Topology, err)
		}
		r.Runs = append(r.Runs, run)
		x, err := lab.Burst(liveTargets, liveStart, run.Topology, livePhases, scaled)
		if err != nil {
			return err
		}
		r.Runs = append(r.Runs, liveRun{
			By: x.By, Topology: x.Topology, Requests: int(x.Requests), Attainment: x.Attainment, TTFT: 1e3 * x.MeanTTFT, MeanNPUs: x.MeanNPUs,
		})
		static = fmt.Sprintf("1Ex%d,1P,1D", max(1, int(run.MeanNPUs+0.99)-2))
	}
	end()
	return write(e.Out, c.JSON, r)
}

// burst sends the load to a fleet and counts its NPUs meanwhile.
func (c *Autoscale) burst(f *fleet, run *liveRun, times string, requests int, length time.Duration) error {
	arrivals, err := load.ParseArrivals("file:"+times, 0)
	if err != nil {
		return err
	}
	b, err := bus.Connect(f.ctx, f.nats, "bench", slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	defer b.Close()
	instances, err := b.Instances(f.ctx)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(f.ctx)
	counted := make(chan struct{})
	sum, looks := 0, 0
	go func() {
		defer close(counted)
		tick := time.NewTicker(500 * time.Millisecond)
		defer tick.Stop()
		begun := time.Now()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			if time.Since(begun) > length {
				continue
			}
			n := 0
			for _, i := range instances.All() {
				if i.Role != "gateway" {
					n += len(i.NPUs)
				}
			}
			sum, looks, run.MostNPUs = sum+n, looks+1, max(run.MostNPUs, n)
		}
	}()
	report, err := load.Run(f.ctx, load.Config{
		URL: f.url, Model: models.Default, Requests: requests, Arrivals: arrivals, Seed: c.Seed, Timeout: 5 * time.Minute,
		Shape: load.Shape{
			Words:  load.Span{Min: liveKind.Words[0], Max: liveKind.Words[1]},
			Output: load.Span{Min: liveKind.Output[0], Max: liveKind.Output[1]}, Pictures: load.Span{Min: 2, Max: 2}, Sizes: []load.Size{{W: 256, H: 256}},
		},
	})
	stop()
	<-counted
	if err != nil {
		return err
	}
	ms := func(d time.Duration) float64 { return 1e3 * d.Seconds() }
	run.Requests, run.TTFT = len(report.Samples), report.TTFT.Mean
	run.Attainment = report.Attainment(load.Goodput{TTFT: ms(liveTargets.TTFT), TPOT: ms(liveTargets.TPOT)})
	run.MeanNPUs = float64(sum) / float64(max(1, looks))
	run.Kept, err = f.kept()
	return err
}

func (r *LiveReport) writeTable(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "BY\tBEGINS AS\t\tREQUESTS\tWITHIN TARGETS\tMEAN TTFT ms\tMEAN NPUS\tPACE KEPT")
	for _, x := range r.Runs {
		what, kept := "simulated", "-"
		if x.Real {
			what, kept = "real", fmt.Sprintf("%.1f%%", 100*x.Kept)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%.1f%%\t%.0f\t%.2f\t%s\n", x.By, x.Topology, what, x.Requests, 100*x.Attainment, x.TTFT, x.MeanNPUs, kept)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "real: `trireme up --scaler auto` with NPUs paced as %s, in real time; ten times the load for 50 s\n", r.Profile)
	return err
}
