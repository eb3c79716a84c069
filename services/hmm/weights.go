package hmm

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"

	"trireme.dev/services/hmm/ledger"
)

// DefaultWeights is Config.Weights where nothing else is said: half of the machine's memory, shared out evenly to the
// domains, in whole pages.
func DefaultWeights(domains int) int64 {
	half := int64(64 << 30) // it is an upper bound, pages are taken as they are used
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err == nil {
		half = int64(uint64(info.Totalram) * uint64(info.Unit) / 2)
	}
	half /= int64(max(domains, 1))
	return half - half%mem.HostPage
}

// openWeights answers an OpenWeights, after whoever makes the set already is done, unless that takes too long.
func (s *session) openWeights(ctx context.Context, body []byte) (any, error) {
	var o protocol.OpenWeights
	if err := protocol.Decode(body, &o); err != nil {
		return nil, err
	}
	timer := time.NewTimer(min(o.Wait, maxFindWait))
	defer timer.Stop()
	for {
		var opened protocol.OpenedWeights
		var busy bool
		var err error
		var made <-chan struct{}
		if !s.d.books.do(func(l *ledger.Ledger, _ time.Time) {
			if opened, busy, err = l.OpenWeights(s.id, o); busy {
				made = s.d.books.made(o.Key)
			}
		}) {
			return nil, mem.ErrLost
		}
		if !busy {
			return opened, err
		}
		select {
		case <-made:
		case <-timer.C:
			return opened, nil
		case <-ctx.Done():
			return nil, mem.ErrLost
		}
	}
}

// changeWeights answers a request about a set that the client holds. A session's requests of this sort are answered one
// after the other, in the order in which they came. A client that gives up while memory is still being given to the set
// closes it without waiting for that: if it were closed at once, somebody else could open the set and write what the system
// then fills with zeros, or the memory could be given to another before it is there. And what fails has to be what came last.
func (s *session) changeWeights(op protocol.Op, body []byte) (any, error) {
	if op == protocol.OpPlaceWeights {
		return s.placeWeights(body)
	}
	return s.answer(op, body)
}

// placeWeights answers a PlaceWeights: it books memory, then has the system give it, which takes the time of touching it,
// on all processors.
func (s *session) placeWeights(body []byte) (any, error) {
	var p protocol.PlaceWeights
	if err := protocol.Decode(body, &p); err != nil {
		return nil, err
	}
	var grants []protocol.Grant
	var fresh int
	err := mem.ErrLost
	s.d.books.do(func(l *ledger.Ledger, _ time.Time) { grants, fresh, err = l.PlaceWeights(s.id, p) })
	if err != nil {
		return nil, err
	}
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	for _, grant := range grants[len(grants)-fresh:] {
		g.Go(func() error { return s.d.stores[grant.Extent.Space].Back(grant.Extent) })
	}
	if err := g.Wait(); err != nil {
		if !s.d.books.do(func(l *ledger.Ledger, _ time.Time) { l.UndoWeights(s.id, p.Set, fresh) }) {
			err = errors.Join(err, mem.ErrLost)
		}
		return nil, fmt.Errorf("placing %d weights: %w", fresh, err)
	}
	return grants, nil
}
