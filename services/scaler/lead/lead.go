// Package lead makes sure that of several scalers one acts. The leader holds a record in NATS (key-value bucket
// wire.BucketScaler) that it renews; whoever wants to follow it takes the record over when it has not changed for a lease. The
// operation that is under way stands in the same record, before anybody is asked for it: a successor finds it there.
//
// No wall clock is read, and no time of one process is compared with one of another. A process that was stopped for longer than its
// lease (SIGSTOP, a machine put to sleep) does not know, for as long as it takes to look at the clock; what it asks for then has an
// older fence than what its successor has asked for, and those that have seen the newer one refuse it.
package lead

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/wire"
)

// Defaults and bounds of Config.
const (
	DefaultLease = 5 * time.Second
	tryMost      = 500 * time.Millisecond // one try at reading or writing the record
	parts        = 5                      // a leader renews, and a follower looks, so many times in a lease
)

// recordKey is the key of the record in the bucket.
const recordKey = "leader"

// ErrDeposed is returned to who wants to act as the leader and is not: another one leads, or may by now.
var ErrDeposed = errors.New("this scaler does not lead any more")

// Config says how to lead.
type Config struct {
	Bus   *bus.Bus      // its owner is the caller
	ID    string        // of this process; no other process ever has the same
	Lease time.Duration // a leader that is not heard of for so long is succeeded; 0: DefaultLease
	Log   *slog.Logger  // nil: none
}

// Term is one time of leading. It is safe for concurrent use.
type Term struct {
	leader *leader
	found  *Operation // when it began
	fence  atomic.Uint64
	until  atomic.Int64 // this process may act until then, on leader.now; 0: no more
	end    context.CancelCauseFunc
}

// Fence is the number that whoever is asked for something is told with it. It grows with each term and with each note, and is in no
// other process' hands.
func (t *Term) Fence() uint64 { return t.fence.Load() }

// Pending is the operation that the leader before left behind, nil if there is none: it may not have been asked for, or be under way,
// or have ended. It is this term's to complete or give up, and then to clear with Note(ctx, nil).
func (t *Term) Pending() *Operation { return t.found }

// Check fails with ErrDeposed when the term is over by this process' clock. It is for the last moment before something is asked for:
// the context of the term ends a little later where the process was stopped.
func (t *Term) Check() error {
	if int64(t.leader.now()) >= t.until.Load() {
		return ErrDeposed
	}
	return nil
}

// Note stores the operation that is about to be asked for, or how far it is, in the record; nil: none is under way any more. When
// it returns nil the operation stands there, and Fence has grown. It tries until ctx or the term ends: then it is not known whether
// it stands there, a successor sees, and nothing may be asked for. The error is ErrDeposed when the term is over.
func (t *Term) Note(ctx context.Context, op *Operation) error {
	if op != nil {
		copied := *op
		op = &copied
	}
	return t.write(ctx, "noting an operation", func(l *lease) record { return l.next(op, true, 0) })
}

// Raise makes Fence greater than a number that somebody has seen: one from before NATS lost its store, which this process never
// heard of. Only who leads can. Errors are as Note's.
func (t *Term) Raise(ctx context.Context, above uint64) error {
	return t.write(ctx, "raising the fence", func(l *lease) record { return l.next(l.rec.Operation, true, above) })
}

// write has the leader write, and ends the term when it cannot.
func (t *Term) write(ctx context.Context, what string, next func(*lease) record) error {
	err := t.leader.write(ctx, t, next)
	if err != nil {
		err = fmt.Errorf("%s in the scalers' record: %w", what, err)
	}
	if errors.Is(err, ErrDeposed) {
		t.until.Store(0)
		t.end(err)
	}
	return err
}

// leader is a process that leads or wants to.
type leader struct {
	cfg   Config
	store jetstream.KeyValue
	began time.Time

	mu    chan struct{} // holds one token: who has it owns what is below, and writes
	lease lease
	term  *Term // nil while this process follows
}

// now is the time of this process' monotonic clock.
func (h *leader) now() time.Duration { return time.Since(h.began) }

