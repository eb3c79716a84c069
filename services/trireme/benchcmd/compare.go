package benchcmd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"trireme.dev/models"
	"trireme.dev/services/trireme/compare"
	"trireme.dev/services/trireme/load"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/conf"
	"trireme.dev/shared/imageprep"
	"trireme.dev/shared/kernel"
	"trireme.dev/shared/npu/pace"
	"trireme.dev/shared/obs"
)

// Compare is `trireme bench compare`.
type Compare struct {
	NPUs       int           `name:"npus" help:"NPUs of each topology." default:"8"`
	Topologies []string      `help:"Topologies, of that many NPUs each; by default some with all roles together, with decoding apart, and with encoding apart." placeholder:"TOPOLOGY"`
	Pace       string        `help:"Profile of the NPUs: ${profiles}, or a file FILE.yaml." default:"epd-minicpm-a100" placeholder:"NAME"`
	Pictures   []load.Span   `help:"Workloads, by the pictures of a request." default:"0,1,4" placeholder:"N-M"`
	Size       load.Size     `help:"Size of pictures." default:"256x256" placeholder:"WxH"`
	Words      load.Span     `help:"Words of a question." default:"8-24" placeholder:"N-M"`
	Output     load.Span     `help:"Tokens of an answer." default:"16" placeholder:"N-M"`
	Rates      []float64     `help:"Requests a second; by default parts of what the profile's NPUs could do at best, in each workload." placeholder:"N"`
	Repeats    int           `help:"How often everything is run: how far repeats differ says which differences count." default:"2"`
	Time       time.Duration `help:"Time for all of it." default:"12m"`
	Send       time.Duration `help:"Time that each run sends for; by default what --time allows." placeholder:"DURATION"`
	Goodput    []string      `help:"Bounds of a good request in milliseconds; by default twice what the profile says for a request alone, and a little for the rest." placeholder:"ttft:MS,tpot:MS"`
	JSON       bool          `name:"json" help:"Write one JSON object instead of tables."`
	CSV        string        `name:"csv" help:"Write all runs to a file besides, after each topology." placeholder:"FILE" type:"path"`
	Plot       string        `help:"Draw attainment against rate, a file for each workload; the ending is .svg or .png." placeholder:"FILE" type:"path"`
}

// Help is shown by `trireme bench compare --help`.
func (Compare) Help() string {
	return `Runs the same loads on topologies of equal NPU count and says when it pays that pictures are encoded on NPUs of their own: EPD
disaggregation (arXiv:2501.05460) helps where encoding is long beside the rest, and costs where it leaves NPUs idle. NPUs are
paced, so that many of them behave as such on a few cores: figures are the profile's. A topology's rate is the highest up to
which 90% of requests keep the bounds. Everything is repeated, with other arrivals and the topologies in the opposite order, and
only differences beyond the spread of repeats count. --time bounds it; after a rate at which less than half of the requests keep
the bounds higher ones are left out.

Examples:
  trireme bench compare
  trireme bench compare --topologies 8EPD,5E2P1D --pictures 1,2,4,8,1-16 --time 20m --plot compare.svg
  trireme bench compare --npus 4 --rates 1,2,4 --goodput ttft:2000,tpot:60 --csv runs.csv --json`
}

// Limits of a run, and the time that others take beside it.
const (
	leastRun    = 3 * time.Second // of sending
	leastSent   = 8               // requests
	startTime   = 6 * time.Second // to start and end a fleet of 8, on two cores
	drainTime   = 3 * time.Second // to warm up, and from the last request to the last answer
	mostRate    = 12              // requests a second that are tried without being asked for: the host computes, too
	compareWarm = 2               // requests
)

// comparison is what Run has worked out before it starts.
type comparison struct {
	compare.Study
	profile *pace.Profile
	rates   [][]float64 // by workload
	goodput []load.Goodput
	sending time.Duration // of a run
}

// CompareReport is what Compare writes with --json.
type CompareReport struct {
	Version string  `json:"version"`
	Paced   string  `json:"paced"`  // the profile: figures are of its NPUs
	Source  string  `json:"source"` // of the profile
	NPUs    int     `json:"npus"`
	Seconds float64 `json:"seconds_per_run"`
	// Kept is the part of the profile's rate that the host achieved, in the worst fleet: busy / (busy + behind).
	Kept     float64                       `json:"pace_kept"`
	Rule     string                        `json:"rule"`
	Findings []compare.Finding             `json:"findings"`
	Rates    map[string][]compare.Capacity `json:"capacities"` // by pictures
	compare.Study
}

