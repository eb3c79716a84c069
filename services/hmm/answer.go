package hmm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"

	"trireme.dev/services/hmm/ledger"
)

// answer does what a request asks for: one of those that take no time, but Attach.
func (s *session) answer(op protocol.Op, body []byte) (any, error) {
	switch op {
	case protocol.OpSeal:
		return with(s, body, func(l *ledger.Ledger, now time.Time, v protocol.Seal) (any, error) {
			return l.Seal(now, s.id, v)
		})
	case protocol.OpKeep:
		return with(s, body, func(l *ledger.Ledger, now time.Time, k protocol.Keep) (any, error) {
			return nil, l.Keep(now, s.id, k)
		})
	case protocol.OpFree:
		return with(s, body, func(l *ledger.Ledger, _ time.Time, objects []protocol.Object) (any, error) {
			return nil, l.Free(s.id, objects)
		})
	case protocol.OpClaim:
		return with(s, body, func(l *ledger.Ledger, now time.Time, c protocol.Claim) (any, error) {
			return l.Claim(now, s.id, c)
		})
	case protocol.OpUnclaim:
		return with(s, body, func(l *ledger.Ledger, _ time.Time, u protocol.Unclaim) (any, error) {
			return nil, l.Unclaim(s.id, u)
		})
	case protocol.OpInherit:
		return with(s, body, func(l *ledger.Ledger, now time.Time, v protocol.Inherit) (any, error) {
			return nil, l.Inherit(now, s.id, v)
		})
	case protocol.OpGone:
		return with(s, body, func(l *ledger.Ledger, _ time.Time, stage string) (any, error) {
			return l.Gone(stage), nil
		})
	case protocol.OpUnclaimed:
		return with(s, body, func(l *ledger.Ledger, _ time.Time, parts []protocol.Part) (any, error) {
			return l.Unclaimed(parts), nil
		})
	case protocol.OpOrphans:
		return with(s, body, func(l *ledger.Ledger, _ time.Time, stage string) (any, error) {
			return l.Orphans(stage), nil
		})
	case protocol.OpEnd:
		return with(s, body, func(l *ledger.Ledger, now time.Time, request string) (any, error) {
			return nil, l.End(now, request)
		})
	case protocol.OpPublishMM:
		return with(s, body, func(l *ledger.Ledger, _ time.Time, p protocol.PublishMM) (any, error) {
			return nil, l.PublishMM(s.id, p)
		})
	case protocol.OpAbandonMM:
		return with(s, body, func(l *ledger.Ledger, _ time.Time, a protocol.AbandonMM) (any, error) {
			l.AbandonMM(s.id, a)
			return nil, nil
		})
	case protocol.OpCacheBlocks:
		return with(s, body, func(l *ledger.Ledger, _ time.Time, v protocol.CacheBlocks) (any, error) {
			return nil, l.CacheBlocks(s.id, v)
		})
	case protocol.OpFindPrefix:
		return with(s, body, func(l *ledger.Ledger, _ time.Time, f protocol.FindPrefix) (any, error) {
			return l.FindPrefix(s.id, f)
		})
	case protocol.OpCountPrefix:
		return with(s, body, func(l *ledger.Ledger, _ time.Time, f protocol.FindPrefix) (any, error) {
			return l.CountPrefix(s.id, f)
		})
	case protocol.OpForget:
		return with(s, body, func(l *ledger.Ledger, _ time.Time, objects []protocol.Object) (any, error) {
			return nil, l.Forget(s.id, objects)
		})
	case protocol.OpCopied:
		return with(s, body, func(l *ledger.Ledger, _ time.Time, copies []protocol.Copy) (any, error) {
			return l.Copied(s.id, copies)
		})
	case protocol.OpLocate:
		return with(s, body, func(l *ledger.Ledger, _ time.Time, q protocol.Locate) (any, error) {
			return l.Locate(s.id, q)
		})
	case protocol.OpSealWeights:
		return with(s, body, func(l *ledger.Ledger, _ time.Time, items []protocol.Sealing) (any, error) {
			return nil, l.SealWeights(s.id, items)
		})
	case protocol.OpJoin:
		return with(s, body, func(l *ledger.Ledger, now time.Time, j protocol.Join) (any, error) {
			return l.Join(now, s.id, j)
		})
	case protocol.OpPart:
		return with(s, body, func(l *ledger.Ledger, now time.Time, p protocol.Parting) (any, error) {
			return nil, l.Part(now, s.id, p)
		})
	case protocol.OpUse:
		return with(s, body, func(l *ledger.Ledger, _ time.Time, again bool) (any, error) {
			return l.Use(s.id, again), nil
		})
	case protocol.OpStats:
		return s.d.Stats(), nil
	}
	return nil, fmt.Errorf("op %d: %w", op, mem.ErrInvalid)
}

