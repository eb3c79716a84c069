package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"trireme.dev/shared/wire"
)

// instances are the heartbeats.
func (c *cluster) instances(tb testing.TB) []wire.Instance {
	tb.Helper()
	var s struct{ Instances []wire.Instance }
	data, err := json.Marshal(c.status(tb))
	if err == nil {
		err = json.Unmarshal(data, &s)
	}
	if err != nil {
		tb.Fatal(err)
	}
	return s.Instances
}

// expectNPUs waits until instances have so many NPUs, "decoder-1 0", and say that they are ready, or stand by.
func (c *cluster) expectNPUs(tb testing.TB, want ...string) {
	tb.Helper()
	var now []wire.Instance
	c.await(tb, fmt.Sprintf("NPUs are %v", want), func() bool {
		now = c.instances(tb)
		for _, w := range want {
			var name string
			var npus int
			_, _ = fmt.Sscan(w, &name, &npus)
			there := false
			for _, i := range now {
				there = there || i.Name == name && len(i.NPUs) == npus && i.Ready && i.Standby == (npus == 0) && alive(i)
			}
			if !there {
				return false
			}
		}
		return true
	}, func() string { return fmt.Sprintf("%+v", now) })
}

// A standby decoder is given the NPU of the other one, and back, while 16 clients stream: nobody sees it. The last one with NPUs is not
// made a standby.
func TestStandby(t *testing.T) {
	t.Parallel()
	for _, domains := range []string{"node", "per-npu"} {
		t.Run(domains, func(t *testing.T) {
			t.Parallel()
			standby(t, domains)
		})
	}
}

func standby(t *testing.T, domains string) {
	c := start(t, "--topology", "1E1P1D,1Dx0+1", "--threads", "1", "--domains", domains)
	c.expectNPUs(t, "decoder-0 1", "decoder-1 0")
	eventually(t, "an event tells of the standby", func() bool { return len(c.events(t, "--kind", wire.EventStandby)) > 0 })
	if ready := c.events(t, "--kind", wire.EventStandby); len(ready) != 1 || !strings.HasPrefix(ready[0].Instance, "decoder-1") {
		t.Errorf("events of standbys: %+v", ready)
	}
	if _, err := c.change(t, "scale", "decoder-0", "0"); err == nil || !strings.Contains(err.Error(), "no other instance with NPUs could decode") {
		t.Errorf("the last decoder: %v", err)
	}
	l := newLoad(t, c)
	l.begin()
	defer l.stop.Store(true)
	for _, x := range []struct{ up, down string }{{"decoder-1", "decoder-0"}, {"decoder-0", "decoder-1"}} {
		r, err := c.change(t, "scale", x.up, "1", "--timeout", "2m")
		if err != nil || !r.Committed || r.Why != "" {
			t.Fatalf("%s promoted: %+v, %v", x.up, r, err)
		}
		// In one memory domain all is there.
		if domains == "node" && (r.Plan.Bytes > 0 || r.Copied > 0 || r.Plan.Shared != r.Plan.Copies) {
			t.Errorf("%s: %+v", x.up, r)
		}
		c.expectNPUs(t, x.up+" 1", x.down+" 1")
		t.Logf("promoted in %v: prepared in %v, warm in %v, %d bytes copied", r.Total, r.Copying, r.Warming, r.Copied)
		l.waitOpen(t) // it has its part of what comes now
		if r, err = c.change(t, "scale", x.down, "0", "--timeout", "2m"); err != nil || !r.Committed || r.Why != "" {
			t.Fatalf("%s made a standby: %+v, %v", x.down, r, err)
		}
		c.expectNPUs(t, x.up+" 1", x.down+" 0")
		t.Logf("made a standby in %v", r.Total)
		if n := spares(c.memory(t)); n != 1 {
			t.Errorf("%d NPUs are spare", n)
		}
		if _, err := c.change(t, "scale", x.up, "0"); err == nil || !strings.Contains(err.Error(), "could decode") {
			t.Errorf("the last decoder: %v", err)
		}
	}
	l.end(t)
	c.expectNoMemory(t)
	if c.metric(t, "trireme_request_restarts_total") != 0 {
		t.Error("requests were started again")
	}
}
