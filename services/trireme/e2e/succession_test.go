package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"trireme.dev/services/scaler/act"
	"trireme.dev/services/scaler/lead"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/wire"
)

// doomedVariable has a test binary be a scaler that gets as far as it says, and is killed there: doomed as JSON.
const doomedVariable = "TRIREME_E2E_SCALER"

// doomed is what a scaler does that is to be killed.
type doomed struct {
	NATS      string
	Operation lead.Operation
	Until     string // noted, left (the first half of a move has ended), stepped (and that is noted), or nothing: it goes on to the end
	Rate      int64
}

// runIfDoomed is the whole life of such a process, and returns at once in any other.
func runIfDoomed() {
	text := os.Getenv(doomedVariable)
	if text == "" {
		return
	}
	var d doomed
	err := json.Unmarshal([]byte(text), &d)
	if err == nil {
		err = d.run(context.Background())
	}
	fmt.Fprintln(os.Stderr, "scaler of a test:", err)
	os.Exit(1)
}

func (d *doomed) run(ctx context.Context) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	b, err := bus.Connect(ctx, d.NATS, "doomed", log)
	if err != nil {
		return err
	}
	a, err := act.New(ctx, act.Config{Bus: b, Rate: d.Rate, Log: log})
	if err != nil {
		return err
	}
	cfg := lead.Config{Bus: b, ID: "doomed-" + d.Operation.ID, Lease: 3 * time.Second, Log: log} // a machine may stand still for two
	return lead.Run(ctx, cfg, func(ctx context.Context, t *lead.Term) error {
		op := &d.Operation
		if t.Pending() != nil {
			return fmt.Errorf("%+v was left behind", t.Pending())
		}
		if err := t.Note(ctx, op); err != nil {
			return err
		}
		if d.Until == "left" || d.Until == "stepped" { // as act does
			c := wire.Change{ID: op.ID + "x0", Kind: wire.ChangeScale, Leave: op.Change.Numbers, For: op.Change.Instance, Left: time.Minute, Fence: t.Fence()}
			i, err := among(ctx, b, op.Change.From)
			if err != nil {
				return err
			}
			if _, err := b.Change(ctx, i.ID, i.Record(), c, nil); err != nil {
				return err
			}
		}
		if d.Until == "stepped" {
			op.Step = 1
			if err := t.Note(ctx, op); err != nil {
				return err
			}
		}
		fmt.Println("reached", d.Until)
		if d.Until == "" {
			out, err := a.Do(ctx, t, op)
			fmt.Println("ended", out.Done, out.Why, err)
		}
		<-ctx.Done()
		return context.Cause(ctx)
	})
}

func among(ctx context.Context, b *bus.Bus, name string) (*wire.Instance, error) {
	view, err := b.Instances(ctx)
	if err != nil {
		return nil, err
	}
	return bus.Meant(view.Named(), name, "")
}

// noted is the operation in the scalers' record, if one stands there.
func noted(tb testing.TB, js jetstream.JetStream) (op *lead.Operation) {
	tb.Helper()
	store, err := js.KeyValue(tb.Context(), wire.BucketScaler)
	if err != nil {
		tb.Fatal(err)
	}
	entry, err := store.Get(tb.Context(), "leader")
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return nil
	}
	var record struct{ Operation *lead.Operation }
	if err == nil {
		err = json.Unmarshal(entry.Value(), &record)
	}
	if err != nil {
		tb.Fatal(err)
	}
	return record.Operation
}

