package benchcmd

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"trireme.dev/services/trireme/load"
	"trireme.dev/services/trireme/scaling"
	"trireme.dev/shared/conf"
	"trireme.dev/shared/kernel"
	"trireme.dev/shared/npu/pace"
	"trireme.dev/shared/obs"
	"trireme.dev/shared/sched/placement"
)

// Scale is `trireme bench scale`.
type Scale struct {
	From     int        `help:"NPUs of the instance before." default:"3"`
	To       int        `help:"NPUs after." default:"4"`
	Strategy []string   `help:"Ways to get there: elastic, cold, extravagant, colocated, horizontal, or all." default:"all" placeholder:"NAME"`
	Pace     string     `help:"Profile of the NPUs: ${profiles}, or a file FILE.yaml; none: as fast as the host." default:"distserve-opt-13b-a100" placeholder:"NAME"`
	Bytes    conf.Bytes `help:"Size of the experts of the made-up model." default:"4GiB" placeholder:"SIZE"`
	Domains  string     `help:"Memory domains of the NPUs: one for each (per-npu), between which weights are copied, or one for all (node)." default:"per-npu" enum:"node,per-npu"`
	CopyRate conf.Bytes `help:"Bytes a second that may be copied between NPUs." default:"1GiB" placeholder:"SIZE"`
	DiskRate conf.Bytes `help:"Bytes a second that weights are read from disk; by default a fifth of --copy-rate." placeholder:"SIZE"`

	Rate    float64       `help:"Requests a second; by default half of what the profile's NPUs could do at best before the change." placeholder:"N"`
	Words   load.Span     `help:"Words of a question." default:"8-24" placeholder:"N-M"`
	Output  load.Span     `help:"Tokens of an answer." default:"48-96" placeholder:"N-M"`
	Before  time.Duration `help:"Time of load before the change." default:"10s"`
	After   time.Duration `help:"And after it." default:"10s"`
	Longest time.Duration `help:"A change that takes longer has failed." default:"5m"`
	Repeats int           `help:"How often each way is run, in turns." default:"1"`
	Goodput []string      `help:"Bounds of a good request in milliseconds; by default four times what the profile says for a request alone, and a little for the rest." placeholder:"ttft:MS,tpot:MS"`
	JSON    bool          `name:"json" help:"Write one JSON object instead of tables."`
	Plot    string        `help:"Draw throughput and token gaps around the change, a file for each way; the ending is .svg or .png." placeholder:"FILE" type:"path"`
}

// Help is shown by `trireme bench scale --help`.
func (Scale) Help() string {
	return `Changes the number of NPUs of an instance under an open load, in several ways, and prints what it cost those who were served:
the tables of ElasticMoE (arXiv:2510.02613) for this system. The ways are the paper's:

  elastic      trireme scale: in place, by copies between NPUs; in one memory domain experts are only mapped
  cold         stop the instance, start one with the new number of NPUs, read the weights from disk
  extravagant  start that one on NPUs of its own beside the old one, which is stopped when it is ready
  colocated    the same on the old one's NPUs, so that each has half its memory for sequences; that the two share the arithmetic too is not shown
  horizontal   start a second instance on the NPUs that are to be added; it has a copy of all weights

Only elastic uses weights that are there; for the others reading from disk is slowed down to --disk-rate. The model is made up, but its answers are
compared with those of an instance that never changes. NPUs are paced, so that figures are the profile's as far as the host keeps up.

Examples:
  trireme bench scale
  trireme bench scale --from 4 --to 2 --strategy elastic,cold
  trireme bench scale --strategy elastic --copy-rate 256MiB --repeats 9 --plot gaps.svg`
}

// ScaleReport is what Scale writes with --json.
type ScaleReport struct {
	Version  string            `json:"version"`
	Paced    string            `json:"paced,omitempty"` // the profile
	Domains  string            `json:"domains"`
	Bytes    int64             `json:"expert_bytes"` // of the model
	CopyRate int64             `json:"copy_bytes_per_s"`
	DiskRate int64             `json:"disk_bytes_per_s"`
	Rate     float64           `json:"requests_per_s"`
	TTFT     float64           `json:"ttft_bound_ms,omitempty"`
	TPOT     float64           `json:"tpot_bound_ms,omitempty"`
	Changes  []scaling.Figures `json:"changes"`
}

