// Package admission decides which requests may start: each takes a credit for the device memory that it may come to
// need, and waits in line for it. It is the one place that refuses (DESIGN.md, "Back pressure only at the entrance"):
// whoever has had a credit is never refused. One that outgrows its estimate takes more (Grow), so less than there is may
// be left; one that has lost its memory to others for that waits in line again for all that it can come to need
// (Exchange), before all that have not begun, and is in nobody's debt from then on.
//
// The line is a sched.Queue: who goes next is the policy's matter, and who is next keeps the others waiting until there is
// room for it, as the small would overtake the large for ever. Beside memory, requests without their first token take a place
// each (SetAhead), of which there are about as many as the stages work on at once: the others wait here, where they are put
// in order, and not in the stages' queues, where they are not.
//
// It estimates nothing itself and knows no memory: the gateway says how many bytes a request may need and how many
// there are, of each kind.
package admission

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	"trireme.dev/shared/sched"
)

// ErrFull is what a *Refusal wraps.
var ErrFull = errors.New("all capacity is in use")

// Bytes is an amount of device memory, by what it is for: the two lie on NPUs of different stages, unless these have the same.
type Bytes struct {
	KV int64 // keys, values and token logs
	MM int64 // encoded pictures
}

// Plus is the sum of both kinds.
func (b Bytes) Plus(o Bytes) Bytes { return Bytes{b.KV + o.KV, b.MM + o.MM} }

// Minus is the difference of both kinds.
func (b Bytes) Minus(o Bytes) Bytes { return Bytes{b.KV - o.KV, b.MM - o.MM} }

// Capacity is how much memory there is. What is 0 is not known, or no bound of its own, and does not count.
type Capacity struct {
	KV int64 // of all requests
	MM int64 // of all requests
	// Both is for KV and pictures of all requests together, where the same NPUs have both.
	Both int64
	// Prompt is for the pictures of all requests and the KV of the one let in last, where NPUs encode pictures and compute
	// prompts: KV stays there for a short time only, but must find room beside the pictures.
	Prompt int64
}

// lets reports whether a request that needs own bytes may be let in when that makes all bytes.
func (c Capacity) lets(own, all Bytes) bool {
	within := func(bytes, capacity int64) bool { return capacity == 0 || bytes <= capacity }
	return within(all.KV, c.KV) && within(all.MM, c.MM) && within(all.KV+all.MM, c.Both) && within(all.MM+own.KV, c.Prompt)
}

// Reason says why a request was refused.
type Reason string

// The reasons.
const (
	QueueFull Reason = "queue_full" // too many wait, and of these it goes last
	Waited    Reason = "wait"       // it has waited for as long as anything may
	Late      Reason = "late"       // it would start too late to meet its targets
)

// Refusal is returned by Acquire for a request that found no room in time or no place in the queue.
type Refusal struct {
	Reason Reason
	// RetryAfter is how long the request would have waited (longer) where it stood, if nothing else had come: what goes
	// before it, and itself, at the rate at which requests were let in lately. Whole seconds, at least one.
	RetryAfter time.Duration
	Need       Bytes    // what was asked for
	Used       Bytes    // what others had credit for in this moment
	Capacity   Capacity // what there was
	Open       int      // requests that were let in
	Waiting    int      // requests that waited for credit
}

// Error says what happened and when to come again.
func (r *Refusal) Error() string {
	return fmt.Sprintf("%v (%s): %+v wanted, %+v of %+v taken by %d requests, %d waiting; retry in %v",
		ErrFull, r.Reason, r.Need, r.Used, r.Capacity, r.Open, r.Waiting, r.RetryAfter)
}

// Unwrap returns ErrFull.
func (r *Refusal) Unwrap() error { return ErrFull }

// Limits bound what is let in, and say in which order.
type Limits struct {
	Requests   int           // open requests at most
	Queue      int           // waiting requests at most
	Wait       time.Duration // longest wait in the queue
	Order      sched.Order   // Patience is Wait
	RefuseLate bool          // what can no longer meet its targets is refused; else it goes last
}

