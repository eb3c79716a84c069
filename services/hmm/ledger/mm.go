package ledger

import (
	"fmt"
	"time"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"
)

// encoding is an MM object that is being made for the cache. It ends with its claim, if it is not published before.
type encoding struct {
	key    protocol.Key
	ticket uint64
	claim  *claim
}

// FindMM looks for the MM object of a key. Found, it gets the request hold of f.Ref. When somebody makes it already,
// busy is true: Effects names the key when that has ended, and FindMM is called again. Otherwise the caller begins: the
// ticket that it gets is good for one Publish or Abandon, as long as it holds its claim. Neither handle nor ticket mean
// that there is no cache.
func (l *Ledger) FindMM(now time.Time, id Conn, f protocol.FindMM) (found protocol.FoundMM, busy bool, err error) {
	c, err := l.stage(id)
	if err != nil {
		return found, false, fmt.Errorf("looking for an MM object: %w", err)
	}
	r, err := l.touch(now, l.conn(id), f.Ref)
	if err != nil {
		return found, false, fmt.Errorf("looking for an MM object: %w", err)
	}
	if l.cfg.MMCache == 0 {
		return found, false, nil
	}
	if o := l.mm[f.Key]; o != nil {
		l.wake(o)
		o.requests[r] = f.Ref.Attempt
		r.objects[o] = true
		h := o.handle
		return protocol.FoundMM{Handle: &h}, false, nil
	}
	if l.making[f.Key] != nil {
		return found, true, nil
	}
	k, ok := l.claims[keyOf(f.Part)]
	if !ok || k.generation != f.Generation || k.owner != c {
		return found, false, fmt.Errorf("beginning an MM object for part %d of %s: %w", f.Part.Part, f.Part.Stage, mem.ErrFenced)
	}
	if k.encoding != nil {
		return found, false, fmt.Errorf("beginning a second MM object under one claim: %w", mem.ErrInvalid)
	}
	k.encoding = &encoding{key: f.Key, ticket: l.next(), claim: k}
	l.making[f.Key] = k.encoding
	return protocol.FoundMM{Ticket: k.encoding.ticket}, false, nil
}

// PublishMM gives a sealed MM object that the client holds to the cache: ErrFenced when the ticket's claim was lost.
func (l *Ledger) PublishMM(id Conn, p protocol.PublishMM) error {
	o, err := l.held(id, p.Object)
	if err == nil && (o.handle.Kind != mem.KindMM || !o.handle.Sealed || o.key != nil) {
		err = fmt.Errorf("it is %v, or not sealed, or has a key: %w", o.handle.Kind, mem.ErrInvalid)
	}
	if err != nil {
		return fmt.Errorf("publishing object %d: %w", p.Object.ID, err)
	}
	e := l.making[p.Key]
	if e == nil || e.ticket != p.Ticket || e.claim.owner != l.conn(id) {
		return fmt.Errorf("publishing object %d: %w", p.Object.ID, mem.ErrFenced)
	}
	l.endEncoding(e)
	key := p.Key
	o.key = &key
	l.mm[key] = o
	return nil
}

// AbandonMM gives a ticket back: another one who waits may begin. One that is not good any more changes nothing.
func (l *Ledger) AbandonMM(id Conn, a protocol.AbandonMM) {
	if e := l.making[a.Key]; e != nil && e.ticket == a.Ticket && e.claim.owner == l.conn(id) {
		l.endEncoding(e)
	}
}

// endEncoding ends what a claim makes, nil for nothing, and wakes those who wait for it.
func (l *Ledger) endEncoding(e *encoding) {
	if e == nil {
		return
	}
	e.claim.encoding = nil
	delete(l.making, e.key)
	l.effects.Settled = append(l.effects.Settled, e.key)
}
