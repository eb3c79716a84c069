package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"trireme.dev/shared/wire"
)

// change runs a command that changes an instance, with --json. err says that it has failed, and how.
func (c *cluster) change(tb testing.TB, args ...string) (r wire.ChangeReport, err error) {
	tb.Helper()
	path, err := binary()
	if err != nil {
		tb.Fatal(err)
	}
	err = reported(tb, exec.Command(path, append(args, "--json", "--nats-url", "nats://"+c.nats)...), &r)
	return r, err
}

// reported runs a command that writes a report as JSON, if it comes to that. The error says that it has failed, and how.
func reported(tb testing.TB, cmd *exec.Cmd, report any) error {
	tb.Helper()
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if len(out) > 0 {
		if err := json.Unmarshal(out, report); err != nil {
			tb.Fatalf("%v wrote no JSON: %v\n%s", cmd.Args[1:], err, out)
		}
	}
	if err != nil {
		return errors.New(strings.TrimSpace(said.String()))
	}
	return nil
}

// kinds are the kinds of the events about an operation.
func (c *cluster) kinds(tb testing.TB, operation string) []string {
	tb.Helper()
	var kinds []string
	for _, e := range c.events(tb, "--kind", "scale") {
		var r wire.ChangeReport
		if err := json.Unmarshal(e.Data, &r); err != nil {
			tb.Fatalf("event %s has no report: %v", e.Kind, err)
		}
		if r.ID == operation {
			kinds = append(kinds, e.Kind)
		}
	}
	return kinds
}

// told is kinds of an operation that has ended, waited for: NATS takes events in behind the back of who sends them.
func (c *cluster) told(tb testing.TB, operation string) (kinds []string) {
	tb.Helper()
	c.await(tb, "operation "+operation+" has told its end", func() bool {
		kinds = c.kinds(tb, operation)
		return slices.Contains(kinds, wire.EventScaleDone)
	}, func() string { return fmt.Sprint(kinds) })
	return kinds
}

// Experts of a decoder of four NPUs are placed anew while 16 clients stream: what is measured as balance gets better, each state is
// an event, a second one finds little to do, and all answers are the same as before.
func TestRebalance(t *testing.T) {
	t.Parallel()
	for _, domains := range []string{"node", "per-npu"} {
		t.Run(domains, func(t *testing.T) {
			t.Parallel()
			rebalances(t, domains)
		})
	}
}

func rebalances(t *testing.T, domains string) {
	c := start(t, "--topology", "1E1P1Dx4", "--threads", "1", "--domains", domains)
	l := newLoad(t, c)
	l.begin()
	l.waitOpen(t)
	dry, err := c.change(t, "rebalance", "decoder", "--dry-run")
	if err != nil || !dry.Plan.Moves || dry.Plan.Rows == 0 || dry.Committed || dry.Epoch != 0 || dry.Plan.Will <= dry.Plan.Was {
		t.Errorf("a dry run: %+v, %v", dry, err)
	}
	if k := c.kinds(t, dry.ID); len(k) > 0 {
		t.Errorf("a dry run has events: %v", k)
	}
	first, err := c.change(t, "rebalance", "decoder")
	if err != nil || first.State != "done" || !first.Committed || first.Epoch != 1 || first.Plan.Copies == 0 || first.Plan.Will <= first.Plan.Was ||
		first.Total < first.Planning {
		t.Errorf("rebalanced: %+v, %v", first, err)
	}
	p := &first.Plan // in one memory domain all experts are there
	if far := domains == "per-npu"; far != (p.Bytes > 0) || first.Copied != p.Bytes || far != (p.Shared == 0) || !far && p.Shared != p.Copies {
		t.Errorf("with domains %s: %d of %d experts are there, %d bytes to copy, %d copied", domains, p.Shared, p.Copies, p.Bytes, first.Copied)
	}
	want := []string{wire.EventScalePlan, wire.EventScalePrepare, wire.EventScaleCommit, wire.EventScaleRelease, wire.EventScaleDone}
	if k := c.told(t, first.ID); !slices.Equal(k, want) {
		t.Errorf("events %v, want %v", k, want)
	}
	second, err := c.change(t, "rebalance", "decoder")
	if err != nil || second.Plan.Copies > first.Plan.Copies/4 || second.Plan.Was < first.Plan.Will-0.05 {
		t.Errorf("right behind it: %+v, %v", second, err)
	}
	// Time enough to plan, and then it is held until its time has passed.
	late, err := c.change(t, "rebalance", "decoder", "--spare", "0", "--slack", "0", "--timeout", "5s", "--hold", "prepare", "--hold-time", "1m")
	if err == nil || !strings.Contains(err.Error(), "not come to its commit in time") || late.Committed || late.State != "aborted" || late.Epoch != second.Epoch {
		t.Errorf("what is late is given up: %+v, %v", late, err)
	}
	// The decoder itself says in which epoch it is then; its last heartbeat may be from before anything.
	if dry, err = c.change(t, "rebalance", "decoder", "--dry-run"); err != nil || dry.Epoch != second.Epoch {
		t.Errorf("what was given up has left epoch %d, was %d: %v", dry.Epoch, second.Epoch, err)
	}
	want = []string{wire.EventScalePlan, wire.EventScalePrepare, wire.EventScaleAbort, wire.EventScaleDone}
	if k := c.told(t, late.ID); !slices.Equal(k, want) {
		t.Errorf("events %v, want %v", k, want)
	}
	t.Logf("balance %.3f to %.3f with %d copies and %d drops of the load of %d rows; planned in %v, record written in %v, in all %v; "+
		"then %.3f and %d copies", first.Plan.Was, first.Plan.Will, first.Plan.Copies, first.Plan.Drops, first.Plan.Rows, first.Planning, first.Committal,
		first.Total, second.Plan.Was, second.Plan.Copies)
	l.waitOpen(t)
	l.end(t)
	c.expectNoMemory(t)
}

// What cannot be done is refused, with the reason and a status that is not 0.
func TestRebalanceRefused(t *testing.T) {
	t.Parallel()
	c := start(t, "--topology", "1E1P2D", "--threads", "1", "--domains", "node")
	for _, x := range []struct {
		args []string
		want string
	}{
		{[]string{"rebalance", "decoder"}, "say which"},
		{[]string{"rebalance", "decoder", "--instance", "nobody"}, "no such instance"},
		{[]string{"rebalance", "encoder"}, "has no experts"},
		{[]string{"rebalance", "prefill", "--timeout", "0s"}, "--timeout"},
		{[]string{"rebalance", "prefill", "--spare", "-1"}, "--spare"},
	} {
		if r, err := c.change(t, x.args...); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%v: %+v, %v; want %q", x.args, r, err, x.want)
		}
	}
	if r, err := c.change(t, "rebalance", "prefill"); err != nil || r.Plan.Moves {
		t.Errorf("one NPU has nothing to balance: %+v, %v", r, err)
	}
}
