package hmm

import (
	"time"

	"trireme.dev/shared/hbm/protocol"

	"trireme.dev/services/hmm/ledger"
)

// books is the one goroutine that touches the ledger. It lets deadlines pass in time and does what the ledger's effects
// ask for before anybody hears the result.
type books struct {
	d     *Daemon
	l     *ledger.Ledger
	calls chan func()
	quit  chan struct{}
	ended chan struct{}

	reaped chan struct{} // closed and replaced when a client's holds and NPUs have become free

	making map[protocol.Key]chan struct{} // closed when nobody makes the MM object, or weight set, any more
}

func newBooks(d *Daemon, l *ledger.Ledger) *books {
	return &books{
		d: d, l: l, calls: make(chan func()), quit: make(chan struct{}), ended: make(chan struct{}), reaped: make(chan struct{}),
		making: map[protocol.Key]chan struct{}{},
	}
}

func (b *books) run() {
	defer close(b.ended)
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		wait := time.Hour
		if t, ok := b.l.Next(); ok {
			wait = time.Until(t)
		}
		timer.Reset(wait)
		select {
		case f := <-b.calls:
			f()
		case <-timer.C:
			b.l.Tick(time.Now())
			b.settle()
		case <-b.quit:
			return
		}
	}
}

// stop ends run; calls of do return false from then on.
func (b *books) stop() {
	close(b.quit)
	<-b.ended
}

// do runs f in the goroutine of the books and returns when it and its effects are done; false when the books are closed
// and it was not run. f must not block.
func (b *books) do(f func(l *ledger.Ledger, now time.Time)) bool {
	done := make(chan struct{})
	call := func() {
		defer close(done)
		f(b.l, time.Now())
		b.settle()
	}
	select {
	case b.calls <- call:
		<-done
		return true
	case <-b.ended:
		return false
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

// made returns a channel that is closed when nobody makes the MM object or weight set of a key any more. It is for functions that do
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
	b.do(func(l *ledger.Ledger, _ time.Time) {
		l.Reap(id)
		close(b.reaped)
		b.reaped = make(chan struct{})
	})
}
