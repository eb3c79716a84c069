package benchcmd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"trireme.dev/services/gateway"
	"trireme.dev/services/trireme/autoscaling"
	"trireme.dev/services/trireme/load"
	"trireme.dev/shared/conf"
	"trireme.dev/shared/npu/pace"
	"trireme.dev/shared/obs"
	"trireme.dev/shared/plan"
	"trireme.dev/shared/sched"
)

// Plan is `trireme plan`.
type Plan struct {
	NPUs    int     `name:"npus" help:"NPUs that there are; with --rate the most that may be used. 0: 8, with --rate 64." placeholder:"N"`
	Rate    float64 `help:"Look for the fewest NPUs that keep this many requests a second within targets, instead of for the greatest rate." placeholder:"N"`
	Profile string  `help:"What NPUs take: ${profiles}, or a file FILE.yaml." default:"distserve-opt-13b-a100" placeholder:"NAME"`

	SLO        string  `name:"slo" help:"Targets of requests: time to the first token, waiting included, and between tokens." default:"ttft:1.4s,tpot:40ms" placeholder:"TARGETS"`
	Percentile float64 `help:"Percent of the requests that are to keep both." default:"90" placeholder:"P"`

	Prompt      load.Span     `help:"Tokens of text of a request." default:"20-60" placeholder:"N-M"`
	Pictures    load.Span     `help:"Pictures of a request." default:"2" placeholder:"N-M"`
	Size        load.Size     `help:"Size of pictures." default:"256x256" placeholder:"WxH"`
	Output      load.Span     `help:"Tokens of an answer." default:"50-150" placeholder:"N-M"`
	Trace       string        `help:"Instead: requests of a file, as bench serve writes with --result, or lines with a time in seconds and, if you have them, tokens of text, tokens of the answer and pictures." placeholder:"FILE" type:"path"`
	FromRunning time.Duration `help:"Instead: what the gateways of a running system say that came in this time." placeholder:"DURATION"`
	NATSURL     string        `name:"nats-url" help:"NATS of the running system." default:"nats://127.0.0.1:4222"`

	Roles      []string `help:"Kinds of instances that topologies are made of. By default all that there are, and where that makes too many topologies those in which each stage has NPUs of one kind." placeholder:"E,P,D,EP,PD,EPD" env:"-"`
	Widths     []int    `help:"NPUs of an instance. By default the fewest whose memory the model fits into: the profile knows no gain of wide instances." placeholder:"N,N"`
	Rows       []int    `help:"Budgets of a step to try: most prompt tokens (--rows of prefill and stage)." default:"512" placeholder:"N,N"`
	StepTokens []int    `help:"Likewise, of a step with prompts beside decoding (--step-tokens of stage)." default:"128,64,256" placeholder:"N,N"`
	Beside     []string `help:"Topologies to show beside the best. By default the one with all roles on all NPUs." placeholder:"TOPOLOGY"`
	Random     int      `help:"Show the mean of this many topologies chosen by chance besides." placeholder:"N"`
	Top        int      `help:"Topologies to show." default:"5" placeholder:"N"`

	Seed  uint64 `help:"The same seed gives the same answer." default:"1"`
	Seeds int    `help:"Seeds by which the best are judged: their spread says which differences count." default:"5"`
	JSON  bool   `name:"json" help:"Write one JSON object instead of a table."`
	Plot  string `help:"Draw attainment over rate of the best, and goodput over the split of NPUs; the ending is .svg or .png." placeholder:"FILE" type:"path"`

	Validate bool          `help:"Then run the best one, the last and one between on real fleets of NPUs that are paced as the profile says, and print what the simulator says of the same requests beside it."`
	Real     time.Duration `help:"Time that each load of --validate is sent for." default:"40s"`
}

// Help is shown by `trireme plan --help`.
func (Plan) Help() string {
	return `Looks for the topology that serves a load best: how many instances of which roles, with how many NPUs, and the budgets of their steps.
Best is goodput: the greatest rate at which 90% of the requests keep both targets. Every topology is bounded by arithmetic, those that may be
better than the best so far are simulated with the services' own scheduling code, and the best are judged with other seeds than they were
found by. Everything is simulated, nothing is measured here; --validate does. Ctrl-C ends with what is known.

Not simulated: caches of prompts and pictures, faults, what a processor does beside NPUs but for a constant, copies between memory domains
unless the profile has their rate, and what NPUs of one instance tell one another.

Examples:
  trireme plan                                                      eight A100s with a 13B model, two pictures a request
  trireme plan --npus 16 --pictures 1-4 --output 100-500 --slo ttft:2s,tpot:50ms
  trireme plan --rate 12 --pictures 1                               the fewest NPUs for 12 requests a second
  trireme plan --profile mine.yaml --plot plan.svg --json
  trireme plan --trace result.json --pictures 1                     what trireme bench serve --result result.json has sent
  trireme plan --from-running 1m                                    what comes to the system that runs here
  trireme plan --npus 4 --roles E,P,D,EPD --beside 2E1P1D --validate`
}