// A scaler is killed with SIGKILL before, in, between and behind what it has begun, under load, and a real one comes after it, which ends
// what it finds: once, and so that nobody sees it.
func TestScalerIsSucceeded(t *testing.T) {
	t.Parallel()
	c := start(t, "--topology", "1E1P1Dx2+3", "--threads", "1", "--domains", "per-npu")
	js := c.jetstream(t)
	l := newLoad(t, c)
	l.begin()
	defer l.stop.Store(true)

	node := c.instances(t)[0].Node
	of := func(name string) []int { return c.named(t, name).NPUs }
	last := func(name string) []int { npus := of(name); return npus[len(npus)-1:] }
	spare := func() (npus []int) {
		c.expectWithin(t, hbmReserve, "an NPU is spare", func(s hbm.Stats) bool {
			npus = nil
			for _, m := range s.Memory {
				if m.NPU >= 0 && m.Instance == "" && m.Reserved == "" {
					npus = append(npus, m.NPU)
				}
			}
			return len(npus) > 0
		})
		return npus[:1]
	}
	prepares := func(id string) bool { return slices.Contains(c.kinds(t, id), wire.EventScalePrepare) }
	ends := func(id string) bool { return slices.Contains(c.kinds(t, id), wire.EventScaleDone) }
	stepped := func(string) bool { op := noted(t, js); return op != nil && op.Step == 1 }
	commits := 0
	for i, x := range []struct {
		what    string
		change  func() autoscale.Change
		until   string
		rate    int64
		killed  func(id string) bool // it is killed when this is so; nil: when it has got as far as until
		with    string               // a process of this service is killed with it
		stopped bool                 // it is not killed but stopped, and goes on behind its successor
		npus    []string             // then
		commits int                  // operations on instances that come to their commit
	}{
		{what: "widen, not asked for yet", change: func() autoscale.Change {
			return autoscale.Change{Action: autoscale.Widen, Stage: autoscale.Decode, Instance: "decoder-0", Numbers: spare()}
		}, until: "noted", npus: []string{"decoder-0 3"}, commits: 1},
		{what: "widen, in the middle", change: func() autoscale.Change {
			return autoscale.Change{Action: autoscale.Widen, Stage: autoscale.Decode, Instance: "decoder-0", Numbers: spare()}
		}, rate: 1 << 20, killed: prepares, npus: []string{"decoder-0 4"}, commits: 1},
		{what: "narrow, ended and not cleared", change: func() autoscale.Change {
			return autoscale.Change{Action: autoscale.Narrow, Stage: autoscale.Decode, Instance: "decoder-0", Numbers: last("decoder-0")}
		}, killed: ends, npus: []string{"decoder-0 3"}, commits: 1},
		{what: "widen, in the middle, with the decoder, which gives it up", change: func() autoscale.Change {
			return autoscale.Change{Action: autoscale.Widen, Stage: autoscale.Decode, Instance: "decoder-0", Numbers: spare()}
		}, rate: 64 << 10, killed: prepares, with: "decoder", npus: []string{"decoder-0 3"}},
		{what: "move, not asked for yet", change: func() autoscale.Change {
			return autoscale.Change{Action: autoscale.Move, Stage: autoscale.Prefill, From: "decoder-0", Instance: "prefill-0", Numbers: last("decoder-0")}
		}, until: "noted", npus: []string{"decoder-0 2", "prefill-0 2"}, commits: 2},
		{what: "move, between the halves", change: func() autoscale.Change {
			return autoscale.Change{Action: autoscale.Move, Stage: autoscale.Encode, From: "prefill-0", Instance: "encoder-0", Numbers: last("prefill-0")}
		}, until: "left", npus: []string{"prefill-0 1", "encoder-0 2"}, commits: 2},
		{what: "move, between the halves, the first of which is noted", change: func() autoscale.Change {
			return autoscale.Change{Action: autoscale.Move, Stage: autoscale.Decode, From: "encoder-0", Instance: "decoder-0", Numbers: last("encoder-0")}
		}, until: "stepped", npus: []string{"encoder-0 1", "decoder-0 3"}, commits: 2},
		{what: "move, in the second half", change: func() autoscale.Change {
			return autoscale.Change{Action: autoscale.Move, Stage: autoscale.Prefill, From: "decoder-0", Instance: "prefill-0", Numbers: last("decoder-0")}
		}, rate: 1 << 20, killed: stepped, npus: []string{"decoder-0 2", "prefill-0 2"}, commits: 2},
		{what: "move, stopped in the second half", change: func() autoscale.Change {
			return autoscale.Change{Action: autoscale.Move, Stage: autoscale.Decode, From: "prefill-0", Instance: "decoder-0", Numbers: last("prefill-0")}
		}, rate: 256 << 10, killed: stepped, stopped: true, npus: []string{"decoder-0 3", "prefill-0 1"}, commits: 2},
		{what: "move, stopped before it asks for anything", change: func() autoscale.Change {
			return autoscale.Change{Action: autoscale.Move, Stage: autoscale.Prefill, From: "decoder-0", Instance: "prefill-0", Numbers: last("decoder-0")}
		}, until: "noted", stopped: true, npus: []string{"decoder-0 2", "prefill-0 2"}, commits: 2},
		{what: "add, not asked for yet", change: func() autoscale.Change {
			return autoscale.Change{Action: autoscale.Add, Stage: autoscale.Decode, Roles: "D", NPUs: 1, Count: 1}
		}, until: "noted", npus: []string{"decoder-1 1"}},
		{what: "add, in the middle", change: func() autoscale.Change {
			return autoscale.Change{Action: autoscale.Add, Stage: autoscale.Encode, Roles: "E", NPUs: 1, Count: 1}
		}, killed: func(string) bool { return c.count("encoder") == 2 }, npus: []string{"encoder-1 1"}},
		{what: "move to a new process, between the halves", change: func() autoscale.Change {
			return autoscale.Change{Action: autoscale.Move, Stage: autoscale.Prefill, Roles: "P", NPUs: 1, From: "decoder-0", Numbers: last("decoder-0")}
		}, until: "left", npus: []string{"decoder-0 1", "prefill-1 1"}, commits: 1},
		{what: "remove, in the middle", change: func() autoscale.Change {
			return autoscale.Change{Action: autoscale.Remove, Stage: autoscale.Decode, Roles: "D", Instance: "decoder-1"}
		}, killed: func(string) bool { return c.count("decoder") == 1 }, npus: []string{"decoder-0 1"}},
	} {
		id := fmt.Sprintf("op%d", i)
		d := doomed{NATS: "nats://" + c.nats, Operation: lead.Operation{ID: id, Change: x.change()}, Until: x.until, Rate: x.rate}
		d.Operation.Change.Node = node
		first, said := startDoomed(t, &d)
		if x.killed != nil {
			c.await(t, x.what+": it is time to kill", func() bool { return x.killed(id + "x0") }, func() string { return fmt.Sprint(c.kinds(t, id+"x0")) })
		}
		if x.stopped {
			if err := first.Process.Signal(syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
		} else {
			kill(t, first.Process.Pid)
			_ = first.Wait()
		}
		if x.with != "" {
			kill(t, c.pid(t, x.with))
		}
		then := append(c.kinds(t, id+"x0"), c.kinds(t, id+"x1")...)
		began := time.Now()
		successor := c.startScaler(t, "--mode", "advise", "--lease", "1s")
		c.await(t, x.what+": nothing is under way", func() bool { return noted(t, js) == nil }, func() string { return fmt.Sprintf("%+v", noted(t, js)) })
		c.expectNPUs(t, x.npus...)
		if x.stopped {
			if err := first.Process.Signal(syscall.SIGCONT); err != nil {
				t.Fatal(err)
			}
			c.await(t, x.what+": the first has seen that it does not lead", func() bool {
				return strings.Contains(said.String(), "leads no more")
			}, said.String)
			kill(t, first.Process.Pid)
			_ = first.Wait()
		}
		t.Logf("%s: killed or stopped behind %v, ended by the successor %v later", x.what, then, time.Since(began).Round(time.Millisecond))
		if err := successor.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if err := successor.Wait(); err != nil {
			t.Errorf("%s: the successor: %v", x.what, err)
		}
		for k := range x.commits {
			kinds := c.told(t, fmt.Sprintf("%sx%d", id, k))
			if n := len(slices.DeleteFunc(slices.Clone(kinds), func(k string) bool { return k != wire.EventScaleCommit })); n != 1 {
				t.Errorf("%s: half %d came to its commit %d times: %v", x.what, k, n, kinds)
			}
		}
		commits += x.commits
	}
	all := c.events(t, "--kind", wire.EventScaleCommit)
	if len(all) != commits {
		t.Errorf("%d operations came to their commit, %d were asked for", len(all), commits)
	}
	if e, p, d := c.count("encoder"), c.count("prefill"), c.count("decoder"); e != 2 || p != 2 || d != 1 {
		t.Errorf("there are %d encoders, %d of prefill and %d decoders", e, p, d)
	}
	l.end(t)
	c.expectNoMemory(t)
	if c.metric(t, "trireme_request_restarts_total") != 0 {
		t.Error("requests were started again")
	}
}

// count is how many processes of a service run.
func (c *cluster) count(service string) (n int) {
	for _, p := range c.children() {
		if p.role == service {
			n++
		}
	}
	return n
}

// named is the instance of a name.
func (c *cluster) named(tb testing.TB, name string) wire.Instance {
	tb.Helper()
	all := c.instances(tb)
	i := slices.IndexFunc(all, func(i wire.Instance) bool { return i.Name == name && alive(i) })
	if i < 0 {
		tb.Fatalf("there is no %s, but %+v", name, all)
	}
	return all[i]
}

// alive reports whether the process of a heartbeat is there: heartbeats outlive those that are killed, and what a dead one had its
// successor may not have.
func alive(i wire.Instance) bool { return syscall.Kill(i.PID, 0) == nil }

// startDoomed starts a scaler that is to be killed, and waits until it has begun.
func startDoomed(t *testing.T, d *doomed) (*exec.Cmd, *syncBuffer) {
	t.Helper()
	text, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), doomedVariable+"="+string(text))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	said := new(syncBuffer)
	cmd.Stderr = said
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "reached") {
		t.Fatalf("the first scaler has not begun: %q, %v\n%s", line, err, said.String())
	}
	return cmd, said
}

// startScaler starts a scaler.
func (c *cluster) startScaler(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, append([]string{"scaler", "run", "--nats-url", "nats://" + c.nats}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stderr = c.log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	return cmd
}
