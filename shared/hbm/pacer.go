package hbm

import (
	"context"
	"runtime"
	"sync"
	"time"
)

// Pacer keeps copies to a rate: all that are given the same one together. It may be used by several goroutines.
type Pacer struct {
	rate int64 // bytes a second

	mu  sync.Mutex
	due time.Time // when what was copied so far is within the rate
}

// NewPacer returns one for so many bytes a second from now on; nil, which is any rate, for 0.
func NewPacer(rate int64) *Pacer {
	if rate <= 0 {
		return nil
	}
	return &Pacer{rate: rate, due: time.Now()}
}

// copierRate is what one goroutine that copies and checks keeps up with on any machine, bytes a second.
const copierRate = 1 << 30

// copiers says how many goroutines keep to the rate together.
func (p *Pacer) copiers() int {
	return int(min(int64(beside()), 1+(p.rate-1)/copierRate))
}

// beside says how many processors may work on copies at a rate, beside whatever the NPUs compute.
func beside() int { return max(1, runtime.GOMAXPROCS(0)/4) }

// catchUp is how far copies may make up for time in which nothing was copied: what lies between two of them, calls of the HMM and
// maps, would come on top of the rate else.
const catchUp = 200 * time.Millisecond

// after notes that bytes more were copied, and returns when that is within the rate.
func (p *Pacer) after(now time.Time, bytes int) time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	if earliest := now.Add(-catchUp); p.due.Before(earliest) {
		p.due = earliest
	}
	p.due = p.due.Add(time.Duration(float64(bytes) / float64(p.rate) * float64(time.Second)))
	return p.due
}

// wait notes that bytes more were copied, and returns when that is within the rate, or ctx ends.
func (p *Pacer) wait(ctx context.Context, bytes int) error {
	if p == nil {
		return nil
	}
	late := time.Until(p.after(time.Now(), bytes))
	if late <= 0 {
		return nil
	}
	t := time.NewTimer(late)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
