package cpu

import (
	"sync/atomic"
	"testing"
)

type counting struct {
	runs    []atomic.Int32
	workers [8]atomic.Int32 // pieces that the worker runs at this moment
	t       *testing.T
}

func (c *counting) run(worker, i int) {
	if c.workers[worker].Add(1) != 1 {
		c.t.Errorf("worker %d runs two pieces at once", worker)
	}
	c.runs[i].Add(1)
	c.workers[worker].Add(-1)
}

// TestPool tests that each piece of each task runs exactly once and before do returns, however the workers wake.
func TestPool(t *testing.T) {
	for threads := 1; threads <= 8; threads++ {
		p := newPool(threads)
		for task := range 3000 {
			n := task * 7 % 23
			c := &counting{runs: make([]atomic.Int32, n), t: t}
			p.do(c, n)
			for i := range c.runs {
				if got := c.runs[i].Load(); got != 1 {
					t.Fatalf("%d threads, task %d: piece %d of %d ran %d times", threads, task, i, n, got)
				}
			}
		}
		p.close()
	}
}

func TestShare(t *testing.T) {
	for total := range 40 {
		for n := 1; n < 9; n++ {
			next := 0
			for i := range n {
				from, to := share(total, 4, i, n)
				if from != next || to < from || from%4 != 0 && from != total {
					t.Fatalf("part %d of %d of %d is [%d, %d), want from %d on", i, n, total, from, to, next)
				}
				next = to
			}
			if next != total {
				t.Fatalf("%d parts of %d end at %d", n, total, next)
			}
		}
	}
}
