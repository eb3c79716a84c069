package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/wire"
)

// changeFlags are what commands that change an instance have in common.
type changeFlags struct {
	NATSURL  string        `name:"nats-url" help:"NATS server of the system." default:"nats://127.0.0.1:4222"`
	Instance string        `help:"Which one, where several have the role: its id, or its name." placeholder:"ID"`
	DryRun   bool          `help:"Only say what would be done."`
	Timeout  time.Duration `help:"Time after which the operation is given up if it is not in force by then." default:"1m"`
	Spare    float64       `help:"Places for second copies of experts with much load, as a part of those that first copies need." default:"0.25"`
	Slack    float64       `help:"So much longer than in the best placement the busiest NPU may take, in order to move less." default:"0.05"`
	JSON     bool          `name:"json" help:"Write one JSON object when it has ended."`
	ackFlag

	Hold     string        `hidden:"" enum:",plan,prepare,commit,release,abort" default:"" help:"For tests: wait behind the work of this state."`
	HoldTime time.Duration `hidden:"" default:"1m" help:"For tests: so long."`
}

// rebalanceCmd places the experts of an instance anew.
type rebalanceCmd struct {
	Role string `arg:"" enum:"decoder,prefill" help:"decoder or prefill: an instance that has the role."`
	changeFlags
}

// Help is shown by `trireme rebalance --help`.
func (rebalanceCmd) Help() string {
	return `Experts that the measured load of the last minutes makes an NPU wait for go to others, and those with much load get second
copies; as few as possible move. Answers go on meanwhile, and stay the same bit by bit.

Examples:
  trireme rebalance decoder --dry-run
  trireme rebalance decoder --instance decoder-1 --spare 0.5
  trireme rebalance decoder --json | jq .plan.balance_after`
}

// Run has the experts placed anew.
func (c *rebalanceCmd) Run(e *env) error {
	return c.run(e, c.Role, wire.Change{Kind: wire.ChangeRebalance})
}

// run has an instance of a role change.
func (c *changeFlags) run(e *env, role string, change wire.Change) error {
	switch {
	case c.Timeout <= 0:
		return fmt.Errorf("%w--timeout %v must be above 0", errUsage, c.Timeout)
	case c.Spare < 0 || c.Slack < 0:
		return fmt.Errorf("%w--spare %g and --slack %g cannot be negative", errUsage, c.Spare, c.Slack)
	}
	// Behind its commit an operation needs a while to be complete, and an instance that dies to be started again.
	ctx, cancel := context.WithTimeout(e.ctx, c.Timeout+time.Minute)
	defer cancel()
	b, err := look(ctx, c.NATSURL, "change", c.ackFlag)
	if err != nil {
		return err
	}
	defer b.Close()
	i, err := c.find(ctx, b, role)
	if err != nil {
		return err
	}
	change.ID, change.Left, change.DryRun, change.Spare, change.Slack = strings.ToLower(nats.NewInbox()[7:19]), c.Timeout, c.DryRun,
		c.Spare, c.Slack
	change.Hold, change.HoldTime = c.Hold, c.HoldTime
	told := func(r *wire.ChangeReport) {
		if !c.JSON {
			fmt.Fprintf(e.err, "%-8s %s%s\n", r.State, r.Sentence(), map[bool]string{true: " (held)"}[r.Held])
		}
	}
	r, err := b.Change(ctx, i.ID, wire.LayoutKey(i.Node, cmp.Or(i.Name, i.ID)), change, told)
	if c.JSON && r.Number > 0 {
		return errors.Join(err, writeJSON(e.out, r))
	}
	if err != nil {
		return err
	}
	return printChange(e.out, r, c.DryRun)
}

// find is the instance that is meant.
func (c *changeFlags) find(ctx context.Context, b *bus.Bus, role string) (*wire.Instance, error) {
	view, err := b.Instances(ctx)
	if err != nil {
		return nil, fmt.Errorf("reading heartbeats: %w", err)
	}
	of := map[string]string{"encoder": stage.Encode, "prefill": stage.Prefill, "decoder": stage.Decode}[role]
	all := view.Role(of)
	if c.Instance != "" {
		all = slices.DeleteFunc(all, func(i wire.Instance) bool { return i.ID != c.Instance && i.Name != c.Instance })
	}
	switch {
	case len(all) == 1:
		return &all[0], nil
	case len(all) == 0 && c.Instance != "":
		return nil, fmt.Errorf("%w--instance %s: no such %s runs; `trireme status` shows those that do", errUsage, c.Instance, role)
	case len(all) == 0:
		return nil, fmt.Errorf("no %s runs", role)
	}
	var ids []string
	for _, i := range all {
		ids = append(ids, i.ID)
	}
	return nil, fmt.Errorf("%w%d instances are a %s: say which with --instance: %s", errUsage, len(all), role, strings.Join(ids, ", "))
}

// printChange writes what an operation has done, or would do.
func printChange(w io.Writer, r *wire.ChangeReport, dry bool) error {
	p := &r.Plan
	if !p.Moves {
		_, err := fmt.Fprintf(w, "nothing to do: balance %.3f of the load of %d rows\n", p.Was, p.Rows)
		return err
	}
	what := "would be"
	if !dry {
		what = "are"
	}
	fmt.Fprintf(w, "%d copies of experts %s made, of which %d are there already in the same memory, and %d dropped; %d bytes to copy\n",
		p.Copies, what, p.Shared, p.Drops, p.Bytes)
	fmt.Fprintf(w, "balance %.3f, before %.3f, of the load of %d rows\n", p.Will, p.Was, p.Rows)
	if dry {
		_, err := fmt.Fprintf(w, "expected: %v, %d bytes of memory beside what is in use\n", p.Expect, p.Memory)
		return err
	}
	if r.Why != "" {
		fmt.Fprintf(w, "note: %s\n", r.Why)
	}
	_, err := fmt.Fprintf(w, "epoch %d is in force after %v: planned in %v, copied %d bytes in %v, committed in %v, steps held up for %v\n", r.Epoch,
		r.Total.Round(time.Microsecond), r.Planning.Round(time.Microsecond), r.Copied, r.Copying.Round(time.Microsecond),
		r.Committal.Round(time.Microsecond), r.Pause.Round(time.Microsecond))
	return err
}
