package e2e

import (
	"fmt"
	"log/slog"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/wire"
)

// upset is an operation on a decoder that something happens to while it waits behind the work of a state.
type upset struct {
	state, victim string
	committed     bool // the new epoch is in force then
}

// upsets are all that can be, in such an order that any few behind one another are of different states and victims.
func upsets() []upset {
	states, victims := []string{"plan", "prepare", "commit", "release", "abort"}, []string{"decoder", "nats", "hmm", "command"}
	var all []upset
	for i := range len(states) * len(victims) { // 5 and 4 have no common divisor: each pair comes once
		x := upset{state: states[i%5], victim: victims[i%4]}
		switch x.state {
		case "commit", "release":
			x.committed = true
		case "plan", "prepare": // nothing is lost with a command, and a NATS that is back in time
			x.committed = x.victim == "nats" || x.victim == "command"
		}
		all = append(all, x)
	}
	return all
}

// Whoever is killed, in whichever state of a rebalance: it ends in the old epoch or in the new one, the decoder's next process goes on in
// that, the command says which it is, and clients see nothing. By default it happens to a few operations, others with another
// TRIREME_CHAOS_SEED; with TRIREME_CHAOS, whatever it is, to all pairs of a victim and a state.
func TestChaosOfRebalances(t *testing.T) {
	t.Parallel()
	for i, domains := range []string{"node", "per-npu"} {
		t.Run(domains, func(t *testing.T) {
			t.Parallel()
			upset := 0
			chaosOfChanges(t, i, "1E1P1Dx4", domains, (*cluster).decoder, func(wire.Instance) []string {
				upset++ // a rebalance that has something to move, whatever it finds
				return []string{"rebalance", "decoder", "--slack", "0", "--spare", []string{"0", "0.6"}[upset%2]}
			})
		})
	}
}

// The same when NPUs join and leave: nobody else has lost any, and those that are not the decoder's are spare.
func TestChaosOfScales(t *testing.T) {
	t.Parallel()
	for i, domains := range []string{"node", "per-npu"} {
		t.Run(domains, func(t *testing.T) {
			t.Parallel()
			chaosOfChanges(t, 2+i, "1E1P1Dx2+2", domains, (*cluster).decoder, func(now wire.Instance) []string {
				return []string{"scale", "decoder", map[bool]string{true: "+2", false: "-2"}[len(now.NPUs) == 2], "--timeout", "5m"}
			})
		})
	}
}

// The same when an instance gives up its last NPU and stands by, or has some again, beside another one that goes on with its work.
func TestChaosOfStandbys(t *testing.T) {
	t.Parallel()
	first := func(c *cluster, tb testing.TB) wire.Instance { return c.ready(tb, "decoder-0") }
	chaosOfChanges(t, 4, "1E1P1Dx2,1D+1", "per-npu", first, func(now wire.Instance) []string {
		return []string{"scale", "decoder-0", map[bool]string{true: "2", false: "0"}[len(now.NPUs) == 0], "--timeout", "5m"}
	})
}

