// Package admission decides which requests may start: each takes a credit for the device memory that it may come to
// need, and waits in line for it. It is the one place that refuses (DESIGN.md, "Back pressure only at the entrance"):
// whoever has had a credit is never refused. One that outgrows its estimate takes more (Grow), so less than there is may
// be left; one that has lost its memory to others for that waits in the same line for all that it can come to need
// (Exchange), and is in nobody's debt from then on.
//
// It estimates nothing itself and knows no memory: the gateway says how many bytes a request may need and how many
// there are, of each kind.
package admission

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// ErrFull is what a *Refusal wraps.
var ErrFull = errors.New("all capacity is in use")

// Bytes is an amount of device memory, by what it is for: the two lie on NPUs of different stages.
type Bytes struct {
	KV int64 // keys, values and token logs
	MM int64 // encoded pictures
}

// Plus is the sum of both kinds.
func (b Bytes) Plus(o Bytes) Bytes { return Bytes{b.KV + o.KV, b.MM + o.MM} }

// Minus is the difference of both kinds.
func (b Bytes) Minus(o Bytes) Bytes { return Bytes{b.KV - o.KV, b.MM - o.MM} }

// within reports whether b is no more than a capacity, of which what is 0 is not known and does not count.
func (b Bytes) within(capacity Bytes) bool {
	return (capacity.KV == 0 || b.KV <= capacity.KV) && (capacity.MM == 0 || b.MM <= capacity.MM)
}

// Refusal is returned by Acquire for a request that found no room in time or no place in the queue.
type Refusal struct {
	RetryAfter time.Duration // whole seconds, at least one: when the queue is likely to have moved on
	Need       Bytes         // what was asked for
	Used       Bytes         // what others had credit for in this moment
	Capacity   Bytes         // what there was; what is 0 was not known
	Open       int           // requests that were let in
	Waiting    int           // requests that waited for credit
}

// Error says what happened and when to come again.
func (r *Refusal) Error() string {
	return fmt.Sprintf("%v: %+v wanted, %+v of %+v taken by %d requests, %d waiting; retry in %v",
		ErrFull, r.Need, r.Used, r.Capacity, r.Open, r.Waiting, r.RetryAfter)
}

// Unwrap returns ErrFull.
func (r *Refusal) Unwrap() error { return ErrFull }

// Limits bound what is let in.
type Limits struct {
	Requests int           // open requests at most
	Queue    int           // waiting requests at most
	Wait     time.Duration // longest wait in the queue
}

// Gate gives out credits, first come first served. It is safe for concurrent use.
type Gate struct {
	limits Limits
	now    func() time.Time

	mu       sync.Mutex
	capacity Bytes // what is 0 is not known, and not counted
	used     Bytes
	open     int
	waiting  list.List // of *waiter, oldest first

	interval time.Duration // smoothed time between two credits coming back while there is a queue or load
	returned time.Time     // when the last came back
}

type waiter struct {
	bytes   Bytes
	n       int
	granted chan struct{} // closed under Gate.mu when the credit is given
}

// New makes a Gate. now is the clock.
func New(limits Limits, now func() time.Time) *Gate {
	return &Gate{limits: limits, now: now}
}

// SetCapacity sets how many bytes there are; 0 of a kind when that is not known. It may let waiting requests in.
func (g *Gate) SetCapacity(bytes Bytes) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.capacity = bytes
	g.grant()
}

// Acquire takes a credit for n requests that may need bytes of device memory together, waiting for it if it must. One
// that needs more than there is runs alone. The error is a *Refusal or ctx's.
func (g *Gate) Acquire(ctx context.Context, n int, bytes Bytes) (*Credit, error) {
	g.mu.Lock()
	if g.waiting.Len() == 0 && g.fits(n, bytes) {
		g.take(n, bytes)
		g.mu.Unlock()
		return &Credit{gate: g, n: n, bytes: bytes}, nil
	}
	if g.waiting.Len() >= g.limits.Queue {
		defer g.mu.Unlock()
		return nil, g.refusal(bytes)
	}
	w := &waiter{bytes: bytes, n: n, granted: make(chan struct{})}
	at := g.waiting.PushBack(w)
	g.mu.Unlock()

	timer := time.NewTimer(g.limits.Wait)
	defer timer.Stop()
	if err := g.await(ctx, w, at, timer.C); err != nil {
		return nil, err
	}
	return &Credit{gate: g, n: n, bytes: bytes}, nil
}

