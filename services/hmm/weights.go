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

// findWeights answers a Weights, after whoever makes the objects already is done with one, unless that takes too long. Memory for those
// that this client is to make is given here and not in the books, because that takes the time of touching it: nobody else sees them
// before they are final, and this connection's holds keep them until the session has ended, which waits for this call.
func (s *session) findWeights(ctx context.Context, body []byte) (any, error) {
	var v protocol.Weights
	if err := protocol.Decode(body, &v); err != nil {
		return nil, err
	}
	timer := time.NewTimer(min(v.Wait, maxFindWait))
	defer timer.Stop()
	for {
		var placed []protocol.Placed
		var busy bool
		var err error
		var made <-chan struct{}
		if !s.d.books.do(func(l *ledger.Ledger, _ time.Time) {
			if placed, busy, err = l.Weights(s.id, v); busy {
				made = s.d.books.made(v.Key)
			}
		}) {
			return nil, mem.ErrLost
		}
		if err != nil {
			return nil, err
		}
		if !busy {
			return placed, s.backWeights(placed)
		}
		select {
		case <-made:
		case <-timer.C:
			return placed, nil
		case <-ctx.Done():
			return nil, mem.ErrLost
		}
	}
}

// backWeights has the system give the memory of objects to be made, on all processors, or takes all back that was placed.
func (s *session) backWeights(placed []protocol.Placed) error {
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	for _, p := range placed {
		if p.State == protocol.PlacedMake {
			g.Go(func() error { return s.d.stores[p.Grant.Extent.Space].Back(p.Grant.Extent) })
		}
	}
	err := g.Wait()
	if err == nil {
		return nil
	}
	var all []protocol.Object
	for _, p := range placed {
		for _, x := range []*protocol.Grant{p.Grant, p.Source} {
			if x != nil {
				all = append(all, protocol.Object{ID: x.Handle.Object, Generation: x.Handle.Generation})
			}
		}
	}
	err = fmt.Errorf("placing weights: %w", err)
	if !s.d.books.do(func(l *ledger.Ledger, _ time.Time) { err = errors.Join(err, l.Free(s.id, all)) }) {
		err = errors.Join(err, mem.ErrLost)
	}
	return err
}