// Run measures and prints.
func (c *Compare) Run(e Env) error {
	s, err := c.plan()
	if err != nil {
		return err
	}
	runs := 0
	for _, rates := range s.rates {
		runs += len(rates) * len(s.Topologies) * s.Repeats
	}
	fmt.Fprintf(e.Err, "%d runs of %.0f s (%d topologies, %d workloads, %d repeats), NPUs paced as %s: about %v\n",
		runs, s.sending.Seconds(), len(s.Topologies), len(s.Workloads), s.Repeats, s.profile.Name, c.takes(s, s.sending).Round(time.Second))
	next, end := progress(e.Err, runs)
	defer end()
	kept := 1.0
	for repeat := range s.Repeats {
		topologies := slices.Clone(s.Topologies)
		if repeat%2 == 1 { // what changes slowly on the machine does not favour one of them
			slices.Reverse(topologies)
		}
		for _, t := range topologies {
			k, err := c.fleet(e, s, t, repeat, next)
			if c.CSV != "" && len(s.Runs) > 0 { // after each topology: it takes long, and may be stopped
				err = errors.Join(err, s.WriteCSV(c.CSV))
			}
			if err != nil {
				return fmt.Errorf("%s: %w", t, err)
			}
			kept = min(kept, k)
		}
	}
	end()
	return c.report(e, s, kept)
}

// plan checks the flags and works out what is run.
func (c *Compare) plan() (*comparison, error) {
	s := &comparison{Study: compare.Study{Topologies: c.Topologies, Repeats: c.Repeats}}
	var err error
	if s.profile, err = pace.Load(c.Pace); err != nil {
		return nil, fmt.Errorf("--pace: %w", err)
	}
	if c.NPUs < 2 || c.NPUs > 64 || c.Repeats < 2 || c.Repeats > 20 || len(c.Pictures) == 0 {
		return nil, fmt.Errorf("--npus 2 to 64, --repeats 2 to 20 (one tells nothing about the next), --pictures at least one%w", ErrUsage)
	}
	if len(s.Topologies) == 0 {
		s.Topologies = sweep(c.NPUs)
	}
	for i, text := range s.Topologies {
		t, err := conf.ParseTopology(text)
		if err != nil {
			return nil, fmt.Errorf("--topologies: %w%w", err, ErrUsage)
		}
		if s.Topologies[i] = t.String(); t.NPUs() != c.NPUs {
			return nil, fmt.Errorf("--topologies: %s has %d NPUs, --npus says %d: only equal numbers can be compared%w", t, t.NPUs(), c.NPUs, ErrUsage)
		}
	}
	given, err := load.ParseGoodput(c.Goodput)
	if err != nil {
		return nil, fmt.Errorf("--goodput: %w%w", err, ErrUsage)
	}
	tokens, err := pictureTokens(c.Size)
	if err != nil {
		return nil, err
	}
	for _, p := range c.Pictures {
		name, _ := p.MarshalText()
		w := compare.Workload{Pictures: string(name)}
		pictures := mean(p)
		prompt := 2*mean(c.Words) + 16 // about; what it really was is known afterwards
		w.Encode, w.Prefill = costs(s.profile, pictures, tokens, prompt)
		step := millis(int64(s.profile.Cost(kernel.Work{Decoding: 1})))
		g := given
		if given.None() {
			g = load.Goodput{TTFT: math.Ceil(2*(w.Encode+w.Prefill) + step + hostAllowance), TPOT: math.Ceil(1.5*step + hostAllowance/25)}
		}
		w.TTFTBound, w.TPOTBound = g.TTFT, g.TPOT
		s.goodput = append(s.goodput, g)
		s.Workloads = append(s.Workloads, w)
		rates := slices.Sorted(slices.Values(c.Rates))
		if len(rates) == 0 {
			// Decoding steps are shared by some sequences: how many depends on the topology, and this only chooses rates.
			best := float64(c.NPUs) * 1e3 / (w.Encode + w.Prefill + mean(c.Output)*step/8)
			for _, part := range []float64{0.4, 0.7, 1} {
				rates = append(rates, math.Round(100*part*min(best, mostRate))/100)
			}
		}
		if rates[0] <= 0 {
			return nil, fmt.Errorf("--rates must be above 0%w", ErrUsage)
		}
		s.rates = append(s.rates, slices.Compact(rates))
	}
	if c.Send > 0 {
		s.sending = c.Send
		return s, nil
	}
	if least := c.takes(s, leastRun); least > c.Time {
		return nil, fmt.Errorf("--time %v is too little, runs of %v take about %v: give it that, or fewer topologies, workloads, rates or repeats%w",
			c.Time, leastRun, least.Round(time.Second), ErrUsage)
	}
	for s.sending = leastRun; c.takes(s, s.sending+time.Second) <= c.Time; {
		s.sending += time.Second
	}
	return s, nil
}

