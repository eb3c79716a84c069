package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/wire"
)

// change runs a command that changes an instance, with --json. err says that it has failed, and how.
func (c *cluster) change(tb testing.TB, args ...string) (r wire.ChangeReport, err error) {
	tb.Helper()
	path, err := binary()
	if err != nil {
		tb.Fatal(err)
	}
	var said bytes.Buffer
	cmd := exec.Command(path, append(args, "--json", "--nats-url", "nats://"+c.nats)...)
	cmd.Stderr = &said
	out, err := cmd.Output()
	if len(out) > 0 {
		if err := json.Unmarshal(out, &r); err != nil {
			tb.Fatalf("%v wrote no JSON: %v\n%s", args, err, out)
		}
	}
	if err != nil {
		err = errors.New(strings.TrimSpace(said.String()))
	}
	return r, err
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

// Experts of a decoder of four NPUs are placed anew while 16 clients stream: what is measured as balance gets better, each state is
// an event, a second one finds little to do, and all answers are the same as before.
func TestRebalance(t *testing.T) {
	c := start(t, "--topology", "1E1P1Dx4", "--threads", "1", "--domains", "node")
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
		first.Plan.Bytes != 0 || first.Plan.Shared != first.Plan.Copies || first.Total < first.Planning {
		t.Errorf("rebalanced: %+v, %v", first, err)
	}
	want := []string{wire.EventScalePlan, wire.EventScalePrepare, wire.EventScaleCommit, wire.EventScaleRelease, wire.EventScaleDone}
	if k := c.kinds(t, first.ID); !slices.Equal(k, want) {
		t.Errorf("events %v, want %v", k, want)
	}
	second, err := c.change(t, "rebalance", "decoder")
	if err != nil || second.Plan.Copies > first.Plan.Copies/4 || second.Plan.Was < first.Plan.Will-0.05 {
		t.Errorf("right behind it: %+v, %v", second, err)
	}
	late, err := c.change(t, "rebalance", "decoder", "--spare", "0", "--slack", "0", "--timeout", "300ms", "--hold", "prepare", "--hold-time", "400ms")
	if err == nil || !strings.Contains(err.Error(), "not come to its commit in time") || late.Committed || late.State != "aborted" ||
		late.Epoch != second.Epoch || c.decoder(t).Epoch != second.Epoch {
		t.Errorf("what is late is given up: %+v, %v", late, err)
	}
	want = []string{wire.EventScalePlan, wire.EventScalePrepare, wire.EventScaleAbort, wire.EventScaleDone}
	if k := c.kinds(t, late.ID); !slices.Equal(k, want) {
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
	c := start(t, "--topology", "1E1P2D", "--threads", "1", "--domains", "node")
	for _, x := range []struct {
		args []string
		want string
	}{
		{[]string{"rebalance", "decoder"}, "say which with --instance"},
		{[]string{"rebalance", "decoder", "--instance", "nobody"}, "no such decoder runs"},
		{[]string{"rebalance", "encoder"}, "must be one of"},
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

// upset is a rebalance of a decoder that something happens to while it waits behind the work of a state.
type upset struct {
	state, victim string
	committed     bool // the new epoch is in force then
}

// upsets are all that can be, but their order is such that the first ones are of every state and every victim.
func upsets() []upset {
	states, victims := []string{"plan", "prepare", "commit", "release"}, []string{"decoder", "nats", "hmm", "command"}
	var all []upset
	for i := range len(states) * len(victims) {
		s, v := i%4, (i+i/4)%4
		// Nothing is lost with a command, and a NATS that is back in time.
		all = append(all, upset{states[s], victims[v], s >= 2 || v%2 == 1})
	}
	return all
}

// Whoever is killed, in whichever state of a rebalance: it ends in the old epoch or in the new one, the decoder's next process goes on in
// that, the command says which it is, and clients see nothing.
func TestChaosOfRebalances(t *testing.T) {
	all := upsets()
	if n, full := disturbances(t, 4, 1); !full {
		all = all[:n]
	}
	server := bustest.RunProcess(t) // the one inside `trireme up` cannot be killed
	c := start(t, "--topology", "1E1P1Dx4", "--threads", "1", "--domains", "node", "--nats-url", server.URL())
	c.nats = strings.TrimPrefix(server.URL(), "nats://")
	l := newLoad(t, c)
	b, err := bus.Connect(t.Context(), server.URL(), "test", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	l.begin()
	defer l.stop.Store(true)
	for i, x := range all {
		x.happen(t, c, b, server, []string{"0", "0.6"}[i%2])
		l.waitOpen(t) // a request has three attempts
	}
	l.end(t)
	c.waitReady(t)
	c.expectNoMemory(t)
}

// happen has it happen. spare makes a rebalance move something, whatever it finds.
func (x upset) happen(t *testing.T, c *cluster, b *bus.Bus, server *bustest.Process, spare string) {
	before := c.decoder(t)
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	begin := func(hold string) (*exec.Cmd, *syncBuffer) {
		said := &syncBuffer{}
		cmd := exec.Command(path, "rebalance", "decoder", "--spare", spare, "--slack", "0", "--hold", x.state, "--hold-time", hold, "--nats-url", "nats://"+c.nats)
		cmd.Stderr, cmd.Stdout = said, said
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd, said
	}
	hold := "2s"
	if x.victim == "decoder" || x.victim == "hmm" {
		hold = "1m"
	}
	cmd, said := begin(hold)
	t.Logf("%s is killed in state %s of a rebalance with --spare %s", x.victim, x.state, spare)
	c.await(t, "the rebalance waits", func() bool { return strings.Contains(said.String(), "(held)") }, said.String)
	switch x.victim {
	case "decoder":
		kill(t, c.pid(t, "decoder"))
	case "hmm":
		children := c.children()
		kill(t, c.pid(t, "hmm"))
		for _, p := range children {
			if p.role == "decoder" {
				c.waitExit(t, p)
			}
		}
	case "nats":
		server.Kill()
		time.Sleep(3 * time.Second) // the operation goes on while it is away
		server.Start()
	case "command":
		_ = cmd.Process.Kill()
	}
	failed := cmd.Wait()
	want := before.Epoch
	if x.committed {
		want++
	}
	var now wire.Instance
	c.await(t, fmt.Sprintf("the decoder is in epoch %d", want), func() bool {
		now = c.decoder(t)
		return now.Ready && now.Epoch == want
	}, func() string { return fmt.Sprintf("%+v\n%s", now, said.String()) })
	c.await(t, "the record says so, too", func() bool {
		r, _, err := b.Layout(t.Context(), wire.LayoutKey(now.Node, now.Name))
		return err == nil && r.Epoch == want && r.Pending == nil && r.Instance == now.ID && r.Last != nil && r.Last.Committed == x.committed
	}, said.String)
	if x.victim != "command" && (failed == nil) != x.committed {
		t.Errorf("the command ended with %v:\n%s", failed, said.String())
	}
	c.waitReady(t)
}

// decoder is the heartbeat of the one decoder that there is, waited for.
func (c *cluster) decoder(tb testing.TB) wire.Instance {
	tb.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		var s struct{ Instances []wire.Instance }
		data, err := json.Marshal(c.status(tb))
		if err == nil {
			err = json.Unmarshal(data, &s)
		}
		if err != nil {
			tb.Fatal(err)
		}
		s.Instances = slices.DeleteFunc(s.Instances, func(i wire.Instance) bool { return i.Role != "decode" || !i.Ready })
		if len(s.Instances) == 1 {
			return s.Instances[0]
		}
		if time.Now().After(deadline) {
			tb.Fatalf("the decoders are %+v", s.Instances)
		}
	}
}

// await waits until ok.
func (c *cluster) await(tb testing.TB, what string, ok func() bool, state func() string) {
	tb.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			tb.Fatalf("after two minutes still not: %s\n%s", what, state())
		}
	}
}
