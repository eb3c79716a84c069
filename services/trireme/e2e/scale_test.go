package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/wire"
)

// spares are how many NPUs nobody has.
func spares(s hbm.Stats) (n int) {
	for _, m := range s.Memory {
		if m.NPU >= 0 && m.Instance == "" && m.Reserved == "" {
			n++
		}
	}
	return n
}

// expectDecoder waits until the decoder has so many NPUs, in an epoch, and the others are spare.
func (c *cluster) expectDecoder(tb testing.TB, npus, spare int, epoch uint64) {
	tb.Helper()
	var now wire.Instance
	c.await(tb, fmt.Sprintf("the decoder has %d NPUs in epoch %d", npus, epoch), func() bool {
		now = c.decoder(tb)
		return len(now.NPUs) == npus && now.Epoch == epoch
	}, func() string { return fmt.Sprintf("%+v", now) })
	if n := spares(c.memory(tb)); n != spare {
		tb.Errorf("%d NPUs are spare, want %d", n, spare)
	}
}

// The NPUs of a decoder are changed again and again, 2 to 4 to 3 to 6 to 2, while 16 clients stream: nobody sees it, every NPU that has left is
// spare, and at the end the memory of all is where it was after the first time. The full form is
//
//	TRIREME_CHAOS=200 go test ./services/trireme/e2e -run TestScaleUnderLoad -v -timeout 120m
//
// where the number is that of cycles.
func TestScaleUnderLoad(t *testing.T) {
	t.Parallel()
	for _, domains := range []string{"node", "per-npu"} {
		t.Run(domains, func(t *testing.T) {
			t.Parallel()
			scaleUnderLoad(t, domains)
		})
	}
}

func scaleUnderLoad(t *testing.T, domains string) {
	cycles, _ := disturbances(t, 2, 1)
	metrics := map[string]string{}
	settings := ""
	for _, role := range []string{"hmm", "decoder", "prefill", "encoder"} {
		metrics[role] = fmt.Sprintf("127.0.0.1:%d", freePort(t))
		settings += role + ":\n  metrics: " + metrics[role] + "\n"
	}
	file := filepath.Join(t.TempDir(), "trireme.yaml")
	if err := os.WriteFile(file, []byte(settings), 0o600); err != nil {
		t.Fatal(err)
	}
	c := start(t, "--topology", "1E1P1Dx2+4", "--threads", "1", "--domains", domains, "--config", file)
	metrics["gateway"] = strings.TrimPrefix(c.url, "http://")
	js := c.jetstream(t)
	l := newLoad(t, c)
	l.begin()
	defer l.stop.Store(true)
	var early estate
	var spent [4][]time.Duration // by change
	for cycle := range cycles {
		for i, npus := range []string{"4", "-1", "+3", "2"} {
			spent[i] = append(spent[i], c.scaleOnce(t, npus, domains, uint64(4*cycle+i+1)))
		}
		if cycle == 0 {
			l.end(t)
			early = c.estate(t, js, metrics)
			l.again()
		}
		if t.Failed() {
			break
		}
		if cycle%10 == 9 {
			t.Logf("%s: %d cycles, %d answers", time.Now().Format("15:04:05"), cycle+1, l.count())
		}
	}
	l.end(t)
	for i, change := range []string{"2 to 4", "4 to 3", "3 to 6", "6 to 2"} {
		slices.Sort(spent[i])
		t.Logf("%s NPUs: median %v, p90 %v, longest %v until all was in force", change, quantile(spent[i], 0.5), quantile(spent[i], 0.9), quantile(spent[i], 1))
	}
	t.Logf("%d cycles, %d answers", cycles, l.answers)
	c.estate(t, js, metrics).expectNoMore(t, early, domains == "node")
	if c.metric(t, "trireme_request_restarts_total") != 0 {
		t.Error("requests were started again")
	}
}