// takes is about how long all of it takes with runs that send for so long.
func (c *Compare) takes(s *comparison, sending time.Duration) time.Duration {
	fleets := time.Duration(len(s.Topologies) * s.Repeats)
	all := fleets * startTime
	for _, rates := range s.rates {
		for _, rate := range rates {
			least := time.Duration(leastSent / rate * float64(time.Second))
			all += fleets * (max(sending, least) + drainTime)
		}
	}
	return all
}

// hostAllowance is what the default bound of TTFT gives for all that is not the NPU's and not paced, in milliseconds.
const hostAllowance = 250

// sweep is the default topologies of so many NPUs: all roles together, decoding apart, and encoding apart, each with more and with
// fewer NPUs before decoding.
func sweep(npus int) []string {
	share := func(eighths int) int { return max(1, npus*eighths/8) }
	var all []string
	add := func(format string, counts ...any) {
		for _, n := range counts {
			if n.(int) < 1 {
				return
			}
		}
		if t := fmt.Sprintf(format, counts...); !slices.Contains(all, t) {
			all = append(all, t)
		}
	}
	add("%dEPD", npus)
	add("%dEP%dD", share(2), npus-share(2))
	add("%dE%dP%dD", npus-share(2)-share(1), share(2), share(1))
	add("%dE%dP%dD", share(1), share(3), npus-share(1)-share(3))
	return all
}

func mean(s load.Span) float64 { return float64(s.Min+s.Max) / 2 }

// costs are the milliseconds that a request's pictures and its prompt take NPUs.
func costs(p *pace.Profile, pictures float64, each int, text float64) (encode, prefill float64) {
	encode = pictures * millis(int64(p.Cost(kernel.Work{Tokens: each, Parts: 1})))
	visual := pictures * float64(each)
	prompt := visual + text
	prefill = millis(int64(p.Cost(kernel.Work{Prompt: int(prompt), Visual: int(visual), Pairs: int(prompt * prompt / 2)})))
	return encode, prefill
}

// pictureTokens is how many tokens the bundled model makes of a picture of a size.
func pictureTokens(size load.Size) (int, error) {
	dir, err := os.MkdirTemp("", "trireme-bench-")
	if err != nil {
		return 0, fmt.Errorf("a folder for the model: %w", err)
	}
	defer os.RemoveAll(dir)
	model, err := models.Unpack(dir)
	if err != nil {
		return 0, err
	}
	prep, err := imageprep.LoadConfig(model)
	if err != nil {
		return 0, err
	}
	grid, err := prep.Grid(size.W, size.H)
	if err != nil {
		return 0, fmt.Errorf("--size: %w%w", err, ErrUsage)
	}
	return grid.Tokens(prep.MergeSize), nil
}