// Request is what is asked for.
type Request struct {
	N     int // requests that are let in together
	Bytes Bytes
	Class string // under which it is counted while it waits
	// Tenant, Weight, Priority and Tokens are those of a sched.Item.
	Tenant   string
	Weight   float64
	Priority int
	Tokens   int64
	Arrived  time.Time
	Due      time.Time // zero: it has no targets; what is late already when it comes and has to wait cannot meet them
}

// Gate gives out credits in the order that its limits say. It is safe for concurrent use.
type Gate struct {
	limits Limits
	now    func() time.Time
	epoch  time.Time // times of sched count from here

	mu       sync.Mutex
	capacity Capacity
	places   int // for requests without their first token; 0: no bound
	used     Bytes
	open     int
	ahead    int // open requests without their first token
	queue    *sched.Queue
	classes  map[string]int // waiting requests

	let  sched.Rate // tokens of requests let in out of the queue, while there is one
	back sched.Rate // tokens of requests that have ended, while there are some
}

// waiter is who waits. Under Gate.mu until decided is closed, which is when it is in no queue any more.
type waiter struct {
	Request
	item    *sched.Item
	decided chan struct{}
	refusal *Refusal // nil: let in
}

// New makes a Gate. now is the clock.
func New(limits Limits, now func() time.Time) *Gate {
	limits.Order.Patience = limits.Wait
	return &Gate{
		limits: limits, now: now, epoch: now(), queue: sched.NewQueue(limits.Order), classes: map[string]int{},
	}
}

// SetCapacity sets how many bytes there are. It may let waiting requests in.
func (g *Gate) SetCapacity(c Capacity) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.capacity = c
	g.grant()
}

// SetAhead sets how many requests may be open without their first token; 0: as many as there is room for. One is always let
// in, however many requests it stands for.
func (g *Gate) SetAhead(n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.places = n
	g.grant()
}

// Acquire takes a credit, waiting for it if it must. A request that needs more than there is runs alone. What finds room at
// once is let in, whatever its targets. The error is a *Refusal or ctx's.
func (g *Gate) Acquire(ctx context.Context, r Request) (*Credit, error) {
	credit := &Credit{gate: g, n: r.N, bytes: r.Bytes, tokens: max(1, r.Tokens), ahead: r.N, arrived: r.Arrived}
	g.mu.Lock()
	if g.queue.Len() == 0 && g.fits(r.N, r.Bytes, false) {
		g.take(r.N, r.Bytes, r.N)
		g.mu.Unlock()
		return credit, nil
	}
	w := &waiter{Request: r, decided: make(chan struct{}), item: &sched.Item{
		Tenant: r.Tenant, Weight: r.Weight, Priority: r.Priority, Tokens: r.Tokens, Arrived: g.at(r.Arrived), Due: sched.Never,
	}}
	var late <-chan time.Time
	if !r.Due.IsZero() {
		w.item.Due = g.at(r.Due)
	}
	g.push(w)
	if g.queue.Len() > g.limits.Queue {
		if last := g.queue.Last(); last != nil {
			g.refuse(last.Owner.(*waiter), QueueFull)
		} else {
			g.refuse(w, QueueFull)
		}
	}
	if w.refusal == nil && g.limits.Order.Policy == sched.SLO && w.item.Due != sched.Never {
		now := g.at(g.now())
		wait := time.Duration(0)
		if w.item.Due >= now && g.let.Known() {
			wait, _ = g.let.Time(now, g.queue.Before(w.item)+credit.tokens)
		}
		if now+wait > w.item.Due {
			g.tooLate(w)
		}
	}
	if w.refusal == nil {
		g.grant() // it may go before who was next, and fit
	}
	g.mu.Unlock()

	timer := time.NewTimer(g.limits.Wait)
	defer timer.Stop()
	if g.limits.RefuseLate && g.limits.Order.Policy == sched.SLO && w.item.Due != sched.Never {
		t := time.NewTimer(r.Due.Sub(g.now()) + 1)
		defer t.Stop()
		late = t.C
	}
	if err := g.await(ctx, w, timer.C, late); err != nil {
		return nil, err
	}
	return credit, nil
}

