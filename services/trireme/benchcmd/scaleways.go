package benchcmd

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"trireme.dev/services/trireme/scaling"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/hf"
	elasticsched "trireme.dev/shared/sched/elastic"
	"trireme.dev/shared/sched/placement"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/wire"
)

// way is a way to change an instance.
type way struct {
	name     string
	ablation bool     // it is elastic with less
	adds     bool     // it can only add NPUs
	places   bool     // it can place experts anew, too
	roles    bool     // it can change roles, too
	frees    bool     // what an instance leaves any other may have at once: NPUs are kept for no name
	apart    bool     // the new instance has other NPUs than the old one
	shares   bool     // and these have half of their memory, to stand for the same ones with two copies of the weights
	unlike   []string // flags of the instance that is to change
	standby  bool     // a second instance without NPUs is there
	disk     bool     // and that it reads at the disk's rate what it does without
	// change makes it, and returns when all of the new capacity serves, with what the way has to tell of itself.
	change func(context.Context, *site) (done, error)
}

// done is what a way tells of a change.
type done struct {
	parts   map[string]float64
	moved   int64         // bytes of weights
	warm    time.Duration // a first step of it
	release time.Duration // behind full capacity, and before the change was said to be done
}

func (w *way) fits(change string, from, to int) bool {
	switch change {
	case wire.ChangeRebalance:
		return w.places
	case wire.ChangeRole:
		return w.roles
	}
	return !w.adds || to > from
}

// allWays are those of ElasticMoE (arXiv:2510.02613, section 7.1), and those of its ablation (tables 1 and 3), each of which lacks what those before
// it lack, too.
var allWays = []way{
	{name: scaling.Elastic, places: true, roles: true, change: elastic},
	{name: "no-remap", ablation: true, unlike: []string{"--without=remap"}, change: elastic},
	{name: "no-copy", ablation: true, unlike: []string{"--without=remap,copies"}, disk: true, change: elastic},
	{name: "no-standby", ablation: true, change: restart},
	{name: "no-zero-copy", ablation: true, change: cold},
	{name: "cold", roles: true, frees: true, change: cold},
	{name: "extravagant", roles: true, apart: true, change: beside},
	{name: "colocated", roles: true, apart: true, shares: true, change: beside},
	{name: "horizontal", adds: true, change: replica},
	{name: scaling.Standby, adds: true, standby: true, change: promote},
}

// choose are the ways of these names that fit.
func choose(names []string, change string, from, to int) (ways []way, err error) {
	add := func(w way) {
		if !slices.ContainsFunc(ways, func(x way) bool { return x.name == w.name }) {
			ways = append(ways, w)
		}
	}
	for _, name := range names {
		if name == "all" || name == "ablation" {
			for _, w := range allWays {
				if w.fits(change, from, to) && (w.name == scaling.Elastic || w.ablation == (name == "ablation")) {
					add(w)
				}
			}
			continue
		}
		i := slices.IndexFunc(allWays, func(w way) bool { return w.name == name })
		switch {
		case i < 0:
			var known []string
			for _, w := range allWays {
				known = append(known, w.name)
			}
			return nil, fmt.Errorf("--strategy %s: there are %s, all and ablation%w", name, strings.Join(known, ", "), ErrUsage)
		case !allWays[i].fits(change, from, to) && change != wire.ChangeScale:
			return nil, fmt.Errorf("--strategy %s --change %s: it can not make that change%w", name, change, ErrUsage)
		case !allWays[i].fits(change, from, to):
			return nil, fmt.Errorf("--strategy %s: it only adds NPUs, and --to %d is below --from %d%w", name, to, from, ErrUsage)
		}
		add(allWays[i])
	}
	return ways, nil
}

// elastic has the instance change itself.
func elastic(ctx context.Context, s *site) (done, error) {
	switch s.scale.Change {
	case wire.ChangeRebalance:
		return s.operate(ctx, "rebalance", firstName)
	case wire.ChangeRole:
		return s.switchRole(ctx)
	}
	return s.operate(ctx, "scale", firstName, strconv.Itoa(s.scale.To))
}

// promote has the instance that stands by take what is to be added.
func promote(ctx context.Context, s *site) (done, error) {
	return s.operate(ctx, "scale", secondName, strconv.Itoa(s.scale.To-s.scale.From))
}

// command runs an operator's command about an instance, and reads what it says into r.
func (s *site) command(ctx context.Context, r any, args ...string) error {
	binary, err := os.Executable()
	if err != nil {
		return fmt.Errorf("finding this program: %w", err)
	}
	cmd := exec.CommandContext(ctx, binary, append(args, "--copy-rate", s.rate.String(), "--timeout", s.scale.Longest.String(), "--nats-url", s.nats, "--json")...)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("trireme %s: %w: %s", args[0], err, strings.TrimSpace(said.String()))
	}
	if err := json.Unmarshal(out, r); err != nil {
		return fmt.Errorf("reading what trireme %s says: %w", args[0], err)
	}
	return nil
}

