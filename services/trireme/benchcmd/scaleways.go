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
	"trireme.dev/shared/wire"
)

// way is a way to change an instance.
type way struct {
	name     string
	ablation bool     // it is elastic with less
	adds     bool     // it can only add NPUs
	places   bool     // it can place experts anew, too
	apart    bool     // the new instance has other NPUs than the old one
	shares   bool     // and these have half of their memory, to stand for the same ones with two copies of the weights
	unlike   []string // flags of the instance that is to change
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
	if change == wire.ChangeRebalance {
		return w.places
	}
	return !w.adds || to > from
}

// allWays are those of ElasticMoE (arXiv:2510.02613, section 7.1), and those of its ablation (tables 1 and 3), each of which lacks what those before
// it lack, too.
var allWays = []way{
	{name: scaling.Elastic, places: true, change: elastic},
	{name: "no-remap", ablation: true, unlike: []string{"--without=remap"}, change: elastic},
	{name: "no-copy", ablation: true, unlike: []string{"--without=remap,copies"}, disk: true, change: elastic},
	{name: "no-standby", ablation: true, change: restart},
	{name: "no-zero-copy", ablation: true, change: cold},
	{name: "cold", change: cold},
	{name: "extravagant", apart: true, change: beside},
	{name: "colocated", apart: true, shares: true, change: beside},
	{name: "horizontal", adds: true, change: replica},
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
			return nil, fmt.Errorf("--strategy %s: there are %s, all and ablation: %w", name, strings.Join(known, ", "), ErrUsage)
		case !allWays[i].fits(change, from, to) && change == wire.ChangeRebalance:
			return nil, fmt.Errorf("--strategy %s: it cannot place experts anew: %w", name, ErrUsage)
		case !allWays[i].fits(change, from, to):
			return nil, fmt.Errorf("--strategy %s: it only adds NPUs, and --to %d is below --from %d: %w", name, to, from, ErrUsage)
		}
		add(allWays[i])
	}
	return ways, nil
}

// elastic has the instance change itself.
func elastic(ctx context.Context, s *site) (d done, err error) {
	binary, err := os.Executable()
	if err != nil {
		return d, fmt.Errorf("finding this program: %w", err)
	}
	args := []string{"scale", s.name, strconv.Itoa(s.scale.To)}
	if s.scale.Change == wire.ChangeRebalance {
		args = []string{"rebalance", s.name}
	}
	cmd := exec.CommandContext(ctx, binary, append(args, "--copy-rate", s.rate.String(), "--timeout", s.scale.Longest.String(), "--nats-url", s.nats, "--json")...)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		return d, fmt.Errorf("trireme %s: %w: %s", args[0], err, strings.TrimSpace(said.String()))
	}
	var r wire.ChangeReport
	if err := json.Unmarshal(out, &r); err != nil {
		return d, fmt.Errorf("reading what trireme %s says: %w", args[0], err)
	}
	if !r.Plan.Moves {
		return d, fmt.Errorf("trireme %s found nothing to do: balance %.3f of %d rows", args[0], r.Plan.Was, r.Plan.Rows)
	}
	return done{parts: map[string]float64{
		"plan_s": r.Planning.Seconds(), "copy_s": r.Copying.Seconds(), "copied_bytes": float64(r.Copied), "warm_s": r.Warming.Seconds(),
		"commit_s": r.Committal.Seconds(), "pause_s": r.Pause.Seconds(), "operation_s": r.Total.Seconds(), "release_s": r.Releasing.Seconds(),
		"balance_before": r.Plan.Was, "balance_after": r.Plan.Will,
	}, moved: r.Copied, warm: r.Warming, release: r.Releasing}, nil
}

// cold stops the instance and starts another one.
func cold(ctx context.Context, s *site) (done, error) {
	s.stop(s.instance)
	return done{}, s.replace(ctx, s.name, "--own-weights", "--disk-rate", s.scale.DiskRate.String())
}

// restart does so, but has it map what lies on the NPUs, and read only the rest.
func restart(ctx context.Context, s *site) (done, error) {
	s.stop(s.instance)
	return done{}, s.replace(ctx, s.name, "--without=copies", "--disk-rate", s.scale.DiskRate.String())
}

// beside starts another instance and stops the old one when that serves.
func beside(ctx context.Context, s *site) (done, error) {
	old := s.instance
	if err := s.replace(ctx, "second", "--own-weights", "--disk-rate", s.scale.DiskRate.String()); err != nil {
		return done{}, err
	}
	s.stop(old)
	return done{}, nil
}

// replace starts an instance of --to NPUs and waits until it serves.
func (s *site) replace(ctx context.Context, name string, flags ...string) (err error) {
	if s.instance, err = s.begin(name, s.scale.To, flags...); err != nil {
		return err
	}
	s.name = name
	return s.ready(ctx, name, s.scale.To)
}

// replica starts a second instance on what is to be added.
func replica(ctx context.Context, s *site) (done, error) {
	more := s.scale.To - s.scale.From
	if _, err := s.begin("second", more, "--own-weights", "--disk-rate", s.scale.DiskRate.String()); err != nil {
		return done{}, err
	}
	return done{}, s.ready(ctx, "second", more)
}