// await waits until w, which stands at at, is granted. On error it holds nothing and waits no more.
func (g *Gate) await(ctx context.Context, w *waiter, at *list.Element, timeout <-chan time.Time) error {
	var err error
	select {
	case <-w.granted:
		return nil
	case <-timeout:
	case <-ctx.Done():
		err = fmt.Errorf("waiting for capacity: %w", ctx.Err())
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case <-w.granted: // in the same moment
		if err != nil {
			g.give(w.n, w.bytes)
		}
		return err
	default:
	}
	g.waiting.Remove(at)
	g.grant() // those behind may be smaller
	if err == nil {
		err = g.refusal(w.bytes)
	}
	return err
}

// Load is what is let in and what waits, in requests.
func (g *Gate) Load() (open, waiting int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.open, g.waiting.Len()
}

// Credit is what a request holds of a Gate. It is safe for concurrent use.
type Credit struct {
	gate *Gate

	// Under gate.mu.
	n        int
	bytes    Bytes
	released bool
}

// Split takes n requests and bytes out of c and makes them a credit of their own.
func (c *Credit) Split(n int, bytes Bytes) *Credit {
	c.gate.mu.Lock()
	defer c.gate.mu.Unlock()
	if c.released || n > c.n || bytes.KV > c.bytes.KV || bytes.MM > c.bytes.MM {
		panic(fmt.Sprintf("BUG: splitting %d requests and %+v bytes off a credit for %d and %+v", n, bytes, c.n, c.bytes))
	}
	c.n -= n
	c.bytes = c.bytes.Minus(bytes)
	return &Credit{gate: c.gate, n: n, bytes: bytes}
}

// Exchange gives c's bytes back and waits for the given number instead, in line with everyone and for as long as ctx
// lasts. Meanwhile c counts as waiting and holds nothing. On error, which is ctx's, it is as released.
func (c *Credit) Exchange(ctx context.Context, bytes Bytes) error {
	g := c.gate
	g.mu.Lock()
	if c.released {
		panic("BUG: exchanging a credit that was released")
	}
	c.released = true
	w := &waiter{bytes: bytes, n: c.n, granted: make(chan struct{})}
	at := g.waiting.PushBack(w)
	g.open -= c.n
	g.used = g.used.Minus(c.bytes)
	g.grant()
	g.mu.Unlock()
	if err := g.await(ctx, w, at, nil); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	c.bytes, c.released = bytes, false
	return nil
}

// Grow adds bytes that the request turned out to need beyond its estimate. It never waits: the memory is taken as the
// answer grows, whatever is counted here. Until credits come back there may be less than nothing left, and nobody else
// is let in.
func (c *Credit) Grow(bytes Bytes) {
	c.gate.mu.Lock()
	defer c.gate.mu.Unlock()
	if !c.released {
		c.bytes = c.bytes.Plus(bytes)
		c.gate.used = c.gate.used.Plus(bytes)
	}
}

// Release gives the credit back. It may be called more than once.
func (c *Credit) Release() {
	c.gate.mu.Lock()
	defer c.gate.mu.Unlock()
	if !c.released {
		c.released = true
		c.gate.give(c.n, c.bytes)
	}
}

// fits reports whether a request can be let in now. An empty gate lets anything in. The caller holds mu.
func (g *Gate) fits(n int, bytes Bytes) bool {
	if g.open == 0 {
		return true
	}
	return g.open+n <= g.limits.Requests && g.used.Plus(bytes).within(g.capacity)
}

func (g *Gate) take(n int, bytes Bytes) {
	if g.open == 0 {
		g.returned = g.now() // time without load says nothing about how fast credits come back
	}
	g.open += n
	g.used = g.used.Plus(bytes)
}

func (g *Gate) give(n int, bytes Bytes) {
	g.open -= n
	g.used = g.used.Minus(bytes)
	now := g.now()
	if took := now.Sub(g.returned) / time.Duration(n); g.interval == 0 {
		g.interval = took
	} else {
		g.interval += (took - g.interval) / 8
	}
	g.returned = now
	g.grant()
}

// grant lets in who waits, in order. The caller holds mu.
func (g *Gate) grant() {
	for e := g.waiting.Front(); e != nil; e = g.waiting.Front() {
		w := e.Value.(*waiter)
		if !g.fits(w.n, w.bytes) {
			return
		}
		g.waiting.Remove(e)
		g.take(w.n, w.bytes)
		close(w.granted)
	}
}

// refusal estimates when a new request would be let in: as many credits as wait, and one, have to come back, at the rate
// at which they did lately.
func (g *Gate) refusal(need Bytes) *Refusal {
	wait := time.Duration(g.waiting.Len()+1) * max(g.interval, g.now().Sub(g.returned)/2)
	return &Refusal{
		RetryAfter: min(max(wait.Round(time.Second), time.Second), 10*time.Minute),
		Need:       need, Used: g.used, Capacity: g.capacity, Open: g.open, Waiting: g.waiting.Len(),
	}
}