// operate has an operation done.
func (s *site) operate(ctx context.Context, args ...string) (done, error) {
	var r wire.ChangeReport
	if err := s.command(ctx, &r, args...); err != nil {
		return done{}, err
	}
	if !r.Plan.Moves {
		return done{}, fmt.Errorf("trireme %s found nothing to do: balance %.3f of %d rows", args[0], r.Plan.Was, r.Plan.Rows)
	}
	return doneBy(&r), nil
}

// doneBy is what an operation tells.
func doneBy(r *wire.ChangeReport) done {
	return done{parts: map[string]float64{
		"plan_s": r.Planning.Seconds(), "copy_s": r.Copying.Seconds(), "copied_bytes": float64(r.Copied), "warm_s": r.Warming.Seconds(),
		"commit_s": r.Committal.Seconds(), "pause_s": r.Pause.Seconds(), "operation_s": r.Total.Seconds(), "release_s": r.Releasing.Seconds(),
		"balance_before": r.Plan.Was, "balance_after": r.Plan.Will,
	}, moved: r.Copied, warm: r.Warming, release: r.Releasing}
}

// switchRole has an NPU go over from the one instance to the other.
func (s *site) switchRole(ctx context.Context) (done, error) {
	from, has, to := prefillName, prefillNPUs, "decoder"
	if s.scale.To < s.scale.From {
		from, has, to = firstName, s.scale.From, "prefill"
	}
	giver, err := s.find(ctx, from, has)
	if err != nil {
		return done{}, err
	}
	var r bus.RoleReport
	if err := s.command(ctx, &r, "role", fmt.Sprintf("%s/%d", nodeName, giver.NPUs[has-1]), to); err != nil {
		return done{}, err
	}
	if r.Leave == nil || r.Join == nil {
		return done{}, fmt.Errorf("trireme role found nothing to do: %+v", r)
	}
	d, joined := doneBy(r.Leave), doneBy(r.Join)
	parts := map[string]float64{}
	for name, v := range d.parts {
		parts["leave_"+name] = v
	}
	for name, v := range joined.parts {
		parts["join_"+name] = v
	}
	return done{parts: parts, moved: d.moved + joined.moved, warm: d.warm + joined.warm, release: joined.release}, nil
}

// cold stops the instances and starts others on their NPUs.
func cold(ctx context.Context, s *site) (done, error) {
	s.stopAll(s.members)
	return done{}, s.replace(ctx, s.scale.members(s.scale.To), s.fromDisk()...)
}

// restart does so, but has it map what lies on the NPUs, and read only the rest.
func restart(ctx context.Context, s *site) (done, error) {
	l, err := s.least()
	if err != nil {
		return done{}, err
	}
	s.stopAll(s.members)
	// A stop deletes the record; who starts then finds this one, as if it were the successor of one that has died behind a commit.
	if _, err := s.bus.SwapLayout(ctx, wire.LayoutKey(nodeName, firstName), l, 0); err != nil {
		return done{}, fmt.Errorf("having the next process begin where its experts are: %w", err)
	}
	return done{}, s.replace(ctx, s.scale.members(s.scale.To), "--without=copies", "--disk-rate", s.scale.DiskRate.String())
}

// least is a record of the layout to which the fewest experts have to move, from the one in which the first instance begins.
func (s *site) least() (*wire.Layout, error) {
	f, err := hf.Open(s.model)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	t := &f.Config.Text
	present := stage.Layout(t, placement.First(s.scale.From))
	slots := placement.First(s.scale.To)
	change, err := placement.Plan(present, nil, slots, placement.Options{
		Slots: elasticsched.Slots(present, slots.Len(), wire.DefaultSpare), Slack: wire.DefaultSlack,
	})
	if err != nil {
		return nil, err
	}
	npus := make([]int, s.scale.To)
	for i := range npus {
		npus[i] = i // as the HMM gives them to the first who asks
	}
	return &wire.Layout{
		Instance: "bench", Model: f.Config.Digest, Asked: s.scale.To, Epoch: 1, NPUs: npus, Experts: change.Layout.Encode(),
	}, nil
}

// beside starts other instances and stops the old ones when all of those serve.
func beside(ctx context.Context, s *site) (done, error) {
	old, after := s.members, s.scale.members(s.scale.To)
	for i := range after {
		after[i].name += "-new"
	}
	if err := s.replace(ctx, after, s.fromDisk()...); err != nil {
		return done{}, err
	}
	s.stopAll(old)
	return done{}, nil
}

// replace starts instances and waits until they serve.
func (s *site) replace(ctx context.Context, members []member, flags ...string) (err error) {
	if s.members, err = s.begin(members, flags...); err != nil {
		return err
	}
	return s.serving(ctx, s.members)
}

// replica starts a second instance on what is to be added.
func replica(ctx context.Context, s *site) (done, error) {
	more, err := s.begin([]member{{name: secondName, roles: "PD", npus: s.scale.To - s.scale.From}}, s.fromDisk()...)
	if err != nil {
		return done{}, err
	}
	return done{}, s.serving(ctx, more)
}

// fromDisk are the flags of an instance that reads its weights from disk although others have them. Two that start at once each have the disk's
// rate: they read the same files, and what one has read the page cache has for the other.
func (s *site) fromDisk() []string {
	return []string{"--own-weights", "--disk-rate", s.scale.DiskRate.String()}
}
