package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/wire"
)

// anything is an operation on an instance, and what happens meanwhile.
type anything struct {
	who    string
	args   []string
	victim string // who is killed; "": nobody
	after  time.Duration
}

// draw makes an operation that may be impossible, too short of time, or nothing to do.
func draw(rng *rand.Rand) anything {
	pick := func(of ...string) string { return of[rng.IntN(len(of))] }
	x := anything{who: pick("decoder", "decoder", "decoder", "prefill")}
	switch rng.IntN(6) {
	case 0:
		x.args = []string{"scale", x.who, fmt.Sprint(1 + rng.IntN(6))}
	case 1:
		x.args = []string{"scale", x.who, fmt.Sprintf("+%d", 1+rng.IntN(3))}
	case 2:
		x.args = []string{"scale", x.who, fmt.Sprintf("-%d", 1+rng.IntN(3))}
	case 3:
		x.args = []string{"rebalance", x.who}
	default: // whoever has the NPU, if anybody, may be the taker, or have no other one
		x.who = pick("decoder", "prefill", "encoder")
		x.args = []string{"role", fmt.Sprintf("NODE/%d", rng.IntN(8)), x.who}
	}
	x.args = append(x.args, "--spare", pick("0", "0.25", "0.6"), "--slack", pick("0", "0.05"), "--copy-rate", pick("0", "100MiB", "20MiB"))
	switch rng.IntN(10) {
	case 0:
		x.args = append(x.args, "--dry-run")
	case 1, 2:
		x.args = append(x.args, "--timeout", fmt.Sprintf("%dms", 1+rng.IntN(400)))
	default:
		x.args = append(x.args, "--timeout", "2m")
	}
	if rng.IntN(5) < 2 {
		x.victim = pick("decoder", "prefill", "hmm", "nats", "command")
		x.after = time.Duration(rng.IntN(700)) * time.Millisecond
	}
	return x
}

// heartbeat is that of the one instance of a role, waited for.
func (c *cluster) heartbeat(tb testing.TB, view *bus.Instances, role string) wire.Instance {
	tb.Helper()
	var all []wire.Instance
	c.await(tb, "one instance is ready for "+role, func() bool {
		all = slices.DeleteFunc(view.All(), func(i wire.Instance) bool { return i.Role != role || !i.Ready })
		return len(all) == 1
	}, func() string { return fmt.Sprintf("%+v", all) })
	return all[0]
}

// Whatever is asked for, to scale or rebalance decoder or prefill, or to have an NPU go over to another role, possible or not, in time or not, and whoever is killed meanwhile, the decoder, prefill, the HMM, NATS or the
// command: each operation ends, as its record says; NPUs belong to whom it says they do; no request is lost, refused or changed, and
// at the end nothing is left in the HMM. It is short by default; the full form is
//
//	TRIREME_CHAOS=200 go test ./services/trireme/e2e -run TestChaosOfAnything -v -timeout 120m
//
// where the number is that of operations. TRIREME_CHAOS_SEED draws others.
func TestChaosOfAnything(t *testing.T) {
	t.Parallel()
	seed := chaosSeed(t)
	for i, domains := range []string{"node", "per-npu"} {
		t.Run(domains, func(t *testing.T) {
			n, _ := disturbances(t, 6, 1)
			t.Logf("%d operations drawn with TRIREME_CHAOS_SEED=%d", n, seed)
			chaosOfAnything(t, domains, rand.New(rand.NewPCG(seed, uint64(100+i))), n)
		})
	}
}