// scaleOnce gives the decoder other NPUs, which must come to be in force as an epoch, and returns how long that took.
func (c *cluster) scaleOnce(t *testing.T, npus, domains string, epoch uint64) time.Duration {
	t.Helper()
	r, err := c.change(t, "scale", "decoder", npus, "--timeout", "5m")
	if err != nil || r.State != "done" || !r.Committed || r.Why != "" {
		t.Fatalf("%s: %+v, %v", npus, r, err)
	}
	// In one memory domain all is there. Else what comes to an NPU is copied, if it does not rest there since an epoch before, and no more than
	// was foreseen. The NPUs that join in the first cycle are new, but for one.
	far := domains == "per-npu"
	fresh := far && (epoch == 1 || epoch == 3)
	if r.Copied > r.Plan.Bytes || !far && r.Plan.Bytes > 0 || fresh && r.Copied == 0 {
		t.Errorf("%s: %d bytes were to be copied, %d were, with domains %s", npus, r.Plan.Bytes, r.Copied, domains)
	}
	after := wire.NPUCount(r.Plan.After)
	c.expectDecoder(t, after, 6-after, epoch)
	if epoch <= 4 {
		t.Logf("%d to %d NPUs (%s): planned in %v, prepared in %v, warm in %v, record written in %v, steps held up for %v, in all %v",
			wire.NPUCount(r.Plan.Before), after, npus, r.Planning, r.Copying, r.Warming, r.Committal, r.Pause, r.Total)
	}
	if epoch > 8 { // events become many
		return r.Total
	}
	want := []string{wire.EventScalePlan, wire.EventScalePrepare, wire.EventScaleCommit, wire.EventScaleRelease, wire.EventScaleDone}
	if k := c.told(t, r.ID); !slices.Equal(k, want) {
		t.Errorf("events %v, want %v", k, want)
	}
	return r.Total
}

// An operation reports how much memory it took at most, which is what the larger layout needs and each expert that moves once more, as the dry
// run says, and a hundredth at most.
func TestScaleMemory(t *testing.T) {
	t.Parallel()
	c := start(t, "--topology", "1E1P1Dx4+2", "--threads", "1", "--domains", "per-npu")
	l := newLoad(t, c)
	l.begin() // there is a load to be balanced
	l.waitOpen(t)
	l.end(t)
	c.expectNoMemory(t)
	for _, change := range [][]string{
		{"rebalance", "decoder"}, {"scale", "decoder", "6"}, {"scale", "decoder", "3"}, {"scale", "decoder", "5"}, {"scale", "decoder", "2"},
	} {
		r, err := c.change(t, change...)
		if err != nil || !r.Plan.Moves {
			t.Fatalf("%v: %+v, %v", change, r, err)
		}
		larger := max(r.UsedBefore, r.UsedAfter)
		if r.UsedBefore == 0 || r.UsedAfter == 0 || r.Peak < larger || r.Peak > (larger+r.Plan.Memory)*101/100 || r.Plan.Memory > r.Plan.Bytes {
			t.Errorf("%v: %d bytes at most, before %d, after %d; %d more than the larger of both were foreseen, of %d bytes that come", change,
				r.Peak, r.UsedBefore, r.UsedAfter, r.Plan.Memory, r.Plan.Bytes)
		}
		if now := inUse(c.memory(t), npusOf(r.Plan.After)); now != r.UsedAfter {
			t.Errorf("%v: the HMM's books say %d bytes, the operation %d", change, now, r.UsedAfter)
		}
		t.Logf("%v: %.1f to %.1f MB, %.1f at most; foreseen are %.1f beside the larger layout", change, float64(r.UsedBefore)/1e6, float64(r.UsedAfter)/1e6,
			float64(r.Peak)/1e6, float64(r.Plan.Memory)/1e6)
	}
}

// inUse is what is booked to NPUs, each of which is a memory domain, and to these, but for what only a cache keeps.
func inUse(s hbm.Stats, npus []int) (bytes int64) {
	for _, n := range npus {
		for _, m := range []hbm.NPUStats{s.Memory[n+1], s.Shared[n]} {
			bytes += m.Used + m.Padded - m.Cached
		}
	}
	return bytes
}

