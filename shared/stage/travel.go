package stage

import (
	"context"
	"sync"
	"time"

	"trireme.dev/shared/kv"
	"trireme.dev/shared/sched"
)

// travel is how long copies from other memory domains take, as measured.
type travel struct {
	mu   sync.Mutex
	line sched.Line // by KiB
}

// firstRate is what copies are taken to do before the first one, in KiB a second: 1 GiB/s.
const firstRate = 1 << 20

// Copy is what was copied from another memory domain.
type Copy struct {
	Role   string // for which
	Bytes  int64
	Tokens int // whose KV it is
	Visual int // tokens of pictures whose MM objects it is
}

// Copied notes a copy that was made since began. If the NPUs are paced it returns when their profile would be done with it, unless
// ctx ends first.
func (s *Stage) Copied(ctx context.Context, c Copy, began time.Time) {
	if c.Bytes <= 0 {
		return
	}
	if s.paced != nil {
		_ = pause(ctx, time.Until(began.Add(s.paced.CopyCost(c.Tokens, c.Visual)))) // who waits for it sees what has ended
	}
	s.Metrics.Copied.WithLabelValues(c.Role).Add(float64(c.Bytes))
	s.travel.mu.Lock()
	defer s.travel.mu.Unlock()
	s.travel.line.Add(int(c.Bytes>>10), time.Since(began))
}

// CopyTime is how long a copy of so many bytes from another memory domain is going to take.
func (s *Stage) CopyTime(bytes int64) time.Duration {
	if bytes <= 0 {
		return 0
	}
	s.travel.mu.Lock()
	defer s.travel.mu.Unlock()
	if s.travel.line == (sched.Line{}) {
		return time.Duration(float64(bytes>>10) / firstRate * float64(time.Second))
	}
	return s.travel.line.At(int(bytes >> 10))
}

// BlockBytes is the size of a KV block.
func (s *Stage) BlockBytes() int64 { return kv.SlabBytes(&s.Model.Text) / kv.SlabBlocks }
