package benchcmd

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"trireme.dev/shared/plan"
	"trireme.dev/shared/sched/simulate"
)

// PlanReport is what Plan writes with --json.
type PlanReport struct {
	Version    string  `json:"version"`
	Simulated  bool    `json:"simulated"` // always
	Complete   bool    `json:"complete"`  // the search was not stopped
	Profile    string  `json:"profile"`   // whose NPUs these are
	Source     string  `json:"source"`    // of the profile
	Load       string  `json:"load"`
	TTFT       float64 `json:"ttft_target_s"`
	TPOT       float64 `json:"tpot_target_s"`
	Percentile float64 `json:"percentile"`
	NPUs       int     `json:"npus"` // that are used
	Rate       float64 `json:"rate,omitempty"`
	Seed       uint64  `json:"seed"`
	Seeds      int     `json:"seeds"`

	Topologies  int      `json:"topologies"`  // of so many NPUs
	Apart       bool     `json:"apart"`       // of these, mixtures of kinds of instances were left out as too many
	Tried       int      `json:"tried"`       // topologies that were simulated, of any number of NPUs; of the others arithmetic says that they are no better
	Unfit       int      `json:"unfit"`       // kinds of instances for which there is no memory
	Simulations int      `json:"simulations"` // runs
	Best        []Choice `json:"best"`
	// RandomMean is the mean goodput of RandomOf topologies chosen by chance.
	RandomOf   int         `json:"random_of,omitempty"`
	RandomMean float64     `json:"random_mean_requests_per_s,omitempty"`
	Worth      float64     `json:"best_to_random,omitempty"` // goodput of the best that was found, to that
	Validated  []planCheck `json:"validated,omitempty"`
	Kept       float64     `json:"pace_kept,omitempty"` // of the profile's rate, in the worst fleet of those

	found []plan.Found
	rows  []plan.Row
}

// Choice is a topology, and what it does at its goodput.
type Choice struct {
	Topology   string        `json:"topology"`
	Rows       int           `json:"rows"`
	StepTokens int           `json:"step_tokens"`
	Command    string        `json:"command"`
	Judged     bool          `json:"judged"` // by other seeds than it was found by
	Goodput    float64       `json:"goodput_requests_per_s"`
	Each       []float64     `json:"goodput_by_seed"`
	Alike      bool          `json:"no_difference"` // from the one with the greatest mean, itself included: that is not better with every seed
	Limit      string        `json:"limited_by,omitempty"`
	Detail     *ChoiceDetail `json:"at_goodput,omitempty"`
}

// ChoiceDetail is what happens at a rate.
type ChoiceDetail struct {
	Rate       float64            `json:"requests_per_s"`
	Attainment float64            `json:"attainment"`
	TTFT       [3]float64         `json:"ttft_p50_p90_p99_s"`
	TPOT       [3]float64         `json:"tpot_p50_p90_p99_s"`
	Busy       map[string]float64 `json:"busy"` // by roles
}

// fill makes the report of what was found.
func (s *planStudy) fill(stopped bool) {
	r := s.report
	r.Complete, r.Tried, r.Unfit, r.Simulations = !stopped, s.planner.Tried, s.planner.Unfit, s.planner.Runs
	r.NPUs = r.rows[0].NPUs()
	r.Topologies, r.Apart = len(s.planner.Topologies(r.NPUs)), s.planner.Narrowed(r.NPUs)
	for i := range r.rows {
		x := &r.rows[i]
		c := Choice{
			Topology: x.Topology.String(), Rows: x.Rows, StepTokens: x.Steps, Command: command(x.Config), Judged: len(x.Each) > 1,
			Goodput: x.Mean(), Each: x.Each, Alike: x.Alike,
		}
		if c.Judged && x.Pooled >= 0 {
			c.Limit = limited(x)
			d := &ChoiceDetail{Rate: x.Detail.Rate, Attainment: x.Detail.Attainment, TTFT: x.Detail.TTFT, TPOT: x.Detail.TPOT, Busy: map[string]float64{}}
			for _, b := range x.Detail.Busy {
				d.Busy[b.Roles] = b.Part
			}
			c.Detail = d
		}
		r.Best = append(r.Best, c)
	}
	for i := range s.random {
		r.RandomOf++
		r.RandomMean += s.random[i].Mean() / float64(len(s.random))
	}
	for i := range r.rows { // the first that was found: those beside may be of other kinds
		if x := &r.rows[i]; r.RandomMean > 0 && slices.ContainsFunc(r.found, func(f plan.Found) bool { return f.Topology.String() == x.Topology.String() }) {
			r.Worth = x.Mean() / r.RandomMean
			break
		}
	}
}

// command starts a topology with its budgets.
func command(c plan.Config) string {
	text := ""
	if c.Rows != simulate.Rows {
		text += fmt.Sprintf("TRIREME_ROWS=%d ", c.Rows)
	}
	if mixes(c) && c.Steps != simulate.StepTokens {
		text += fmt.Sprintf("TRIREME_STEP_TOKENS=%d ", c.Steps)
	}
	return text + "trireme up --topology " + c.Topology.String()
}