// fleet runs all workloads at all rates on one topology, once, and returns how well its pace was kept.
func (c *Compare) fleet(e Env, s *comparison, topology string, repeat int, next func(string)) (kept float64, err error) {
	err = onFleet(e, topology, c.Pace, []string{"--mm-cache", "0", "--kv-cache", "0"}, func(f *fleet) error {
		for i := range s.Workloads {
			hopeless := false
			for n, rate := range s.rates[i] {
				next(fmt.Sprintf("repeat %d, %s, %s pictures, %.3g/s", repeat+1, topology, s.Workloads[i].Pictures, rate))
				if hopeless {
					continue
				}
				r, err := c.one(f, s, i, rate, uint64(1000*repeat+n))
				if err != nil {
					return fmt.Errorf("requests of %s pictures at %.3g/s: %w", s.Workloads[i].Pictures, rate, err)
				}
				attained := r.Attainment(s.goodput[i])
				s.Runs = append(s.Runs, compare.Run{
					Topology: topology, Workload: i, Rate: rate, Repeat: repeat, Requests: len(r.Samples), Failed: r.Failed,
					Attainment: attained, TTFT: r.TTFT.Median, TTFT99: r.TTFT.P99, TPOT: r.TPOT.Mean,
				})
				hopeless = attained < compare.Hopeless
			}
		}
		kept, err = f.kept()
		return err
	})
	return kept, err
}

// one runs one load.
func (c *Compare) one(f *fleet, s *comparison, workload int, rate float64, seed uint64) (*load.Report, error) {
	arrivals, err := load.ParseArrivals("poisson", rate)
	if err != nil {
		return nil, fmt.Errorf("%w%w", err, ErrUsage)
	}
	g := s.goodput[workload]
	answer := time.Duration((4*g.TTFT + 4*g.TPOT*float64(c.Output.Max) + 4*g.E2EL) * float64(time.Millisecond))
	return load.Run(f.ctx, load.Config{
		URL: f.url, Model: models.Default, Requests: max(leastSent, int(math.Ceil(rate*s.sending.Seconds()))), Warmup: compareWarm,
		Arrivals: arrivals, Seed: seed, Timeout: max(answer, 10*time.Second), // what is later than that is not good anyway
		Shape: load.Shape{Words: c.Words, Output: c.Output, Pictures: c.Pictures[workload], Sizes: []load.Size{c.Size}},
	})
}

// kept is the part of the profile's rate that the instances of a paced fleet have achieved so far, all together.
func (f *fleet) kept() (float64, error) {
	busy, behind, err := f.paced()
	if err == nil && busy == 0 {
		err = errors.New("the NPUs of the fleet do not tell how busy they were")
	}
	return busy.Seconds() / (busy + behind).Seconds(), err
}

// paced asks the instances of a paced fleet for how long their NPUs were busy by the profile so far, and were behind it, all together. Heartbeats say
// it, too, but as it was a second ago, which of a short load is before it.
func (f *fleet) paced() (busy, behind time.Duration, err error) {
	b, err := bus.Connect(f.ctx, f.nats, "bench", slog.New(slog.DiscardHandler))
	if err != nil {
		return 0, 0, err
	}
	defer b.Close()
	ctx, cancel := context.WithTimeout(f.ctx, stopping)
	defer cancel()
	instances, err := b.Instances(ctx)
	if err != nil {
		return 0, 0, err
	}
	stats, err := b.Stats(ctx, instances.All())
	if err != nil {
		return 0, 0, err
	}
	for _, s := range stats {
		if s.Work != nil {
			busy, behind = busy+s.Work.PacedBusy, behind+s.Work.PacedBehind
		}
	}
	return busy, behind, nil
}

// report writes what came of it.
func (c *Compare) report(e Env, s *comparison, kept float64) error {
	findings := s.Findings()
	r := &CompareReport{
		Version: obs.Version(), Paced: s.profile.Name, Source: s.profile.Source, NPUs: c.NPUs, Seconds: s.sending.Seconds(), Kept: kept,
		Rule: compare.Rule(findings), Findings: findings, Rates: map[string][]compare.Capacity{}, Study: s.Study,
	}
	for i, w := range s.Workloads {
		r.Rates[w.Pictures] = s.Capacities(i)
	}
	var errs []error
	if c.Plot != "" {
		ext := filepath.Ext(c.Plot)
		for i, w := range s.Workloads {
			title := fmt.Sprintf("%s pictures, TTFT %.0f ms, TPOT %.0f ms, NPUs paced as %s", w.Pictures, w.TTFTBound, w.TPOTBound, s.profile.Name)
			errs = append(errs, load.Plot(strings.TrimSuffix(c.Plot, ext)+"-"+w.Pictures+ext, title, load.Goal, s.Curves(i)))
		}
	}
	return errors.Join(append(errs, write(e.Out, c.JSON, r))...)
}
