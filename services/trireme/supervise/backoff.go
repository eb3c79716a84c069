// Package supervise runs child processes and restarts those that die. It knows nothing of what they do.
package supervise

import "time"

const (
	firstDelay = 50 * time.Millisecond
	maxDelay   = 10 * time.Second
	// stable is how many times as long as it was waited for a child has to live for its earlier deaths to be forgotten. A
	// child that is killed now and then is back at once, and one that cannot live costs little.
	stable = 10
)

// Backoff says how long to wait before a child is started again: hardly after a long life, then twice as long after
// each short one. Pure; the zero value is ready.
type Backoff struct{ delay time.Duration }

// Next takes the length of the life that just ended.
func (b *Backoff) Next(life time.Duration) time.Duration {
	if life >= stable*b.delay {
		b.delay = firstDelay
	} else {
		b.delay = min(2*b.delay, maxDelay)
	}
	return b.delay
}
