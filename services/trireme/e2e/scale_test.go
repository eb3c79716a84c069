package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

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

// held is what a process holds of the system.
type held struct {
	resident, threads, files int
}

func holds(tb testing.TB, pid int) (h held) {
	tb.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		tb.Fatal(err)
	}
	for line := range bytes.Lines(status) {
		_, _ = fmt.Sscanf(string(line), "VmRSS: %d kB", &h.resident)
		_, _ = fmt.Sscanf(string(line), "Threads: %d", &h.threads)
	}
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		tb.Fatal(err)
	}
	h.files = len(files)
	return h
}

// The NPUs of a decoder are changed again and again, 2 to 4 to 3 to 6 to 2, while 16 clients stream: nobody sees it, every NPU that has left is
// spare, and at the end the memory of all is where it was.
func TestScaleUnderLoad(t *testing.T) {
	for _, domains := range []string{"node", "per-npu"} {
		t.Run(domains, func(t *testing.T) { scaleUnderLoad(t, domains) })
	}
}

func scaleUnderLoad(t *testing.T, domains string) {
	cycles, _ := disturbances(t, 2, 1)
	c := start(t, "--topology", "1E1P1Dx2+4", "--threads", "1", "--domains", domains)
	l := newLoad(t, c)
	l.begin()
	defer l.stop.Store(true)
	epoch := uint64(0)
	var early held
	for cycle := range cycles {
		for _, npus := range []string{"4", "-1", "+3", "2"} {
			before := len(c.decoder(t).NPUs)
			r, err := c.change(t, "scale", "decoder", npus, "--timeout", "5m")
			if err != nil || r.State != "done" || !r.Committed || r.Why != "" {
				t.Fatalf("%s: %+v, %v", npus, r, err)
			}
			// In one memory domain all is there; else what joins gets its weights, and no more than was foreseen.
			if far := domains == "per-npu"; far != (r.Plan.Bytes > 0) || far != (r.Copied > 0) || r.Copied > r.Plan.Bytes {
				t.Errorf("%s: %d bytes were to be copied, %d were, with domains %s", npus, r.Plan.Bytes, r.Copied, domains)
			}
			epoch++
			after := wire.NPUCount(r.Plan.After)
			c.expectDecoder(t, after, 6-after, epoch)
			t.Logf("%d to %d NPUs (%s): planned in %v, prepared in %v, warm in %v, record written in %v, steps held up for %v, in all %v", before, after, npus,
				r.Planning, r.Copying, r.Warming, r.Committal, r.Pause, r.Total)
			want := []string{wire.EventScalePlan, wire.EventScalePrepare, wire.EventScaleCommit, wire.EventScaleRelease, wire.EventScaleDone}
			if k := c.kinds(t, r.ID); !slices.Equal(k, want) {
				t.Errorf("events %v, want %v", k, want)
			}
		}
		if cycle == 0 {
			early = holds(t, c.pid(t, "decoder"))
		}
	}
	l.end(t)
	late := holds(t, c.pid(t, "decoder"))
	t.Logf("after one cycle %+v, after %d %+v, %d answers", early, cycles, late, l.answers)
	if late.resident > early.resident+64<<10 || late.threads > early.threads+8 || late.files > early.files+2 {
		t.Errorf("the decoder holds %+v after %d cycles, %+v after the first", late, cycles, early)
	}
	c.expectNoMemory(t)
	if c.metric(t, "trireme_request_restarts_total") != 0 {
		t.Error("requests were started again")
	}
}

// What cannot be done is not begun, a dry run says what would be, and what takes too long is given up: everything is as it was.
func TestScaleRefused(t *testing.T) {
	c := start(t, "--topology", "1E1P1Dx2+1", "--threads", "1", "--domains", "node")
	for _, x := range []struct {
		args []string
		want string
	}{
		{[]string{"decoder", "4"}, "2 more NPUs are wanted"},
		{[]string{"decoder", "-2"}, "cannot have 0"},
		{[]string{"decoder", "0"}, "cannot have 0"},
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
