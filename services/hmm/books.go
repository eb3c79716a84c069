package hmm

import (
	"sync"
	"sync/atomic"
	"time"

	"trireme.dev/shared/hbm/protocol"

	"trireme.dev/services/hmm/ledger"
)

// books is the ledger behind a lock: one call at a time. It lets deadlines pass in time and does what the ledger's effects
// ask for before anybody hears the result.
type books struct {
	d *Daemon

	mu     sync.Mutex // guards the rest
	l      *ledger.Ledger
	closed bool
	timer  *time.Timer // calls tick at due, by way of ticking
	due    time.Time   // zero: the timer is not set
	// A timer that is stopped may stay with Go's runtime up to its time, with whatever its function knows: this is all that ours does.
	ticking *atomic.Pointer[books] // nil once closed

	reaped chan struct{} // closed and replaced when a client's holds and NPUs have become free

	making map[protocol.Key]chan struct{} // closed when nobody makes the MM object any more, or somebody one weight less of the set
}

func newBooks(d *Daemon, l *ledger.Ledger) *books {
	b := &books{d: d, l: l, reaped: make(chan struct{}), making: map[protocol.Key]chan struct{}{}}
	ticking := new(atomic.Pointer[books])
	ticking.Store(b)
	b.ticking = ticking
	b.timer = time.AfterFunc(time.Hour, func() {
		if b := ticking.Load(); b != nil {
			b.tick()
		}
	})
	return b
}

// close ends the books: calls of do return false from now on.
func (b *books) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	b.timer.Stop()
	b.ticking.Store(nil)
}

// do runs f on the ledger and returns when it and its effects are done; false when the books are closed and it was not
// run. f must not block, nor call do.
func (b *books) do(f func(l *ledger.Ledger, now time.Time)) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return false
	}
	f(b.l, time.Now())
	b.settle()
	b.wind()
	return true
}

func (b *books) tick() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return
	}
	b.due = time.Time{}
	b.l.Tick(time.Now())
	b.settle()
	b.wind()
}

// wind sets the timer to the next deadline, if that is sooner than what it is set to: most deadlines never pass.
func (b *books) wind() {
	if next, ok := b.l.Next(); ok && (b.due.IsZero() || next.Before(b.due)) {
		b.due = next
		b.timer.Reset(time.Until(next))
	}
}

// settle carries out the effects. Dropping memory here, in order with everything else, is what keeps a page from being
// given out before it is dropped; below the stores' cache mark it costs nothing, above it 0.2 s a GiB.
func (b *books) settle() {
	e := b.l.Effects()
	for _, s := range e.Slots {
		b.d.table.Store(s.Index, s.Generation)
	}
	for _, key := range e.Settled {
		if c := b.making[key]; c != nil {
			close(c)
			delete(b.making, key)
		}
	}
	for _, x := range e.Freed {
		if err := b.d.stores[x.Space].Drop(x); err != nil {
			b.d.log.Error("giving memory back to the system", "extent", x.String(), "error", err)
		}
	}
}

// made returns a channel that is closed when nobody makes the MM object of a key any more, or somebody has ended making a weight of its set. It is for functions that do
// runs.
func (b *books) made(key protocol.Key) <-chan struct{} {
	c := b.making[key]
	if c == nil {
		c = make(chan struct{})
		b.making[key] = c
	}
	return c
}

// reap frees what a client held whose maps are gone, and wakes those who wait for its NPUs.
func (b *books) reap(id ledger.Conn) {
	b.do(func(l *ledger.Ledger, now time.Time) {
		l.Reap(now, id)
		close(b.reaped)
		b.reaped = make(chan struct{})
	})
}