// Limits of a plan.
const (
	planLength = 60 * time.Second // of each simulation,
	planLeast  = 200              // with so many requests at least
	planMost   = 3000             // and at most
	planSeeds  = 3                // by which topologies are found
	mostMixed  = 5000             // topologies, beyond which mixtures are left out
)

// Run searches and prints.
func (c *Plan) Run(e Env) error {
	s, err := c.study(e)
	if err != nil {
		return err
	}
	stopped := s.search()
	s.end()
	if len(s.report.rows) == 0 || stopped != nil && !errors.Is(stopped, context.Canceled) {
		return cmp.Or(stopped, s.none())
	}
	s.fill(stopped != nil)
	if stopped == nil && c.Plot != "" {
		stopped = s.draw(c.Plot)
	}
	if stopped == nil && c.Validate {
		stopped = c.validate(e, s)
	}
	return errors.Join(stopped, write(e.Out, c.JSON, s.report))
}

// planStudy is a plan that is being made.
type planStudy struct {
	*Plan
	profile *pace.Profile
	targets sched.Targets
	load    *planned
	planner *plan.Planner
	visual  int // tokens of a picture
	next    func(string)
	end     func()
	report  *PlanReport
	random  []plan.Row
}

// study checks the flags, and works out what is bounded by arithmetic.
func (c *Plan) study(e Env) (*planStudy, error) {
	usage := func(format string, args ...any) error {
		return fmt.Errorf("%w%w", fmt.Errorf(format, args...), ErrUsage)
	}
	s := &planStudy{Plan: c}
	var err error
	if s.profile, err = pace.Load(c.Profile); err != nil {
		return nil, fmt.Errorf("--profile: %w", err)
	}
	if s.targets, err = gateway.ParseTargets(c.SLO); err != nil {
		return nil, usage("--slo: %w", err)
	}
	if s.targets.TTFT <= 0 || s.targets.TPOT <= 0 {
		return nil, usage("--slo %s: goodput takes both targets, as in ttft:2s,tpot:50ms", c.SLO)
	}
	if c.NPUs == 0 {
		if c.NPUs = 8; c.Rate > 0 {
			c.NPUs = 64
		}
	}
	switch ext := strings.ToLower(filepath.Ext(c.Plot)); {
	case c.NPUs < 1 || c.NPUs > 256:
		return nil, usage("--npus 1 to 256")
	case c.Rate < 0 || c.Rate > 5000:
		return nil, usage("--rate above 0 and at most 5000")
	case !(c.Percentile > 0 && c.Percentile < 100):
		return nil, usage("--percentile above 0 and below 100")
	case c.Prompt.Min < 1 || c.Output.Min < 1:
		return nil, usage("--prompt and --output have at least one token")
	case c.Seeds < 2 || c.Seeds > 50 || c.Top < 1 || c.Top > 50 || c.Random < 0 || c.Random > 1000:
		return nil, usage("--seeds 2 to 50 (one tells nothing about the next), --top 1 to 50, --random up to 1000")
	case c.Trace != "" && c.FromRunning > 0:
		return nil, usage("--trace or --from-running: one load is planned for")
	case c.FromRunning < 0 || c.FromRunning > time.Hour || c.Real < time.Second || c.Real > time.Hour:
		return nil, usage("--from-running up to 1h, --real 1s to 1h")
	case c.Validate && (c.Trace != "" || c.FromRunning > 0):
		return nil, usage("--validate sends loads that flags describe: leave out --trace and --from-running")
	case c.Plot != "" && ext != ".svg" && ext != ".png":
		return nil, usage("--plot %s: its name must end in .svg or .png", c.Plot)
	}
	if s.visual, err = pictureTokens(c.Size); err != nil {
		return nil, err
	}
	s.load = kindOf(c.Pictures, c.Prompt, c.Output, s.visual)
	switch {
	case c.Trace != "":
		s.load, err = readRequests(c.Trace, s.load, c.Pictures, s.visual)
	case c.FromRunning > 0:
		fmt.Fprintf(e.Err, "listening to %s for %v\n", c.NATSURL, c.FromRunning)
		s.load, err = running(e.Context, c.NATSURL, c.FromRunning)
	}
	if err != nil {
		return nil, err
	}
	kinds := c.Roles
	if kinds == nil {
		if kinds = []string{"E", "P", "D", "EP", "PD", "EPD"}; !s.load.pictures {
			kinds = []string{"P", "D", "PD"}
		}
	}
	if all := strings.Join(kinds, ""); s.load.pictures && !strings.Contains(all, "E") {
		return nil, usage("--roles %s: nobody encodes the pictures", strings.Join(kinds, ","))
	}
	s.next, s.end = progress(e.Err, -1)
	problem := plan.Problem{
		Costs: autoscaling.Costs{Profile: s.profile}, Room: s.profile.Memory.Room, Targets: s.targets, Part: c.Percentile / 100,
		Load: s.load.draw, Length: planLength, Least: planLeast, Most: planMost, Fleet: autoscaling.Host(), Each: onAllCores,
		Space: plan.Space{Families: plan.Mixed(kinds...), Widths: c.Widths, Rows: c.Rows, Steps: c.StepTokens, Most: mostMixed},
		Step: func(what string) error {
			s.next(what)
			return e.Context.Err()
		},
	}
	for k := range uint64(planSeeds) {
		problem.Seeds = append(problem.Seeds, c.Seed+k)
	}
	for k := range uint64(c.Seeds) {
		problem.Judges = append(problem.Judges, c.Seed+1000+k)
	}
	if s.planner, err = plan.New(problem); err != nil {
		return nil, fmt.Errorf("%w%w", err, ErrUsage)
	}
	s.report = &PlanReport{
		Version: obs.Version(), Simulated: true, Profile: s.profile.Name, Source: s.profile.Source, Load: s.load.what,
		TTFT: s.targets.TTFT.Seconds(), TPOT: s.targets.TPOT.Seconds(), Percentile: c.Percentile, Rate: c.Rate, NPUs: c.NPUs, Seed: c.Seed, Seeds: c.Seeds,
	}
	return s, nil
}

