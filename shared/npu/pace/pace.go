package pace

import (
	"sync/atomic"
	"time"

	"trireme.dev/shared/kernel"
)

// schedule is when a paced NPU is busy, on a clock of its own: what the host sleeps too long is taken off the step that
// follows, so that such errors do not add up, and what lies between two steps counts as it was. It is arithmetic on times.
type schedule struct {
	due  time.Time     // when the last step ended on the NPU's clock
	late time.Duration // what the host slept beyond that
}

// pause is the time after which a step does not follow the one before any more: it waited for something else, which did not
// come later because the host slept too long.
const pause = 10 * time.Millisecond

// begin begins a step of a length and returns when it is due.
func (s *schedule) begin(now time.Time, length time.Duration) time.Time {
	if start := now.Add(-s.late); start.Sub(s.due) < pause {
		now = start
	}
	s.due, s.late = now.Add(length), 0
	return s.due
}

// end tells when the host has done what the step computes: how long it has to sleep, or how far behind it is. The NPU's clock
// does not catch up with what is behind: a burst of steps faster than the profile would be no better.
func (s *schedule) end(now time.Time) (sleep, behind time.Duration) {
	if left := s.due.Sub(now); left > 0 {
		return left, 0
	}
	behind = now.Sub(s.due)
	s.due = now
	return 0, behind
}

// woke tells when the host woke.
func (s *schedule) woke(now time.Time) { s.late = max(0, now.Sub(s.due)) }

// Compute is another Compute at the rates of a profile. It has the same results and the same digest.
type Compute struct {
	kernel.Compute
	profile  *Profile
	now      func() time.Time
	sleep    func(time.Duration)
	schedule schedule
	busy     atomic.Int64 // ns
	behind   atomic.Int64 // ns
}

var _ kernel.Meter = (*Compute)(nil)

// New paces c, which Close closes.
func New(c kernel.Compute, p *Profile) *Compute {
	return &Compute{Compute: c, profile: p, now: time.Now, sleep: time.Sleep}
}

// Begin implements kernel.Meter.
func (c *Compute) Begin(w kernel.Work) {
	length := c.profile.Cost(w)
	c.busy.Add(int64(length))
	c.schedule.begin(c.now(), length)
}

// End implements kernel.Meter: it returns when the NPU of the profile would be done.
func (c *Compute) End() {
	sleep, behind := c.schedule.end(c.now())
	if sleep > 0 {
		c.sleep(sleep)
		c.schedule.woke(c.now())
		return
	}
	c.behind.Add(int64(behind))
}

// Profile returns the profile.
func (c *Compute) Profile() *Profile { return c.profile }

// Busy is the time that the profile has asked for so far. It may be called at any time by any goroutine.
func (c *Compute) Busy() time.Duration { return time.Duration(c.busy.Load()) }

// Behind is the time by which the host was too slow for the profile so far: beside Busy it should be next to nothing, else
// figures are the host's and not the profile's. It may be called at any time by any goroutine.
func (c *Compute) Behind() time.Duration { return time.Duration(c.behind.Load()) }
