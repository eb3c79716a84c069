package benchcmd

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync/atomic"
	"time"

	"trireme.dev/services/trireme/load"
	"trireme.dev/services/trireme/scaling"
	"trireme.dev/shared/conf"
	"trireme.dev/shared/kernel"
	"trireme.dev/shared/npu/pace"
	"trireme.dev/shared/obs"
	"trireme.dev/shared/sched/placement"
	"trireme.dev/shared/wire"
)

// Scale is `trireme bench scale`.
type Scale struct {
	Change   string       `help:"What is changed: the number of NPUs (scale), the places of the experts on them (rebalance), or the role of an NPU, which a decoder of --from NPUs gets from a prefill instance, or gives to it (role)." default:"scale" enum:"scale,rebalance,role"`
	From     int          `help:"NPUs of the instance before." default:"3"`
	To       int          `help:"NPUs after." default:"4"`
	Strategy []string     `help:"Ways to get there: elastic, cold, extravagant, colocated, horizontal, standby, or all of these; no-remap, no-copy, no-standby, no-zero-copy, or all of these, and elastic: ablation." default:"all" placeholder:"NAME"`
	Pace     string       `help:"Profile of the NPUs: ${profiles}, or a file FILE.yaml; none: as fast as the host." default:"distserve-opt-13b-a100" placeholder:"NAME"`
	Bytes    conf.Bytes   `help:"Size of the experts of the made-up model." default:"4GiB" placeholder:"SIZE"`
	Domains  string       `help:"Memory domains of the NPUs: one for each (per-npu), between which weights are copied, or one for all (node)." default:"per-npu" enum:"node,per-npu"`
	CopyRate []conf.Bytes `help:"Bytes a second that may be copied between NPUs. With several, elastic is run at each; bars and all other ways are about the first." default:"1GiB" placeholder:"SIZE"`
	DiskRate conf.Bytes   `help:"Bytes a second that weights are read from disk; by default a fifth of --copy-rate." placeholder:"SIZE"`

	Rate     float64       `help:"Requests a second; by default half of what the profile's NPUs could do at best, before the change or after it, where they are fewer." placeholder:"N"`
	Arrivals string        `help:"How requests arrive: constant, poisson, gamma:B or bursts:N. Throughput of short times can be compared only as far as they come evenly." default:"constant" placeholder:"KIND"`
	Words    load.Span     `help:"Words of a question." default:"8-24" placeholder:"N-M"`
	Output   load.Span     `help:"Tokens of an answer." default:"64" placeholder:"N-M"`
	Window   time.Duration `help:"Shortest time that counts as the change, and as before and after it; these last as long as the change where that is foreseen to last longer. The load runs until it is steady before." default:"5s"`
	Longest  time.Duration `help:"A change that takes longer has failed." default:"5m"`
	Repeats  int           `help:"How often elastic is run." default:"1"`
	Others   int           `help:"How often each of the other ways is run, in turns with elastic." default:"1"`
	Goodput  []string      `help:"Bounds of a good request in milliseconds; by default four times what the profile says for a request alone, and a little for the rest." placeholder:"ttft:MS,tpot:MS"`
	Ready    bool          `help:"NPUs have the memory that a change takes from the start, as accelerators do; --no-ready: the HMM takes it from the system in the change." default:"true" negatable:""`
	JSON     bool          `name:"json" help:"Write one JSON object instead of tables."`
	Compare  bool          `help:"In the end, ask an instance that never changes the same, as fast as the host can, and compare the answers." default:"true" negatable:""`
	Keep     string        `help:"Folder in which the made-up model is kept and looked for; by default it is made each time, and removed." placeholder:"DIR" type:"path"`
	Save     string        `help:"Write the report as JSON there, after each run what is known by then." placeholder:"FILE" type:"path"`
	Plot     string        `help:"Draw throughput and token gaps around the change, a file for each run, and with several copy rates what they cost; the ending is .svg or .png." placeholder:"FILE" type:"path"`
}