// onAllCores is plan's parallel loop.
func onAllCores(n int, do func(i int)) {
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	for i := range n {
		g.Go(func() error {
			do(i)
			return nil
		})
	}
	_ = g.Wait()
}

// search finds and judges. What it knows is in the report also when an error ends it.
func (s *planStudy) search() (err error) {
	var best []plan.Found
	if s.Rate > 0 {
		best, err = s.planner.Fewest(s.Top, plan.Place(s.Rate), s.NPUs)
	} else {
		best, err = s.planner.Best(s.NPUs, s.Top, -1)
	}
	s.report.found, s.report.rows = best, plan.Unjudged(best)
	if err != nil || len(best) == 0 {
		return err
	}
	beside, err := s.beside(best)
	if err != nil {
		return err
	}
	if s.Random > 0 {
		random, err := s.planner.Random(best[0].NPUs(), s.Random, s.Seed)
		if err == nil {
			s.random, err = s.planner.Judge(random)
		}
		if err != nil {
			return err
		}
	}
	rows, err := s.planner.Judge(append(best, beside...))
	if err == nil {
		s.report.rows = rows
	}
	return err
}

// beside are topologies that are shown whether they are among the best or not.
func (s *planStudy) beside(best []plan.Found) ([]plan.Found, error) {
	var all []conf.Topology
	add := func(t conf.Topology) {
		if !slices.ContainsFunc(best, func(f plan.Found) bool { return f.Topology.String() == t.String() }) {
			all = append(all, t)
		}
	}
	if s.Beside == nil {
		roles := "EPD"
		if !s.load.pictures {
			roles = "PD"
		}
		if t := (conf.Topology{Groups: []conf.Group{{Count: best[0].NPUs(), Roles: roles, NPUs: 1}}}); s.planner.Fits(t) == nil {
			add(t)
		}
	}
	for _, text := range s.Beside {
		t, err := conf.ParseTopology(text)
		if err == nil {
			t = plan.Canonical(t)
			err = s.planner.Fits(t)
		}
		if err != nil {
			return nil, fmt.Errorf("--beside: %w%w", err, ErrUsage)
		}
		add(t)
	}
	found, err := s.planner.Measure(all)
	if err != nil {
		return nil, fmt.Errorf("--beside: %w", err)
	}
	return found, nil
}
