package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"trireme.dev/services/trireme/modelcmd"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/conf"
	"trireme.dev/shared/wire"
)

// changeFlags are what commands that change an instance have in common.
type changeFlags struct {
	NATSURL  string        `name:"nats-url" help:"NATS server of the system." default:"nats://127.0.0.1:4222"`
	Instance string        `help:"Which one, where several have the role: its id, or its name." placeholder:"ID"`
	DryRun   bool          `help:"Only say what would be done."`
	Timeout  time.Duration `help:"Time after which the operation is given up if it is not in force by then." default:"1m"`
	Spare    float64       `help:"Places for second copies of experts with much load, as a part of those that first copies need." default:"${spare}"`
	Rate     conf.Bytes    `name:"copy-rate" help:"Most bytes of weights that are copied in a second, beside serving; 0: as fast as it goes." default:"0" placeholder:"SIZE"`
	Slack    float64       `help:"So much longer than in the best placement the busiest NPU may take, in order to move less." default:"${slack}"`
	JSON     bool          `name:"json" help:"Write one JSON object when it has ended."`
	AckWait  time.Duration `default:"30s" hidden:""` // as ackFlag's

	Hold     []string      `hidden:"" enum:"plan,prepare,commit,release,abort" help:"For tests: wait behind the work of these states."`
	HoldTime time.Duration `hidden:"" default:"1m" help:"For tests: so long in each, but not beyond the time limit before the commit."`
}

// rebalanceCmd places the experts of an instance anew.
type rebalanceCmd struct {
	Who string `arg:"" name:"instance" help:"decoder or prefill, where one runs, or an instance's id or name."`
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
	return c.run(e, c.Who, wire.Change{Kind: wire.ChangeRebalance})
}

// check says what is wrong with the flags.
func (c *changeFlags) check() error {
	switch {
	case c.Timeout <= 0:
		return fmt.Errorf("%w--timeout %v must be above 0", errUsage, c.Timeout)
	case c.Spare < 0 || c.Slack < 0:
		return fmt.Errorf("%w--spare %g and --slack %g cannot be negative", errUsage, c.Spare, c.Slack)
	}
	return nil
}

// run has the instance that is meant change.
func (c *changeFlags) run(e *env, who string, change wire.Change) error {
	if err := c.check(); err != nil {
		return err
	}
	return c.among(e, func(ctx context.Context, b *bus.Bus, all []wire.Instance) error {
		i, err := bus.Meant(all, who, c.Instance)
		if err != nil {
			return err
		}
		c.apply(&change)
		change.ID = bus.NewChangeID()
		r, err := b.Change(ctx, i.ID, i.Record(), change, c.told(e))
		if c.JSON && r.Number > 0 {
			return errors.Join(err, writeJSON(e.out, r))
		}
		if err != nil {
			return err
		}
		return printChange(e.out, r, c.DryRun)
	})
}

// among calls f with the instances that there are, each name once, and with the time that --timeout leaves. Behind its commit an operation needs a
// while to be complete, and an instance that dies to be started again.
func (c *changeFlags) among(e *env, f func(ctx context.Context, b *bus.Bus, all []wire.Instance) error) error {
	ctx, cancel := context.WithTimeout(e.ctx, c.Timeout+time.Minute)
	defer cancel()
	b, err := look(ctx, c.NATSURL, "change", ackFlag{AckWait: c.AckWait})
	if err != nil {
		return err
	}
	defer b.Close()
	view, err := b.Instances(ctx)
	if err != nil {
		return fmt.Errorf("reading heartbeats: %w", err)
	}
	err = f(ctx, b, view.Named())
	if err != nil && e.ctx.Err() != nil { // what a signal has ended is not told by report, and here something goes on
		fmt.Fprintln(e.err, err)
	}
	return err
}

// apply says in a change what the flags say.
func (c *changeFlags) apply(change *wire.Change) {
	change.Left, change.DryRun, change.Rate, change.Spare, change.Slack = c.Timeout, c.DryRun, int64(c.Rate), c.Spare, c.Slack
	change.Hold, change.HoldTime = strings.Join(c.Hold, ","), c.HoldTime
}

// told is what tells a person how far operations are; nil with --json.
func (c *changeFlags) told(e *env) func(*wire.ChangeReport) {
	if c.JSON {
		return nil
	}
	t := teller{w: e.err, bar: modelcmd.LoadProgress(e.err, "copying weights"), now: time.Now}
	return t.tell
}

// teller writes each line of progress once, and how much of the weights is copied: as a bar where a person sees that, else now and then.
type teller struct {
	w   io.Writer
	bar func(done, total int64) // nil: w is no terminal
	now func() time.Time

	last  string    // line
	at    time.Time // of the last line
	drawn int64     // total of the bar that is there; 0: none is
}

