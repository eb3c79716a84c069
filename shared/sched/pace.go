package sched

import (
	"math"
	"time"
)

// memory is how long a Rate remembers, in time during which there was something to do.
const memory = 30 * time.Second

// Rate measures how fast work gets done while there is some: an average over the last half minute or so of such time.
// The zero value has measured nothing.
type Rate struct {
	amount float64 // done, older work counting less
	took   float64 // seconds in which it was done, weighted alike
	events float64 // of which took is the time, weighted alike
	since  time.Duration
	on     bool
}

// Start says that there is work to do from now on; Stop that there is none.
func (r *Rate) Start(now time.Duration) {
	if !r.on {
		r.on, r.since = true, now
	}
}

// Stop says that there is nothing to do from now on.
func (r *Rate) Stop(now time.Duration) {
	if r.on {
		r.took += (now - r.since).Seconds()
		r.on = false
	}
}

// Done says that an amount of work was done just now. While there is nothing to do it says nothing.
func (r *Rate) Done(now time.Duration, amount int64) {
	if !r.on {
		return
	}
	took := now - r.since
	r.since = now
	keep := math.Exp(-took.Seconds() / memory.Seconds())
	r.amount = keep*r.amount + float64(amount)
	r.took = keep*r.took + took.Seconds()
	r.events = keep*r.events + 1
}

// Known reports whether enough was measured to rely on: some work done, and not all in one moment.
func (r *Rate) Known() bool { return r.events >= 3 && r.took > 0 }

// Time is how long an amount of work will take; ok is false when nothing was measured yet. A standstill that is longer than
// the usual time between two pieces of work counts as slowness.
func (r *Rate) Time(now time.Duration, amount int64) (wait time.Duration, ok bool) {
	if r.amount <= 0 {
		return 0, false
	}
	took := r.took
	if r.on {
		took += max(0, (now-r.since).Seconds()-r.took/r.events)
	}
	s := float64(amount) * took / r.amount
	if s > (24 * time.Hour).Seconds() {
		return 24 * time.Hour, true
	}
	return time.Duration(s * float64(time.Second)), true
}

// Line measures how a time depends on a size: a line fitted by least squares, of which the last hundred or so measurements
// count. Neither its slope nor its value at 0 is below 0. The zero value has measured nothing.
type Line struct {
	n, x, y, xx, xy float64
}

// lineKeep is how much a measurement counts when another one comes.
const lineKeep = 1 - 1.0/64

// Add adds a measurement.
func (l *Line) Add(size int, took time.Duration) {
	x, y := float64(size), took.Seconds()
	l.n = lineKeep*l.n + 1
	l.x = lineKeep*l.x + x
	l.y = lineKeep*l.y + y
	l.xx = lineKeep*l.xx + x*x
	l.xy = lineKeep*l.xy + x*y
}

// At is the expected time for a size; 0 before the first measurement.
func (l *Line) At(size int) time.Duration {
	if l.n == 0 {
		return 0
	}
	x, y := l.x/l.n, l.y/l.n // the means
	slope := 0.0
	if spread := l.xx/l.n - x*x; spread > 1e-9*(1+x*x) {
		slope = max(0, (l.xy/l.n-x*y)/spread)
	}
	at0 := y - slope*x
	if at0 < 0 { // the best line through 0
		at0, slope = 0, l.xy/l.xx
	}
	return time.Duration((at0 + slope*float64(size)) * float64(time.Second))
}

// Targets are what a client wants of its answer; 0: no matter.
type Targets struct {
	TTFT time.Duration // from the arrival of the request to the first token, time in queues included
	TPOT time.Duration // between two tokens, on average over the answer
}

// Service is how long a request's stages take, as measured, queues between them included.
type Service struct {
	Encode  time.Duration // all of its pictures
	Prefill time.Duration // to its first token
	Token   time.Duration // each token after the first
}

// Budget is what is left of the targets for each stage, from the arrival of the request: the last moment at which the
// stage can begin when it and those behind it take what they usually do. Never: no matter.
type Budget struct {
	Start   time.Duration // to leave the queue at the entrance
	Prefill time.Duration // to begin with the prompt
	// Hopeless is set when tokens come too slowly for the TPOT target now, whenever it starts.
	Hopeless bool
}

// Split gives each stage its part of the targets. The time to the first token is shared by the queue at the entrance, encode
// and prefill: what the stages need is theirs, and what is left may be spent waiting. The time between tokens is decode's
// alone.
func (t Targets) Split(s Service) Budget {
	b := Budget{Start: Never, Prefill: Never, Hopeless: t.TPOT > 0 && s.Token > t.TPOT}
	if t.TTFT > 0 {
		b.Prefill = t.TTFT - s.Prefill
		b.Start = b.Prefill - s.Encode
	}
	return b
}