func chaosOfAnything(t *testing.T, domains string, rng *rand.Rand, n int) {
	server := bustest.RunProcess(t)
	c := start(t, "--topology", "1E1P1Dx2+4", "--threads", "1", "--domains", domains, "--nats-url", server.URL())
	c.nats = strings.TrimPrefix(server.URL(), "nats://")
	l := newLoad(t, c)
	b, err := bus.Connect(t.Context(), server.URL(), "test", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	l.begin()
	defer l.stop.Store(true)
	ends, kills := map[string]int{}, map[string]int{}
	for i := range n {
		x := draw(rng)
		if x.victim != "" {
			kills[x.victim]++
		}
		end := x.happen(t, c, b, server)
		ends[x.args[0]+" "+end]++
		t.Logf("%s: operation %d: trireme %s; %s killed after %v: %s", time.Now().Format("15:04:05"), i, strings.Join(x.args, " "),
			x.victim, x.after, end)
		if x.victim == "hmm" {
			l.waitOpen(t) // a request has three attempts
		}
		l.mu.Lock()
		troubles := len(l.troubles)
		l.mu.Unlock()
		if troubles > 0 || t.Failed() {
			t.Errorf("stopped behind operation %d", i)
			break
		}
	}
	l.end(t)
	c.waitReady(t)
	c.expectNoMemory(t)
	t.Logf("%v; kills: %v; %d answers, %d attempts started again", ends, kills, l.answers, c.metric(t, "trireme_request_restarts_total"))
}

// all are the instances of the three roles, by role.
func (c *cluster) all(t *testing.T, view *bus.Instances) map[string]wire.Instance {
	t.Helper()
	all := map[string]wire.Instance{}
	for _, role := range []string{"encode", "prefill", "decode"} {
		all[role] = c.heartbeat(t, view, role)
	}
	return all
}

// happen has it happen, and returns how the operation has ended.
func (x anything) happen(t *testing.T, c *cluster, b *bus.Bus, server *bustest.Process) string {
	t.Helper()
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	view, err := b.Instances(ctx) // a new one: an older one may be behind for a while when NATS was away
	if err != nil {
		t.Fatal(err)
	}
	before := c.all(t, view)
	args := slices.Clone(x.args)
	args[1] = strings.Replace(args[1], "NODE", before["encode"].Node, 1)
	var out, said bytes.Buffer
	cmd := exec.Command(path, append(args, "--json", "--nats-url", "nats://"+c.nats)...)
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(x.after) // drawn: any moment will do
	switch x.victim {
	case "nats":
		server.Kill()
		time.Sleep(time.Second) // long enough for whoever asks NATS something to notice
		server.Start()
	case "hmm":
		children := c.children()
		kill(t, c.pid(t, "hmm"))
		for _, p := range children {
			if p.role == "decoder" || p.role == "prefill" || p.role == "encoder" {
				c.waitExit(t, p)
			}
		}
	case "decoder", "prefill":
		p := process{c.pid(t, x.victim), x.victim}
		kill(t, p.pid)
		c.waitExit(t, p)
	case "command":
		_ = cmd.Process.Kill()
	}
	failed := cmd.Wait()
	if x.victim == "command" { // what it has begun goes on, and only one operation can be under way
		c.await(t, "nothing is under way", func() bool {
			for _, i := range before {
				if _, err := c.change(t, "scale", i.ID, fmt.Sprint(len(i.NPUs)), "--dry-run"); err != nil && strings.Contains(err.Error(), "is under way") {
					return false
				}
			}
			return true
		}, func() string { return strings.Join(x.args, " ") })
	}
	end := strings.TrimSpace(said.String())
	known := x.said(t, out.Bytes())
	if x.victim == "nats" {
		if view, err = b.Instances(ctx); err != nil {
			t.Fatal(err)
		}
	}
	now, records := x.settled(t, c, b, view)
	done := false
	for role, was := range before {
		is, record := now[role], records[role]
		switch r := known[was.Record()]; {
		case is.Epoch > was.Epoch+1, r != nil && r.Committed != (is.Epoch == was.Epoch+1):
			t.Errorf("%v, %v: %s from epoch %d to %d, the command says %+v, the record %+v\n%s", x.args, failed, role, was.Epoch, is.Epoch, r, record, end)
		case r != nil && r.Committed && x.victim == "" && !slices.Equal(npusOf(r.Plan.After), npusOf(record.NPUs)):
			t.Errorf("%v: NPUs %v, the record has %v", x.args, r.Plan.After, record.NPUs)
		}
		if is.Epoch == was.Epoch+1 && role == map[string]string{"decoder": "decode", "prefill": "prefill", "encoder": "encode"}[x.who] {
			done = true
		}
	}
	wrong := func(s string) bool { return strings.Contains(end, s) }
	switch {
	case done:
		return "done"
	case len(out.Bytes()) > 0 && failed == nil:
		return "nothing"
	case x.victim == "" && failed == nil:
		t.Errorf("%v ended well, and nothing has changed: %+v", x.args, known)
	case x.victim == "" && !wrong("not come to its commit in time") && !wrong("wanted, and node") && !wrong("cannot have") &&
		!wrong("has not ended, and goes on") && !wrong("no other instance with NPUs could"):
		t.Errorf("%v: %s", x.args, end)
	}
	return "given up"
}

// said are the reports that the command has written, by the records of the instances that they are of, unless they are of a dry run.
func (x anything) said(t *testing.T, out []byte) map[string]*wire.ChangeReport {
	t.Helper()
	known := map[string]*wire.ChangeReport{}
	if len(out) == 0 {
		return known
	}
	var role bus.RoleReport
	reports := []**wire.ChangeReport{&role.Leave, &role.Join}
	into := any(&role)
	if x.args[0] != "role" {
		var r *wire.ChangeReport
		into, reports = &r, []**wire.ChangeReport{&r}
	}
	if err := json.Unmarshal(out, into); err != nil {
		t.Errorf("%v wrote no JSON: %v\n%s", x.args, err, out)
		return known
	}
	for _, r := range reports {
		if *r != nil && (*r).Number > 0 && !slices.Contains(x.args, "--dry-run") {
			known[(*r).Record] = *r
		}
	}
	return known
}

// npusOf are the numbers in slots.
func npusOf(slots []int) []int {
	npus := slices.DeleteFunc(slices.Clone(slots), func(n int) bool { return n < 0 })
	slices.Sort(npus)
	return npus
}

// settled waits until nothing is under way, and all agree on which NPUs the instances have, and which are spare. It returns the instances and
// their records by role.
func (x anything) settled(t *testing.T, c *cluster, b *bus.Bus, view *bus.Instances) (now map[string]wire.Instance, records map[string]*wire.Layout) {
	t.Helper()
	c.waitReady(t)
	state := ""
	c.await(t, "records, heartbeats and HMM say the same", func() bool {
		now, records = c.all(t, view), map[string]*wire.Layout{}
		stats := c.memory(t)
		all, had := map[string][]int{}, 0
		for _, m := range stats.Memory {
			if m.NPU >= 0 {
				all[m.Instance] = append(all[m.Instance], m.NPU)
				if m.Instance == "" && m.Reserved != "" {
					had++
				}
			}
		}
		state = fmt.Sprintf("the HMM has %v, %d reserved", all, had)
		for role, i := range now { // the dead have one for a while, and NPUs until the HMM has noticed
			record, _, err := b.Layout(t.Context(), i.Record())
			state += fmt.Sprintf("; instance %+v, record %+v, %v", i, record, err)
			switch {
			case !slices.ContainsFunc(c.children(), func(p process) bool { return p.pid == i.PID }):
				return false
			case errors.Is(err, bus.ErrNoLayout):
				record = &wire.Layout{NPUs: i.NPUs, Epoch: i.Epoch}
			case err != nil || record.Instance != i.ID || record.Pending != nil:
				return false
			}
			if records[role] = record; record.Epoch != i.Epoch || !slices.Equal(npusOf(record.NPUs), npusOf(i.NPUs)) ||
				!slices.Equal(npusOf(i.NPUs), all[i.ID]) {
				return false
			}
		}
		return had == 0
	}, func() string { return state })
	return now, records
}