// tellEvery is the time between two lines about weights that are being copied.
const tellEvery = 10 * time.Second

func (t *teller) tell(r *wire.ChangeReport) {
	line := fmt.Sprintf("%-8s %s%s\n", r.State, r.Sentence(), map[bool]string{true: " (held)"}[r.Held])
	copies := r.State == "prepare" && 0 < r.Copied && r.Copied < r.Plan.Bytes
	if t.drawn > 0 && (line != t.last || !copies) { // what comes now is not to stand behind it
		t.bar(t.drawn, t.drawn)
		t.drawn = 0
	}
	switch {
	case line != t.last && r.State != "aborted": // figures change more often than what is said of them, and the error tells of an abort
		fmt.Fprint(t.w, line)
		t.last, t.at = line, t.now()
	case copies && t.bar != nil:
		t.bar(r.Copied, r.Plan.Bytes)
		t.drawn = r.Plan.Bytes
	case copies && t.now().Sub(t.at) >= tellEvery:
		fmt.Fprintf(t.w, "%-8s %s %s: %v of %v copied\n", r.State, r.Kind, r.ID, conf.Bytes(r.Copied), conf.Bytes(r.Plan.Bytes))
		t.at = t.now()
	}
}

// printChange writes what an operation has done, or would do.
func printChange(w io.Writer, r *wire.ChangeReport, dry bool) error {
	p := &r.Plan
	if !p.Moves {
		_, err := fmt.Fprintln(w, "nothing to do: it is so already")
		return err
	}
	if before, after := wire.NPUCount(p.Before), wire.NPUCount(p.After); before != after {
		fmt.Fprintf(w, "NPUs      %s, before %s\n", npusBySlot(p.After), npusBySlot(p.Before))
	}
	if p.HasExperts() {
		fmt.Fprintf(w, "experts   %d copies made, of which %d are in the same memory already, %d dropped\n", p.Copies, p.Shared, p.Drops)
		fmt.Fprintf(w, "balance   %.3f, before %.3f, of the load of %d rows\n", p.Will, p.Was, p.Rows)
	}
	if dry {
		_, err := fmt.Fprintf(w, "to copy   %v, in about %v; %v of memory beside what is in use\n", conf.Bytes(p.Bytes), p.Expect.Round(time.Millisecond/10),
			conf.Bytes(p.Memory))
		return err
	}
	if r.Total > 0 { // else the instance was killed behind the commit, and nobody has measured
		printFigures(w, r)
	}
	if r.Why != "" {
		fmt.Fprintf(w, "note      %s\n", r.Why)
	}
	_, err := fmt.Fprintf(w, "epoch     %d\n", r.Epoch)
	return err
}

// npusBySlot says how many NPUs there are, and which of the node.
func npusBySlot(slots []int) string {
	var names []string
	for _, n := range slots {
		if n >= 0 {
			names = append(names, strconv.Itoa(n))
		}
	}
	if len(names) == 0 {
		return "none"
	}
	return fmt.Sprintf("%d (%s of the node)", len(names), strings.Join(names, ", "))
}

// printFigures writes what an operation has cost.
func printFigures(w io.Writer, r *wire.ChangeReport) {
	rate := ""
	if r.Copied > 0 && r.Copying > 0 {
		rate = fmt.Sprintf(", %.3g GB/s", float64(r.Copied)/r.Copying.Seconds()/1e9)
	}
	short := func(d time.Duration) time.Duration { return d.Round(time.Microsecond) }
	fmt.Fprintf(w, "took      %v until all of it was in force: planned in %v, prepared in %v (%v copied%s), warmed up in %v, committed in %v\n",
		short(r.Total), short(r.Planning), short(r.Copying), conf.Bytes(r.Copied), rate, short(r.Warming), short(r.Committal))
	if r.Maps+r.Unmaps > 0 {
		fmt.Fprintf(w, "mapped    experts in ranges of addresses: %d maps in %v, %d unmaps\n", r.Maps, short(r.Mapping), r.Unmaps)
	}
	fmt.Fprintf(w, "pause     %v, for which steps were held up by the switch\n", short(r.Pause))
	fmt.Fprintf(w, "release   %v, for what only the old layout needed\n", short(r.Releasing))
	if r.Peak >= r.UsedBefore { // else it was killed before it has asked
		fmt.Fprintf(w, "memory    %v at most, before %v, now %v\n", conf.Bytes(r.Peak), conf.Bytes(r.UsedBefore), conf.Bytes(r.UsedAfter))
	}
}