// attach gives objects of this node.
func (s *session) attach(a protocol.Attach) (out []protocol.Grant, err error) {
	if !s.d.books.do(func(l *ledger.Ledger, _ time.Time) { out, err = l.Attach(s.id, a) }) {
		return nil, mem.ErrLost
	}
	return out, err
}

// with decodes a body and calls f on the books.
func with[T any](s *session, body []byte, f func(*ledger.Ledger, time.Time, T) (any, error)) (out any, err error) {
	var v T
	if err := protocol.Decode(body, &v); err != nil {
		return nil, err
	}
	if !s.d.books.do(func(l *ledger.Ledger, now time.Time) { out, err = f(l, now, v) }) {
		return nil, mem.ErrLost
	}
	return out, err
}

// findMM answers a FindMM, after whoever makes the object already is done, unless that takes too long.
func (s *session) findMM(ctx context.Context, body []byte) (any, error) {
	var f protocol.FindMM
	if err := protocol.Decode(body, &f); err != nil {
		return nil, err
	}
	began, left := time.Now(), f.Ref.Left
	timer := time.NewTimer(min(f.Wait, maxFindWait))
	defer timer.Stop()
	for {
		var found protocol.FoundMM
		var busy bool
		var err error
		var made <-chan struct{}
		if !s.d.books.do(func(l *ledger.Ledger, now time.Time) {
			f.Ref.Left = left - now.Sub(began)
			if found, busy, err = l.FindMM(now, s.id, f); busy {
				made = s.d.books.made(f.Key)
			}
		}) {
			return nil, mem.ErrLost
		}
		if !busy {
			return found, err
		}
		select {
		case <-made:
		case <-timer.C:
			return protocol.FoundMM{}, nil
		case <-ctx.Done():
			return nil, mem.ErrLost
		}
	}
}

// alloc books memory, then has the system give it, here and not in the books because that takes time. Nobody else knows
// the objects yet, and this connection's holds keep them until the session has ended, which waits for this call.
func (s *session) alloc(body []byte) (any, error) {
	var specs []protocol.Spec
	if err := protocol.Decode(body, &specs); err != nil {
		return nil, err
	}
	return s.give(specs)
}

// give allocates objects for the client, all or none.
func (s *session) give(specs []protocol.Spec) ([]protocol.Grant, error) {
	var grants []protocol.Grant
	err := mem.ErrLost
	s.d.books.do(func(l *ledger.Ledger, now time.Time) { grants, err = l.Alloc(now, s.id, specs) })
	if err != nil {
		return nil, err
	}
	for _, g := range grants {
		if err := s.d.stores[g.Extent.Space].Back(g.Extent); err != nil {
			if !s.d.books.do(func(l *ledger.Ledger, _ time.Time) { l.Undo(grants) }) {
				err = errors.Join(err, mem.ErrLost)
			}
			return nil, fmt.Errorf("allocating %d objects: %w", len(grants), err)
		}
	}
	return grants, nil
}