// chaosOfChanges is a part of five: by default each has others of the upsets. which is the decoder that changes.
func chaosOfChanges(
	t *testing.T, part int, topology, domains string, which func(*cluster, testing.TB) wire.Instance, change func(now wire.Instance) []string,
) {
	all := upsets()
	if n, full := disturbances(t, 3, 1); !full {
		at := (5*int(chaosSeed(t)%4) + part) * n // with four seeds in a row each pair comes three times, here and there
		all = append(all, all...)[at%len(all):][:n]
	}
	server := bustest.RunProcess(t) // the one inside `trireme up` cannot be killed
	c := start(t, "--topology", topology, "--threads", "1", "--domains", domains, "--nats-url", server.URL())
	c.nats = strings.TrimPrefix(server.URL(), "nats://")
	l := newLoad(t, c)
	b, err := bus.Connect(t.Context(), server.URL(), "test", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	npus := spares(c.memory(t)) + len(which(c, t).NPUs)
	l.begin()
	defer l.stop.Store(true)
	for _, x := range all {
		before := which(c, t)
		args := change(before)
		after := x.happen(t, c, b, server, which, before, args)
		if had, has := len(before.NPUs), len(after.NPUs); args[0] == "scale" && (had != has) != x.committed {
			t.Errorf("the decoder had %d NPUs and has %d", had, has)
		}
		c.await(t, "NPUs that are not the decoder's are spare", func() bool {
			return spares(c.memory(t)) == npus-len(after.NPUs)
		}, func() string { return fmt.Sprintf("%+v", c.memory(t).Memory) })
		l.waitOpen(t) // a request has three attempts
	}
	l.end(t)
	c.waitReady(t)
	c.expectNoMemory(t)
}

// happen has it happen to the operation that a command asks for, and returns the decoder as it is then.
func (x upset) happen(
	t *testing.T, c *cluster, b *bus.Bus, server *bustest.Process, which func(*cluster, testing.TB) wire.Instance, before wire.Instance, args []string,
) (now wire.Instance) {
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	hold := "3s"
	if x.victim == "decoder" || x.victim == "hmm" {
		hold = "1m"
	}
	how := []string{"--hold", x.state, "--hold-time", hold}
	if x.state == "abort" { // its time ends while it waits, or before
		how = append(how, "--hold", "prepare", "--timeout", "2s")
	}
	args = append(args, how...)
	t.Logf("%s is killed in state %s of trireme %s", x.victim, x.state, strings.Join(args, " "))
	said := &syncBuffer{}
	cmd := exec.Command(path, append(args, "--nats-url", "nats://"+c.nats)...)
	cmd.Stderr, cmd.Stdout = said, said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	held := regexp.MustCompile(`(?m)^` + x.state + ` .*\(held\)$`)
	c.await(t, "the operation waits", func() bool { return held.MatchString(said.String()) }, said.String)
	switch x.victim {
	case "decoder":
		kill(t, before.PID)
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
	c.await(t, fmt.Sprintf("the decoder is in epoch %d", want), func() bool {
		now = which(c, t)
		return now.Ready && now.Epoch == want
	}, func() string { return fmt.Sprintf("%+v\n%s", now, said.String()) })
	c.await(t, "the record says so, too", func() bool {
		r, _, err := b.Layout(t.Context(), wire.LayoutKey(now.Node, now.Name))
		return err == nil && r.Epoch == want && r.Pending == nil && r.Instance == now.ID && r.Last != nil && r.Last.Committed == x.committed
	}, said.String)
	if x.victim == "command" { // nobody waits for the end of what is held behind its commit
		id := regexp.MustCompile(args[0] + ` ([a-z0-9]+):`).FindStringSubmatch(said.String())[1]
		c.await(t, "operation "+id+" ends", func() bool { return slices.Contains(c.kinds(t, id), wire.EventScaleDone) }, said.String)
	}
	if x.victim != "command" && (failed == nil) != x.committed {
		t.Errorf("the command ended with %v:\n%s", failed, said.String())
	}
	c.waitReady(t)
	return which(c, t)
}

// decoder is the heartbeat of the one decoder that there is, waited for.
func (c *cluster) decoder(tb testing.TB) wire.Instance {
	tb.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		ready := slices.DeleteFunc(c.instances(tb), func(i wire.Instance) bool { return i.Role != "decode" || !i.Ready })
		if len(ready) == 1 {
			return ready[0]
		}
		if time.Now().After(deadline) {
			tb.Fatalf("the decoders are %+v", ready)
		}
	}
}

// ready is the heartbeat of the instance of a name that is ready, waited for.
func (c *cluster) ready(tb testing.TB, name string) wire.Instance {
	tb.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		found := slices.DeleteFunc(c.instances(tb), func(i wire.Instance) bool { return i.Name != name || !i.Ready || !alive(i) })
		if len(found) == 1 {
			return found[0]
		}
		if time.Now().After(deadline) {
			tb.Fatalf("of %s there are %+v", name, found)
		}
	}
}

// await waits until ok, which may run a command of the program: it asks less and less often, so that asking is not what the machine does.
func (c *cluster) await(tb testing.TB, what string, ok func() bool, state func() string) {
	tb.Helper()
	pause := 10 * time.Millisecond
	for deadline := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(pause) {
		pause = min(2*pause, 200*time.Millisecond)
		if time.Now().After(deadline) {
			tb.Fatalf("after two minutes still not: %s\n%s", what, state())
		}
	}
}