// Help is shown by `trireme bench scale --help`.
func (Scale) Help() string {
	return `Changes the number of NPUs of an instance under an open load, in several ways, and prints what it cost those who were served:
the tables of ElasticMoE (arXiv:2510.02613) for this system. The ways are the paper's:

  elastic       trireme scale: in place, by copies between NPUs; in one memory domain experts are only mapped
  cold          stop the instance, start one with the new number of NPUs, read the weights from disk
  extravagant   start that one on NPUs of its own beside the old one, which is stopped when it is ready
  colocated     the same on the old one's NPUs, so that each has half its memory for sequences; that the two share the arithmetic too is not shown
  horizontal    start a second instance on the NPUs that are to be added; it has a copy of all weights
  standby       have a second instance that runs already, without NPUs, take those that are to be added (trireme scale), with a copy of all
                weights from the other one's; it is not one of the paper's, and elastic has no bar against it

For a role there are elastic (trireme role), cold (both instances stop, and start in their new sizes), extravagant and colocated (two
others beside them); for rebalance there is elastic only.

and what is left of elastic when one thing after the other is taken away:

  no-remap      experts that stay on an NPU are copied there, as if they had to be in one piece
  no-copy       and those that come to an NPU are read from disk, not copied from another one
  no-standby    and another process is started for the new layout, once the old one has left the NPUs; it maps what lies there, and
                reads the rest
  no-zero-copy  and maps nothing: each process has weights of its own, from disk; that is cold. Sequences go on from the KV that is there in all ways

Reading from disk is slowed down to --disk-rate where others need not read. The model is made up, but its answers are compared with those of
an instance that never changes. NPUs are paced, so that figures are the profile's as far as the host keeps up; then there are bars for elastic.
With --pace none the tables are the same, without bars. Ctrl-C ends it with what the runs so far say, and exit status 130. On the default model a run takes
half a minute or more on two cores, and the first one as long again to make the model, unless --keep has it.

Examples:
  trireme bench scale
  trireme bench scale --from 4 --to 2 --strategy elastic,cold
  trireme bench scale --strategy ablation
  trireme bench scale --change rebalance --from 4 --strategy elastic --repeats 9
  trireme bench scale --change role --from 2 --to 3
  trireme bench scale --strategy elastic --copy-rate 1GiB,512MiB,256MiB --plot curve.svg`
}

// ScaleReport is what Scale writes with --json.
type ScaleReport struct {
	Version  string            `json:"version"`
	Change   string            `json:"change"`
	Paced    string            `json:"paced,omitempty"` // the profile
	Domains  string            `json:"domains"`
	Bytes    int64             `json:"expert_bytes"`     // of the model
	CopyRate int64             `json:"copy_bytes_per_s"` // the first
	DiskRate int64             `json:"disk_bytes_per_s"`
	Rate     float64           `json:"requests_per_s"`
	Arrivals string            `json:"arrivals"`
	TTFT     float64           `json:"ttft_bound_ms,omitempty"`
	TPOT     float64           `json:"tpot_bound_ms,omitempty"`
	Planned  int               `json:"runs_planned"`               // more than there are Changes: the command was ended before, or a run failed
	Compared bool              `json:"answers_compared"`           // with those of an instance that does not change: else nobody knows of changed ones
	Changes  []scaling.Figures `json:"changes"`                    // each run
	Ways     []scaling.Summary `json:"ways"`                       // the same together
	Bars     []scaling.Bar     `json:"bars,omitempty"`             // of elastic, on paced NPUs
	Best     float64           `json:"faster_than_best,omitempty"` // of the other ways: of a change of the number of NPUs there is a bar for it
	Standby  float64           `json:"faster_than_standby,omitempty"`
}

// trial is one change under load, before it is worked out.
type trial struct {
	way    way
	rate   conf.Bytes // of copies
	report *load.Report
	event  scaling.Event
	memory []scaling.Memory
	ready  int64 // bytes of memory that each NPU had before
}