// await waits until w is decided, and no longer than until timeout or late. On error it holds nothing and waits no more.
func (g *Gate) await(ctx context.Context, w *waiter, timeout, late <-chan time.Time) error {
	var err error
	reason := Waited
	select {
	case <-w.decided:
	case <-timeout:
	case <-late:
		reason = Late
	case <-ctx.Done():
		err = fmt.Errorf("waiting for capacity: %w", ctx.Err())
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case <-w.decided: // perhaps in the same moment
		switch {
		case w.refusal != nil && err == nil:
			return w.refusal
		case w.refusal == nil && err != nil:
			g.give(w.N, w.Bytes, w.ahead(), max(1, w.Tokens))
		}
		return err
	default:
	}
	if err == nil {
		g.refuse(w, reason)
		err = w.refusal
	} else {
		g.leave(w)
	}
	g.grant() // those behind may be smaller
	return err
}

// ahead is how many places for requests without first token it takes.
func (w *waiter) ahead() int {
	if w.item.Begun {
		return 0
	}
	return w.N
}

// at is a moment as sched counts it.
func (g *Gate) at(t time.Time) time.Duration { return t.Sub(g.epoch) }

// push puts w in line. The caller holds mu, here and below.
func (g *Gate) push(w *waiter) {
	if g.queue.Len() == 0 {
		g.let.Start(g.at(g.now()))
	}
	w.item.Owner = w
	g.queue.Push(w.item)
	g.classes[w.Class] += w.N
}

// leave takes w out of the line, if it is in it still.
func (g *Gate) leave(w *waiter) {
	g.queue.Remove(w.item)
	if g.classes[w.Class] -= w.N; g.classes[w.Class] == 0 {
		delete(g.classes, w.Class)
	}
	if g.queue.Len() == 0 {
		g.let.Stop(g.at(g.now()))
	}
}

// refuse takes w, which waits, out of the line and tells it so.
func (g *Gate) refuse(w *waiter, reason Reason) {
	now := g.at(g.now())
	before := g.queue.Before(w.item) + max(1, w.Tokens)
	wait, ok := g.let.Time(now, before)
	if !ok || !g.let.Known() {
		wait, _ = g.back.Time(now, before)
	}
	seconds := (wait + time.Second - 1) / time.Second // a client that comes too early is refused again
	w.refusal = &Refusal{
		Reason: reason, RetryAfter: min(max(seconds, 1)*time.Second, 10*time.Minute),
		Need: w.Bytes, Used: g.used, Capacity: g.capacity, Open: g.open, Waiting: g.queue.Len() - 1,
	}
	g.leave(w)
	close(w.decided)
}

// tooLate does with w, which waits, what is to be done with what can no longer meet its targets.
func (g *Gate) tooLate(w *waiter) {
	if g.limits.RefuseLate {
		g.refuse(w, Late)
	} else {
		g.queue.Demote(w.item)
	}
}

// Load is what is let in and what waits, in requests.
func (g *Gate) Load() (open, waiting int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.open, g.queue.Len()
}

// Waiting is how many requests of each class wait; those of which none does are missing.
func (g *Gate) Waiting() map[string]int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return maps.Clone(g.classes)
}

// Credit is what a request holds of a Gate. It is safe for concurrent use.
type Credit struct {
	gate *Gate

	// Under gate.mu.
	n        int
	bytes    Bytes
	tokens   int64
	ahead    int // places for requests without first token
	arrived  time.Time
	released bool
}