// Run calls led whenever this process leads, until ctx ends or led returns while it leads; then it gives the lead up in order, so that
// another one can take it at once, and returns what led has. The ctx of led ends when the lease may be lost: led then has to return
// soon, as Run neither leads nor follows until it has. The cause of that ctx says why.
func Run(ctx context.Context, cfg Config, led func(ctx context.Context, t *Term) error) error {
	if cfg.Lease == 0 {
		cfg.Lease = DefaultLease
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	h := &leader{cfg: cfg, began: time.Now(), mu: make(chan struct{}, 1), lease: lease{me: cfg.ID, length: cfg.Lease}}
	h.mu <- struct{}{}
	var err error
	if h.store, err = cfg.Bus.JetStream().KeyValue(ctx, wire.BucketScaler); err != nil {
		return fmt.Errorf("opening bucket %s: %w", wire.BucketScaler, err)
	}
	for {
		if err := h.follow(ctx); err != nil {
			return nil // ctx has ended
		}
		if ended, err := h.lead(ctx, led); ended {
			return err
		}
	}
}

// follow waits until this process leads. It fails when ctx ends.
func (h *leader) follow(ctx context.Context) error {
	for {
		select {
		case <-h.mu: // whoever still writes for a term that is over finds that out at once
			leads := h.look(ctx) && h.take(ctx)
			h.mu <- struct{}{}
			if leads {
				return nil
			}
		case <-ctx.Done():
			return ctx.Err()
		}
		select {
		case <-time.After(h.cfg.Lease / parts):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// look reads the record, and reports whether it is free.
func (h *leader) look(ctx context.Context) (free bool) {
	rec, revision, err := h.get(ctx)
	if err != nil {
		h.cfg.Log.Debug("reading the scalers' record", "error", err)
		return false
	}
	before := h.lease.rec.Leader
	h.lease.saw(h.now(), rec, revision)
	if rec.Leader != before && rec.Leader != "" {
		h.cfg.Log.Info("another scaler leads", "leader", rec.Leader)
	}
	return h.lease.free(h.now())
}

// take tries to take the record over, once.
func (h *leader) take(ctx context.Context) (leads bool) {
	sent, rec := h.now(), h.lease.next(h.lease.rec.Operation, true, 0)
	err := h.try(ctx, sent, rec)
	if err != nil {
		h.cfg.Log.Debug("taking the scalers' record", "error", err)
	}
	return err == nil && h.lease.acts(h.now())
}

// errAway is why nothing was tried: the client would send it when nobody waits for it any more.
var errAway = errors.New("no connection to NATS")

// get reads the record; revision 0: there is none.
func (h *leader) get(ctx context.Context) (rec record, revision uint64, err error) {
	if h.cfg.Bus.Conn().IsReconnecting() {
		return rec, 0, errAway
	}
	ctx, cancel := context.WithTimeout(ctx, h.patience())
	defer cancel()
	entry, err := h.store.Get(ctx, recordKey)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return rec, 0, nil
	}
	if err == nil {
		revision, err = entry.Revision(), json.Unmarshal(entry.Value(), &rec)
	}
	return rec, revision, err
}

// patience bounds one try, so that several fit into a lease.
func (h *leader) patience() time.Duration { return min(tryMost, h.cfg.Lease/parts) }

// errAgain is why a write is to be tried anew, over the revision of an earlier one of this process.
var errAgain = errors.New("an earlier write came first")

// try writes a record over the one that is known; sent is from before the first try at this very record. ErrDeposed: another process
// has written. After any other error the record may be stored or not, or yet be.
func (h *leader) try(ctx context.Context, sent time.Duration, rec record) error {
	if h.cfg.Bus.Conn().IsReconnecting() {
		return errAway
	}
	data, err := json.Marshal(&rec)
	if err != nil {
		return err
	}
	bounded, cancel := context.WithTimeout(ctx, h.patience())
	defer cancel()
	revision, err := h.store.Update(bounded, recordKey, data, h.lease.revision)
	if err == nil {
		h.lease.stored(sent, rec, revision)
		return nil
	}
	if !errors.Is(err, jetstream.ErrKeyRevisionMismatch) {
		return err
	}
	stands, revision, err := h.get(ctx)
	if err != nil {
		return err
	}
	switch h.lease.conflicted(h.now(), sent, rec, stands, revision) {
	case mine:
		return nil
	case again:
		return errAgain
	}
	return ErrDeposed
}

// write writes a record of a term, trying until it is stored, ctx ends, or the term does.
func (h *leader) write(ctx context.Context, t *Term, next func(*lease) record) error {
	select {
	case <-h.mu:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { h.mu <- struct{}{} }()
	sent, rec := h.now(), next(&h.lease)
	for {
		if h.term != t || !h.lease.acts(h.now()) {
			return ErrDeposed
		}
		err := h.try(ctx, sent, rec)
		switch {
		case err == nil:
			t.fence.Store(h.lease.rec.Fence)
			t.until.Store(int64(h.lease.until))
			return nil
		case errors.Is(err, ErrDeposed):
			return err
		case errors.Is(err, errAgain):
			sent, rec = h.now(), next(&h.lease)
			continue
		}
		select {
		case <-time.After(h.patience() / parts):
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
	}
}

// lead calls led for one term. ended says that led has returned while the term was not over, so that the lead was given up in order.
func (h *leader) lead(parent context.Context, led func(context.Context, *Term) error) (ended bool, err error) {
	ctx, end := context.WithCancelCause(parent)
	defer end(nil)
	t := h.open(end)
	h.cfg.Log.Info("this scaler leads", "fence", t.Fence())
	var keeping sync.WaitGroup
	kept, stop := context.WithCancel(ctx)
	keeping.Go(func() { h.keep(kept, t) })
	keeping.Go(func() { watch(kept, t) })
	err = led(ctx, t)
	deposed := ctx.Err() != nil && parent.Err() == nil
	stop()
	keeping.Wait()
	if deposed {
		h.cfg.Log.Warn("this scaler leads no more", "why", context.Cause(ctx))
	} else {
		h.resign(context.WithoutCancel(parent), t)
	}
	h.close()
	return !deposed, err
}

// open begins a term, which end ends.
func (h *leader) open(end context.CancelCauseFunc) *Term {
	<-h.mu
	defer func() { h.mu <- struct{}{} }()
	t := &Term{leader: h, found: h.lease.rec.Operation, end: end}
	t.fence.Store(h.lease.rec.Fence)
	t.until.Store(int64(h.lease.until))
	h.term = t
	return t
}

// close ends the term.
func (h *leader) close() {
	<-h.mu
	defer func() { h.mu <- struct{}{} }()
	h.lease.lost()
	h.term.until.Store(0)
	h.term = nil
}

// keep renews the lease until ctx ends.
func (h *leader) keep(ctx context.Context, t *Term) {
	tick := time.NewTicker(h.cfg.Lease / parts)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		if err := t.write(ctx, "renewing the lease", func(l *lease) record { return l.next(l.rec.Operation, false, 0) }); err != nil && ctx.Err() == nil {
			h.cfg.Log.Debug("keeping the lead", "error", err)
		}
	}
}

// watch ends the term when its time is over, whoever waits for NATS meanwhile.
func watch(ctx context.Context, t *Term) {
	for {
		left := time.Duration(t.until.Load()) - t.leader.now()
		if left <= 0 {
			t.end(fmt.Errorf("%w: the lease could not be renewed in time", ErrDeposed))
			return
		}
		select {
		case <-time.After(left):
		case <-ctx.Done():
			return
		}
	}
}

// resign says in the record that nobody acts any more, once. What is under way stays there for whoever comes next.
func (h *leader) resign(ctx context.Context, t *Term) {
	bounded, cancel := context.WithTimeout(ctx, h.patience())
	defer cancel()
	err := h.write(bounded, t, func(l *lease) record {
		rec := l.next(l.rec.Operation, false, 0)
		rec.Leader = ""
		return rec
	})
	if err != nil {
		h.cfg.Log.Debug("giving up the lead", "error", err)
	}
}