// Run measures and prints.
func (c *Scale) Run(e Env) error {
	ways, goodput, err := c.plan()
	if err != nil {
		return err
	}
	runs := c.runs(ways)
	next, end := progress(e.Err, len(runs)+2)
	defer end()
	next("making the model")
	model, err := newModel(c.Keep, int64(c.Bytes))
	if err != nil {
		return err
	}
	defer model.remove()
	var failed error
	done := 0
	for ; done < len(runs); done++ {
		t := &runs[done]
		next(fmt.Sprintf("%s at %v/s, run %d of %d", t.way.name, t.rate, done+1, len(runs)))
		if err := c.one(e, t, model.dir); err != nil {
			failed = fmt.Errorf("%s, run %d of %d: %w", t.way.name, done+1, len(runs), err)
			break
		}
		if c.Save != "" {
			if err := c.report(goodput, runs[:done+1], len(runs), nil).save(c.Save); err != nil {
				return err
			}
		}
	}
	var answers map[int]uint64
	if c.Compare && failed == nil {
		next("the same requests without a change")
		if answers, err = c.answers(e, model.dir, runs); err != nil {
			failed = fmt.Errorf("without a change: %w", err)
		}
	}
	end()
	if done == 0 {
		return failed
	}
	r := c.report(goodput, runs[:done], len(runs), answers)
	for _, t := range runs[:done] {
		for _, why := range t.report.Failures(3) {
			fmt.Fprintf(e.Err, "%s: failed %s\n", t.way.name, why)
		}
	}
	if c.Save != "" {
		failed = errors.Join(failed, r.save(c.Save))
	}
	if c.Plot != "" {
		failed = errors.Join(failed, c.draw(runs[:done], r))
	}
	return errors.Join(failed, write(e.Out, c.JSON, r))
}

// report works out what runs, of those that were planned, have shown. answers are nil where nobody was asked.
func (c *Scale) report(goodput load.Goodput, runs []trial, planned int, answers map[int]uint64) *ScaleReport {
	r := &ScaleReport{
		Version: obs.Version(), Change: c.Change, Paced: c.Pace, Domains: c.Domains, Bytes: int64(c.Bytes), CopyRate: int64(c.CopyRate[0]),
		DiskRate: int64(c.DiskRate), Rate: c.Rate, Arrivals: c.Arrivals, TTFT: goodput.TTFT, TPOT: goodput.TPOT,
		Planned: planned, Compared: answers != nil,
	}
	for _, t := range runs {
		f := scaling.Measure(t.report, t.event, goodput, t.memory, answers)
		f.Strategy, f.CopyRate, f.From, f.To = t.way.name, int64(t.rate), c.From, c.To
		f.Ready = t.ready
		r.Changes = append(r.Changes, f)
	}
	r.Ways = scaling.Summaries(r.Changes)
	if c.Pace != "" {
		r.Bars = scaling.Bars(r.Changes, r.CopyRate, r.Compared)
	}
	if speed, ok := scaling.Speed(r.Changes); ok {
		if r.Best = speed.Measured; c.Pace != "" && c.Change == wire.ChangeScale {
			r.Bars = append(r.Bars, speed)
		}
	}
	r.Standby = scaling.Faster(r.Changes, scaling.Standby)
	return r
}

// runs are what is to be run, in this order: the ways take turns.
func (c *Scale) runs(ways []way) (all []trial) {
	for i := range max(c.Repeats, c.Others) {
		for _, w := range ways {
			switch {
			case w.name != scaling.Elastic && i < c.Others:
				all = append(all, trial{way: w, rate: c.CopyRate[0]})
			case w.name == scaling.Elastic && i < c.Repeats:
				for _, rate := range c.CopyRate {
					all = append(all, trial{way: w, rate: rate})
				}
			}
		}
	}
	return all
}

