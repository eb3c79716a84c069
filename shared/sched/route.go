package sched

import "time"

// Routing says when work that one instance has taken is offered to another one that has what it needs at hand.
type Routing struct {
	// Least is what has to be gained: below it an offer costs more than it saves.
	Least time.Duration
	// Limit is the most that work waits longer there, whatever is gained: what is gained is an estimate.
	Limit time.Duration
}

// Offer says to which of others, by index, to offer a piece of work, -1 to none, and the most that it may have to wait there. own
// and others are how long it takes, at the taker and at the others, until what the work needs is at hand: bytes copied, and tokens
// of the prompt computed. wait is how long it has to wait at the taker for work that is there already.
//
// It may wait there longer by half of what is gained. Whoever comes next waits there, too; and copies are made beside what an NPU
// computes, while what waits at one NPU is computed one after the other.
func (r Routing) Offer(own, wait time.Duration, others []time.Duration) (to int, most time.Duration) {
	to = -1
	if r.Limit <= 0 {
		return to, 0
	}
	best := own
	for i, ready := range others {
		if ready < best {
			to, best = i, ready
		}
	}
	gain := own - best
	if to < 0 || gain < r.Least {
		return -1, 0
	}
	return to, wait + min(gain/2, r.Limit)
}

// Without is the load without a piece of work: a request's own at the stage before, or what is about to be offered.
func (l Load) Without(x Load) Load {
	return Load{
		Pictures: max(0, l.Pictures-x.Pictures), Prompts: max(0, l.Prompts-x.Prompts), Sequences: max(0, l.Sequences-x.Sequences),
	}
}
