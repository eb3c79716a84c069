package e2e

import "testing"

// Experts that kernels find in ranges of addresses: rebalanced, grown, given up in the middle and shrunk under load, where an operation maps
// the ranges of the next epoch beside serving and unmaps those of the last. No answer changes.
func TestExpertsInRanges(t *testing.T) {
	t.Parallel()
	c := start(t, "--topology", "1E1P1Dx2+1", "--threads", "1", "--domains", "per-npu", "--indirection", "ranges")
	l := newLoad(t, c)
	l.begin()
	defer l.stop.Store(true)
	l.waitOpen(t)
	for _, args := range [][]string{{"rebalance", "decoder", "--spare", "0.5", "--slack", "0"}, {"scale", "decoder", "3"}} {
		r, err := c.change(t, args...)
		if err != nil || !r.Committed || r.Why != "" || r.Maps < r.Plan.Copies || r.Unmaps == 0 || r.Mapping == 0 {
			t.Errorf("%v: %+v, %v", args, r, err)
		}
		t.Logf("%v: %d experts copied, %d maps in %v, %d unmaps", args, r.Plan.Copies, r.Maps, r.Mapping, r.Unmaps)
	}
	if late, err := c.change(t, "scale", "decoder", "2", "--timeout", "300ms", "--hold", "prepare", "--hold-time", "400ms"); err == nil || late.Committed {
		t.Errorf("what is late is given up: %+v, %v", late, err)
	}
	if r, err := c.change(t, "scale", "decoder", "2"); err != nil || !r.Committed || r.Maps == 0 {
		t.Errorf("back: %+v, %v", r, err)
	}
	l.waitOpen(t)
	l.end(t)
	c.expectNoMemory(t)
}