// plan checks the flags and fills in what they leave open.
func (c *Scale) plan() ([]way, load.Goodput, error) {
	var none load.Goodput
	usage := func(format string, args ...any) ([]way, load.Goodput, error) {
		return nil, none, fmt.Errorf(format+"%w", append(args, ErrUsage)...)
	}
	most := min(placement.MaxNPUs, 64)
	switch c.Change {
	case wire.ChangeRebalance:
		c.To = c.From
	case wire.ChangeRole:
		if c.To-c.From != 1 && c.From-c.To != 1 {
			return usage("--change role --from %d --to %d: one NPU changes its role at a time", c.From, c.To)
		}
	}
	if c.From < 1 || c.To < 1 || c.From > most || c.To > most || (c.From == c.To) != (c.Change == wire.ChangeRebalance) {
		return usage("--from %d, --to %d: two different numbers of NPUs, 1 to %d", c.From, c.To, most)
	}
	if c.Change == wire.ChangeRebalance && c.From < 2 {
		return usage("--change rebalance --from %d: on one NPU there is nothing to balance", c.From)
	}
	if c.Bytes < 64<<20 || slices.Min(c.CopyRate) < 1<<20 || c.Repeats < 1 || c.Repeats > 100 || c.Others < 1 || c.Others > 100 || c.Window < time.Second {
		return usage("--bytes at least 64MiB, --copy-rate 1MiB, --window 1s, --repeats and --others 1 to 100")
	}
	if c.DiskRate == 0 {
		c.DiskRate = c.CopyRate[0] / 5
	}
	ways, err := choose(c.Strategy, c.Change, c.From, c.To)
	if err != nil {
		return nil, none, err
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
		c.Rate = 0.5 * float64(min(c.From, c.To)) * 1e3 / (prefill + mean(c.Output)*step/8)
	}
	if goodput.None() {
		goodput = load.Goodput{TTFT: 4*(prefill+step) + hostAllowance, TPOT: 2*step + hostAllowance/25}
	}
	return ways, goodput, nil
}

// config is the load of a run that sends until stop is closed.
func (c *Scale) config(url string, stop <-chan struct{}) (load.Config, error) {
	arrivals, err := load.ParseArrivals(c.Arrivals, c.Rate)
	if err != nil {
		return load.Config{}, fmt.Errorf("--rate, --arrivals: %w%w", err, ErrUsage)
	}
	longest := 2*c.Longest + 4*c.Window
	return load.Config{
		URL: url, Model: modelName, Requests: max(1, int(c.Rate*longest.Seconds())), Warmup: 2, Arrivals: arrivals, Seed: 1,
		Shape: load.Shape{Words: c.Words, Output: c.Output}, Timeout: c.Longest, Stop: stop,
	}, nil
}

// foreseen is how long a change takes at a copy rate, roughly.
func (c *Scale) foreseen(rate conf.Bytes) time.Duration {
	bytes := float64(c.Bytes) * math.Abs(float64(c.To-c.From)) / float64(max(c.From, c.To))
	return max(c.Window, time.Duration(1.3*bytes/float64(rate)*float64(time.Second)))
}

// one runs one way once.
func (c *Scale) one(e Env, t *trial, model string) error {
	return onSite(e, c, t.way, t.rate, model, func(s *site) (err error) {
		t.ready = s.ready
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
		var longest atomic.Int64 // of the answers so far
		cfg.Begun = func() { close(begun) }
		cfg.Ended = func(s *load.Sample) { longest.Store(max(longest.Load(), int64(s.E2EL))) }
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
			// As many requests are open as always when those are gone that came to an empty system, and those that came with them.
			for began := time.Now(); longest.Load() == 0 || time.Since(began) < 2*time.Duration(longest.Load()); {
				if err := s.sleep(50 * time.Millisecond); err != nil {
					return err
				}
			}
			t.event.Steady, t.event.Window = time.Now(), c.Window
			if err := s.sleep(c.foreseen(t.rate)); err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(s.ctx, c.Longest)
			defer cancel()
			t.event.Command = time.Now()
			d, err := t.way.change(ctx, s)
			if err != nil {
				return fmt.Errorf("changing from %d to %d NPUs: %w", c.From, c.To, err)
			}
			t.event.Full = time.Now().Add(-d.release)
			t.event.Parts, t.event.Moved, t.event.Warm = d.parts, d.moved, d.warm
			return s.sleep(max(0, c.Window-time.Since(t.event.Command)) + c.Window)
		}
		err = change()
		close(stop)
		l := <-loaded
		t.report, t.memory = l.report, watch()
		return errors.Join(err, l.err)
	})
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
	err := onSite(e, &still, way{name: "none"}, c.CopyRate[0], model, func(s *site) error {
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