// What cannot be done is not begun, a dry run says what would be, and what takes too long is given up: everything is as it was.
func TestScaleRefused(t *testing.T) {
	t.Parallel()
	c := start(t, "--topology", "1E1P1Dx2+1", "--threads", "1", "--domains", "node")
	for _, x := range []struct {
		args []string
		want string
	}{
		{[]string{"decoder", "4"}, "2 more NPUs are wanted"},
		{[]string{"decoder", "-3"}, "cannot have -1"},
		{[]string{"decoder", "-2"}, "no other instance with NPUs could decode"},
		{[]string{"decoder", "0"}, "no other instance with NPUs could decode"},
		{[]string{"nobody", "2"}, "no such instance"},
		{[]string{"decoder", "3", "--timeout", "300ms", "--hold", "prepare", "--hold-time", "400ms"}, "not come to its commit in time"},
		{[]string{"decoder", "-1", "--timeout", "300ms", "--hold", "prepare", "--hold-time", "400ms"}, "not come to its commit in time"},
	} {
		if r, err := c.change(t, append([]string{"scale"}, x.args...)...); err == nil || !strings.Contains(err.Error(), x.want) || r.Committed {
			t.Errorf("%v: %+v, %v; want %q", x.args, r, err, x.want)
		}
		c.expectDecoder(t, 2, 1, 0)
	}
	dry, err := c.change(t, "scale", "decoder", "+1", "--dry-run")
	if err != nil || wire.NPUCount(dry.Plan.After) != 3 || dry.Plan.Copies == 0 || dry.Plan.Bytes != 0 {
		t.Errorf("a dry run: %+v, %v", dry, err)
	}
	if same, err := c.change(t, "scale", "decoder", "2"); err != nil || same.Plan.Moves || same.Epoch != 0 {
		t.Errorf("as many as there are: %+v, %v", same, err)
	}
	c.expectDecoder(t, 2, 1, 0)
	var answer struct{ Usage struct{ Total int } }
	if status, body := c.post(t, "/v1/completions", `{"prompt":"Hi","max_tokens":4}`); status != 200 || json.Unmarshal([]byte(body), &answer) != nil {
		t.Errorf("afterwards: %d %s", status, body)
	}
}

// A decoder that was given more NPUs and dies is started again with them, and with its experts where they were; and so when the HMM
// dies.
func TestScaledInstanceComesBack(t *testing.T) {
	t.Parallel()
	c := start(t, "--topology", "1E1P1Dx2+2", "--threads", "1", "--domains", "node")
	if _, err := c.change(t, "scale", "decoder", "4"); err != nil {
		t.Fatal(err)
	}
	c.expectDecoder(t, 4, 0, 1)
	for _, victim := range []string{"decoder", "hmm"} {
		before := c.decoder(t)
		old := c.children()
		kill(t, c.pid(t, victim))
		for _, p := range old {
			if p.role == "decoder" {
				c.waitExit(t, p)
			}
		}
		c.await(t, "another decoder", func() bool { return c.decoder(t).PID != before.PID }, func() string { return victim })
		c.waitReady(t)
		c.expectDecoder(t, 4, 0, 1)
	}
	if _, err := c.change(t, "scale", "decoder", "1"); err != nil {
		t.Fatal(err)
	}
	c.expectDecoder(t, 1, 3, 2)
}

// What was scaled outlives also a death of `trireme up`, unless it is started again with another topology, in which others may need the NPUs.
func TestScaledInstanceAndAnotherTopology(t *testing.T) {
	t.Parallel()
	data := t.TempDir()
	for _, x := range []struct {
		topology string
		scale    string
		npus     int
		epoch    uint64
	}{{"1E1P1Dx2+2", "4", 4, 1}, {"1E1P1Dx2+2", "", 4, 1}, {"1E1P1Dx2", "", 2, 0}} {
		c := start(t, "--topology", x.topology, "--threads", "1", "--domains", "node", "--node", "n", "--data", data)
		c.data = data
		if x.scale != "" {
			if _, err := c.change(t, "scale", "decoder", x.scale); err != nil {
				t.Fatal(err)
			}
		}
		c.expectDecoder(t, x.npus, 0, x.epoch)
		all := c.children()
		c.killed = true
		kill(t, c.cmd.Process.Pid)
		<-c.exited
		c.await(t, "its children have ended with it", func() bool {
			return !slices.ContainsFunc(all, func(p process) bool { return syscall.Kill(p.pid, 0) == nil })
		}, func() string { return fmt.Sprint(all) })
	}
}