// trial is one change under load, before it is worked out.
type trial struct {
	way    way
	report *load.Report
	event  scaling.Event
	memory []scaling.Memory
}

// Run measures and prints.
func (c *Scale) Run(e Env) error {
	ways, goodput, err := c.plan()
	if err != nil {
		return err
	}
	next, end := progress(e.Err, len(ways)*c.Repeats+2)
	defer end()
	next("making the model")
	model, err := newModel(int64(c.Bytes))
	if err != nil {
		return err
	}
	defer model.remove()
	var trials []trial
	for i := range c.Repeats {
		for _, w := range ways {
			next(fmt.Sprintf("%s, run %d of %d", w.name, i+1, c.Repeats))
			t, err := c.one(e, w, model.dir)
			if err != nil {
				return fmt.Errorf("%s: %w", w.name, err)
			}
			trials = append(trials, *t)
		}
	}
	next("the same requests without a change")
	answers, err := c.answers(e, model.dir, trials)
	if err != nil {
		return fmt.Errorf("without a change: %w", err)
	}
	end()
	r := &ScaleReport{
		Version: obs.Version(), Paced: c.Pace, Domains: c.Domains, Bytes: int64(c.Bytes), CopyRate: int64(c.CopyRate), DiskRate: int64(c.DiskRate),
		Rate: c.Rate, TTFT: goodput.TTFT, TPOT: goodput.TPOT,
	}
	for _, t := range trials {
		f := scaling.Measure(t.report, t.event, goodput, t.memory, answers)
		f.Strategy, f.From, f.To = t.way.name, c.From, c.To
		r.Changes = append(r.Changes, f)
		for _, why := range t.report.Failures(3) {
			fmt.Fprintf(e.Err, "%s: failed %s\n", t.way.name, why)
		}
	}
	if c.Plot != "" {
		if err := c.draw(trials); err != nil {
			return err
		}
	}
	return write(e.Out, c.JSON, r)
}

// plan checks the flags and fills in what they leave open.
func (c *Scale) plan() ([]way, load.Goodput, error) {
	var none load.Goodput
	usage := func(format string, args ...any) ([]way, load.Goodput, error) {
		return nil, none, fmt.Errorf(format+": %w", append(args, ErrUsage)...)
	}
	most := min(placement.MaxNPUs, 64)
	if c.From < 1 || c.To < 1 || c.From > most || c.To > most || c.From == c.To {
		return usage("--from %d, --to %d: two different numbers of NPUs, 1 to %d", c.From, c.To, most)
	}
	if c.Bytes < 64<<20 || c.CopyRate < 1<<20 || c.Repeats < 1 || c.Repeats > 100 || c.Before < time.Second || c.After < time.Second {
		return usage("--bytes at least 64MiB, --copy-rate 1MiB, --before and --after 1s, --repeats 1 to 100")
	}
	if c.DiskRate == 0 {
		c.DiskRate = c.CopyRate / 5
	}
	var ways []way
	for _, name := range c.Strategy {
		if name == "all" {
			for _, w := range allWays {
				if w.fits(c.From, c.To) {
					ways = append(ways, w)
				}
			}
			continue
		}
		i := slices.IndexFunc(allWays, func(w way) bool { return w.name == name })
		if i < 0 {
			return usage("--strategy %s: there are elastic, cold, extravagant, colocated, horizontal and all", name)
		}
		if !allWays[i].fits(c.From, c.To) {
			return usage("--strategy %s: it only adds NPUs, and --to %d is below --from %d", name, c.To, c.From)
		}
		ways = append(ways, allWays[i])
	}
	goodput, err := load.ParseGoodput(c.Goodput)
	if err != nil {
		return usage("--goodput: %w", err)
	}
	if c.Pace == "none" {
		c.Pace = ""
	}
	if c.Pace == "" {
		if c.Rate <= 0 {
			return usage("--rate: how much the host's own NPUs can do nobody knows beforehand")
		}
		return ways, goodput, nil
	}
	p, err := pace.Load(c.Pace)
	if err != nil {
		return nil, none, fmt.Errorf("--pace: %w", err)
	}
	_, prefill := costs(p, 0, 0, 2*mean(c.Words)+16)
	step := millis(int64(p.Cost(kernel.Work{Decoding: 1})))
	if c.Rate == 0 {
		// Sequences share the steps of an NPU: with eight at a time it is busy, and far from full.
		c.Rate = 0.5 * float64(c.From) * 1e3 / (prefill + mean(c.Output)*step/8)
	}
	if goodput.None() {
		goodput = load.Goodput{TTFT: 4*(prefill+step) + hostAllowance, TPOT: 2*step + hostAllowance/25}
	}
	return ways, goodput, nil
}