// mixes reports whether an instance of a topology computes prompts beside decoding.
func mixes(c plan.Config) bool {
	for _, g := range c.Groups {
		if strings.Contains(g.Roles, "PD") {
			return true
		}
	}
	return false
}

// limited says what keeps a topology from more.
func limited(x *plan.Row) string {
	late := "first tokens late"
	if x.LateTPOT > x.LateTTFT {
		late = "next tokens late"
	}
	if x.Limit == plan.None {
		return late
	}
	return x.Limit.String() + ", " + late
}

// none is that nothing serves the load.
func (s *planStudy) none() error {
	if s.Rate > 0 {
		return fmt.Errorf("no topology of up to %d NPUs keeps %g requests a second within %s: allow more with --npus, or looser targets", s.NPUs, s.Rate, s.SLO)
	}
	return fmt.Errorf("no topology of %d NPUs keeps %s at any rate: they are too strict for the profile, or NPUs too few or too small", s.NPUs, s.SLO)
}

func (r *PlanReport) writeTable(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintf(w, "SIMULATED: %d NPUs as %s; %s\n%.0f%% of requests within TTFT %.3g s and TPOT %.3g ms\n\n", r.NPUs, r.Profile, r.Load, r.Percentile, r.TTFT, 1e3*r.TPOT)
	fmt.Fprintln(t, "\tTOPOLOGY\tBUDGETS\tGOODPUT/s\tSEEDS\tTTFT P50 s\tP90\tP99\tTPOT P50 ms\tP90\tCOMPUTES\tLIMITED BY")
	for i, c := range r.Best {
		mark := fmt.Sprint(i + 1)
		if c.Alike && i > 0 {
			mark = "="
		}
		budgets := fmt.Sprint(c.Rows)
		if strings.Contains(c.Topology, "PD") {
			budgets += fmt.Sprintf("/%d", c.StepTokens)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%.3g\t", mark, c.Topology, budgets, c.Goodput)
		if !c.Judged {
			fmt.Fprintln(t, "-\t-\t-\t-\t-\t-\t-\tnot judged by other seeds")
			continue
		}
		if c.Detail == nil {
			fmt.Fprintln(t, "-\t-\t-\t-\t-\t-\t-\tkeeps the targets at no rate")
			continue
		}
		x, d := &r.rows[i], c.Detail
		var busy []string
		for _, b := range x.Detail.Busy {
			busy = append(busy, fmt.Sprintf("%s %.0f%%", b.Roles, 100*b.Part))
		}
		fmt.Fprintf(t, "%.3g-%.3g\t%.2f\t%.2f\t%.2f\t%.1f\t%.1f\t%s\t%s\n", x.Low(), x.High(), d.TTFT[0], d.TTFT[1], d.TTFT[2], 1e3*d.TPOT[0], 1e3*d.TPOT[1],
			strings.Join(busy, ", "), c.Limit)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	var b strings.Builder
	fmt.Fprint(&b, "\n= no difference from 1 that is there with every seed; of those the one with the fewest kinds of instances is 1. BUDGETS: --rows, and --step-tokens where prompts are beside decoding.\n")
	fmt.Fprint(&b, "COMPUTES: part of the time; an NPU that decodes computes also for one sequence. LIMITED BY: the stage that would help most if it were faster, 10% above.\n")
	what := fmt.Sprintf("%d topologies of %d NPUs; %d were simulated, in %d runs, of the others arithmetic says that they are no better than the last of the best.", r.Topologies, r.NPUs, r.Tried, r.Simulations)
	if !r.Complete {
		what = fmt.Sprintf("STOPPED: %d topologies were simulated, and better ones may not have been.", r.Tried)
	}
	fmt.Fprintln(&b, what)
	if r.Apart {
		fmt.Fprintln(&b, "Topologies in which a stage has NPUs of several kinds were too many, and are left out: name fewer with --roles.")
	}
	if r.Unfit > 0 {
		fmt.Fprintf(&b, "%d kinds of instances are left out: there is no memory for weights and the longest request.\n", r.Unfit)
	}
	if r.RandomOf > 0 {
		fmt.Fprintf(&b, "%d topologies by chance: %.3g requests a second on average; the best that was found does %.2g times that.\n", r.RandomOf, r.RandomMean, r.Worth)
	}
	fmt.Fprintf(&b, "Simulated, not measured; NPUs as %s (%s). Not simulated: caches, faults, the host but for a constant, exchange between NPUs of an instance.\n", r.Profile, r.Source)
	fmt.Fprintf(&b, "\nRun it:  %s\n", r.Best[0].Command)
	_, err := io.WriteString(w, b.String())
	if err == nil && len(r.Validated) > 0 {
		err = r.writeValidated(w)
	}
	return err
}
