package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/hbm"
)

// hbmReserve is longer than NPUs are kept for an instance.
const hbmReserve = time.Minute

// role runs `trireme role` with --json. err says that it has failed, and how.
func (c *cluster) role(tb testing.TB, args ...string) (r bus.RoleReport, err error) {
	tb.Helper()
	err = reported(tb, c.roleCommand(tb, args...), &r)
	return r, err
}

func (c *cluster) roleCommand(tb testing.TB, args ...string) *exec.Cmd {
	tb.Helper()
	path, err := binary()
	if err != nil {
		tb.Fatal(err)
	}
	return exec.Command(path, append([]string{"role", "--json", "--timeout", "2m", "--nats-url", "nats://" + c.nats}, args...)...)
}

// npuOf is one of the NPUs of the instance of a name, as status names it, the last one.
func (c *cluster) npuOf(tb testing.TB, name string) string {
	tb.Helper()
	for _, i := range c.instances(tb) {
		if i.Name == name && len(i.NPUs) > 0 {
			return fmt.Sprintf("%s/%d", i.Node, i.NPUs[len(i.NPUs)-1])
		}
	}
	tb.Fatalf("%s has no NPU", name)
	return ""
}

// An NPU goes from each role to each other one and back while 16 clients stream, with pictures and without: nobody sees it.
func TestRoleSwitch(t *testing.T) {
	t.Parallel()
	for _, domains := range []string{"node", "per-npu"} {
		t.Run(domains, func(t *testing.T) {
			t.Parallel()
			roleSwitch(t, domains)
		})
	}
}

func roleSwitch(t *testing.T, domains string) {
	c := start(t, "--topology", "1E1P1Dx2", "--threads", "1", "--domains", domains)
	l := newLoad(t, c)
	l.begin()
	defer l.stop.Store(true)
	npus := map[string]int{"encoder": 1, "prefill": 1, "decoder": 2}
	at := "decoder" // the NPU that moves
	for _, to := range []string{"encoder", "prefill", "encoder", "decoder", "prefill", "decoder"} {
		npu := c.npuOf(t, at+"-0")
		r, err := c.role(t, npu, to)
		if err != nil || r.NPU != npu || r.Leave == nil || !r.Leave.Committed || r.Leave.Why != "" || !r.Join.Committed || r.Join.Why != "" {
			t.Fatalf("%s from %s to %s: %+v, %v", npu, at, to, r, err)
		}
		t.Logf("from %s to %s: left in %v, joined in %v, %d bytes copied, steps held up for %v and %v", at, to, r.Leave.Total, r.Join.Total,
			r.Join.Copied, r.Leave.Pause, r.Join.Pause)
		npus[at]--
		npus[to]++
		at = to
		c.expectNPUs(t, fmt.Sprint("encoder-0 ", npus["encoder"]), fmt.Sprint("prefill-0 ", npus["prefill"]), fmt.Sprint("decoder-0 ", npus["decoder"]))
	}
	l.end(t)
	c.expectNoMemory(t)
	if c.metric(t, "trireme_request_restarts_total") != 0 {
		t.Error("requests were started again")
	}
}

// What cannot be done is not begun, and what is cut off leaves the NPU spare: a command that is killed between the two operations, and
// whoever takes the NPU in its own.
func TestRoleSwitchCutOff(t *testing.T) {
	t.Parallel()
	address := fmt.Sprintf("127.0.0.1:%d", freePort(t))
	c := startWith(t, []string{"TRIREME_ADMIN=" + address}, "--topology", "1E1P1Dx2,1Dx0", "--threads", "1", "--domains", "node")
	c.expectNPUs(t, "decoder-0 2", "decoder-1 0")
	node := strings.Split(c.npuOf(t, "decoder-0"), "/")[0]
	for _, x := range []struct {
		args []string
		want string
	}{
		{[]string{c.npuOf(t, "prefill-0"), "decoder"}, "no other instance with NPUs could prefill"},
		{[]string{c.npuOf(t, "decoder-0"), "EPD"}, "no instance on node " + node + " is encode and prefill and decode"},
		{[]string{node + "/9", "decoder"}, "has no NPU 9"},
		{[]string{"nowhere/0", "decoder"}, "no HMM of a node nowhere"},
		{[]string{"0", "decoder"}, "write node/index"},
		{[]string{node + "/0", "cook"}, "no role is called"},
	} {
		if r, err := c.role(t, x.args...); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%v: %+v, %v; want %q", x.args, r, err, x.want)
		}
	}
	npu := c.npuOf(t, "decoder-0")
	if r, err := c.role(t, npu, "decoder"); err != nil || r.Moves {
		t.Errorf("it is so already: %+v, %v", r, err)
	}
	if r, err := c.role(t, npu, "prefill", "--dry-run"); err != nil || r.Leave.Committed || r.Join.Committed || !r.Join.Plan.Moves {
		t.Errorf("a dry run: %+v, %v", r, err)
	}
	c.expectNPUs(t, "decoder-0 2", "decoder-1 0", "prefill-0 1")

	// The command is killed while the first operation goes on, which ends by itself; the NPU is kept for the taker, then for anybody.
	var said bytes.Buffer
	cmd := c.roleCommand(t, npu, "prefill", "--hold", "prepare", "--hold-time", "10s") // it must not come to the second one before it is killed
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c.await(t, "the NPU is about to leave", func() bool { return len(c.events(t, "--kind", "scale.prepare")) > 0 }, said.String)
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	c.expectNPUs(t, "decoder-0 1", "prefill-0 1")
	c.expectWithin(t, hbmReserve, "the NPU is spare", func(s hbm.Stats) bool { return spares(s) == 1 })

	// The taker is killed before its commit.
	said.Reset()
	cmd = c.roleCommand(t, npu, "prefill", "--hold", "prepare", "--hold-time", "1m")
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c.await(t, "the NPU is about to join", func() bool { return len(c.events(t, "--kind", "scale.prepare")) > 1 }, said.String)
	kill(t, c.pid(t, "prefill"))
	if err := cmd.Wait(); err == nil || !strings.Contains(said.String(), "is spare") {
		t.Errorf("the taker was killed: %v, %s", err, said.String())
	}
	c.waitReady(t)
	c.expectNPUs(t, "decoder-0 1", "prefill-0 1")
	c.expectWithin(t, hbmReserve, "the NPU is spare", func(s hbm.Stats) bool { return spares(s) == 1 })

	// A standby takes it, over HTTP.
	resp, err := http.Post(fmt.Sprintf("http://%s/admin/npus/%s/role", address, npu), "application/json", strings.NewReader(`{"role":"decoder"}`))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var r bus.RoleReport
	if err := json.NewDecoder(resp.Body).Decode(&r); err != nil || resp.StatusCode != http.StatusOK || r.Leave != nil || !r.Join.Committed {
		t.Errorf("over HTTP: %d, %+v, %v", resp.StatusCode, r, err)
	}
	c.expectNPUs(t, "decoder-0 1", "decoder-1 1")
}