// config is the load of a run that sends until stop is closed.
func (c *Scale) config(url string, stop <-chan struct{}) (load.Config, error) {
	arrivals, err := load.ParseArrivals("poisson", c.Rate)
	if err != nil {
		return load.Config{}, fmt.Errorf("--rate: %w: %w", err, ErrUsage)
	}
	longest := c.Before + c.Longest + c.After
	return load.Config{
		URL: url, Model: modelName, Requests: max(1, int(c.Rate*longest.Seconds())), Warmup: 2, Arrivals: arrivals, Seed: 1,
		Shape: load.Shape{Words: c.Words, Output: c.Output}, Timeout: c.Longest, Stop: stop,
	}, nil
}

// one runs one way once.
func (c *Scale) one(e Env, w way, model string) (*trial, error) {
	t := &trial{way: w}
	err := onSite(e, c, w, model, func(s *site) (err error) {
		stop := make(chan struct{})
		cfg, err := c.config(s.url, stop)
		if err != nil {
			return err
		}
		type sent struct {
			report *load.Report
			err    error
		}
		loaded, begun := make(chan sent, 1), make(chan struct{})
		cfg.Begun = func() { close(begun) }
		go func() {
			r, err := load.Run(s.ctx, cfg)
			loaded <- sent{r, err}
		}()
		watch := s.watchMemory()
		change := func() error {
			select {
			case <-begun:
			case l := <-loaded:
				loaded <- l
				return errors.New("the load ended before the change")
			}
			if err := s.sleep(c.Before); err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(s.ctx, c.Longest)
			defer cancel()
			t.event.Command = time.Now()
			parts, err := w.change(ctx, s)
			if err != nil {
				return fmt.Errorf("changing from %d to %d NPUs: %w", c.From, c.To, err)
			}
			t.event.Full, t.event.Parts = time.Now(), parts
			return s.sleep(c.After)
		}
		err = change()
		close(stop)
		l := <-loaded
		t.report, t.memory = l.report, watch()
		return errors.Join(err, l.err)
	})
	return t, err
}

// answers asks all that was asked an instance that stays as it is, as fast as it can.
func (c *Scale) answers(e Env, model string, trials []trial) (map[int]uint64, error) {
	most := 0
	for _, t := range trials {
		for i := range t.report.Samples {
			most = max(most, t.report.Samples[i].Number)
		}
	}
	still := *c
	still.Pace = ""
	answers := map[int]uint64{}
	err := onSite(e, &still, way{name: "none"}, model, func(s *site) error {
		cfg, err := c.config(s.url, nil)
		if err != nil {
			return err
		}
		cfg.Arrivals, cfg.Concurrency, cfg.Requests = nil, 16, most+1 // what a request says depends on its number only
		r, err := load.Run(s.ctx, cfg)
		if err != nil {
			return err
		}
		for i := range r.Samples {
			x := &r.Samples[i]
			if x.Err != nil && !errors.Is(x.Err, load.ErrEmpty) { // a made-up model may well say nothing that can be shown
				return fmt.Errorf("request %d: %w", x.Number, x.Err)
			}
			answers[x.Number] = x.Said
		}
		return nil
	})
	return answers, err
}