// Split takes n requests, their tokens and bytes out of c and makes them a credit of their own.
func (c *Credit) Split(n int, tokens int64, bytes Bytes) *Credit {
	c.gate.mu.Lock()
	defer c.gate.mu.Unlock()
	if c.released || n > c.n || bytes.KV > c.bytes.KV || bytes.MM > c.bytes.MM || c.ahead != c.n {
		panic(fmt.Sprintf("BUG: splitting %d requests and %+v bytes off a credit for %d and %+v", n, bytes, c.n, c.bytes))
	}
	c.n -= n
	c.ahead -= n
	c.tokens = max(0, c.tokens-tokens)
	c.bytes = c.bytes.Minus(bytes)
	return &Credit{gate: c.gate, n: n, bytes: bytes, tokens: tokens, ahead: n, arrived: c.arrived}
}

// Started says that all requests of the credit have their first token: others may come to theirs. It may be called more
// than once.
func (c *Credit) Started() {
	c.gate.mu.Lock()
	defer c.gate.mu.Unlock()
	if !c.released && c.ahead > 0 {
		c.gate.ahead -= c.ahead
		c.ahead = 0
		c.gate.grant()
	}
}

// Exchange gives c's bytes back and waits for the given number instead, before all that have not begun, among others that
// have in the order of their arrival, and for as long as ctx lasts. Meanwhile c counts as waiting and holds nothing. On
// error, which is ctx's, it is as released.
func (c *Credit) Exchange(ctx context.Context, bytes Bytes) error {
	g := c.gate
	g.mu.Lock()
	if c.released {
		panic("BUG: exchanging a credit that was released")
	}
	c.released = true
	w := &waiter{
		Request: Request{N: c.n, Bytes: bytes, Class: ClassBegun, Tokens: c.tokens}, decided: make(chan struct{}),
		item: &sched.Item{Tokens: c.tokens, Arrived: g.at(c.arrived), Due: sched.Never, Begun: true},
	}
	g.push(w)
	g.open -= c.n
	g.ahead -= c.ahead
	g.used = g.used.Minus(c.bytes)
	g.grant()
	g.mu.Unlock()
	if err := g.await(ctx, w, nil, nil); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	c.bytes, c.ahead, c.released = bytes, 0, false
	return nil
}

// ClassBegun is the class of answers that have begun and wait for room to go on.
const ClassBegun = "begun"

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
		c.gate.give(c.n, c.bytes, c.ahead, c.tokens)
	}
}

// fits reports whether a request can be let in now. An empty gate lets anything in. The caller holds mu, here and below.
func (g *Gate) fits(n int, bytes Bytes, begun bool) bool {
	if g.open == 0 {
		return true
	}
	place := begun || g.places == 0 || g.ahead == 0 || g.ahead+n <= g.places
	return place && g.open+n <= g.limits.Requests && g.capacity.lets(bytes, g.used.Plus(bytes))
}

func (g *Gate) take(n int, bytes Bytes, ahead int) {
	g.back.Start(g.at(g.now()))
	g.open += n
	g.ahead += ahead
	g.used = g.used.Plus(bytes)
}

func (g *Gate) give(n int, bytes Bytes, ahead int, tokens int64) {
	now := g.at(g.now())
	g.back.Done(now, tokens)
	g.open -= n
	g.ahead -= ahead
	g.used = g.used.Minus(bytes)
	if g.open == 0 { // time without load says nothing about how fast credits come back
		g.back.Stop(now)
	}
	g.grant()
}

// grant lets in who waits, in order.
func (g *Gate) grant() {
	if g.queue.Len() == 0 {
		return
	}
	now := g.at(g.now())
	for _, it := range g.queue.Overdue(now) {
		g.tooLate(it.Owner.(*waiter))
	}
	for it := g.queue.Next(); it != nil; it = g.queue.Next() {
		w := it.Owner.(*waiter)
		if !g.fits(w.N, w.Bytes, it.Begun) {
			return
		}
		g.queue.Take()
		g.let.Done(now, max(1, it.Tokens))
		g.leave(w)
		g.take(w.N, w.Bytes, w.ahead())
		close(w.decided)
	}
}
