package gateway

import (
	"context"
	"errors"
	"time"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/wire"
)

// joinWait is how long it is tried to delete a join record.
const joinWait = 10 * time.Minute

// deleteJoins deletes the join records of a request that has ended. An outage of NATS may have to be waited for, which holds
// nobody up; a gateway that stops waits for endWait.
func (g *Gateway) deleteJoins(keys []string) {
	ctx, cancel := context.WithTimeout(context.Background(), joinWait)
	defer cancel()
	defer context.AfterFunc(g.base, func() { time.AfterFunc(endWait, cancel) })()
	for _, key := range keys {
		if err := g.bus.DeleteJoin(ctx, key); err != nil {
			g.log.Warn("deleting a join record; it expires", "key", key, "error", err)
		}
	}
}

// sweepJoins deletes, whenever NATS is back, the join records of this gateway's requests that have ended, until ctx ends: a
// nats-server that is killed may bring back what was deleted (RATIONALE.md).
func (g *Gateway) sweepJoins(ctx context.Context) {
	for {
		back := g.bus.Reconnected()
		if err := g.sweep(ctx); err != nil && ctx.Err() == nil {
			g.log.Warn("looking for join records of requests that have ended; they expire", "error", err)
		}
		select {
		case <-back:
		case <-ctx.Done():
			return
		}
	}
}

func (g *Gateway) sweep(ctx context.Context) error {
	keys, err := g.bus.JoinKeys(ctx)
	if err != nil {
		return err
	}
	for _, key := range keys {
		request := wire.JoinRequest(key)
		if g.dispatch.box(request) != nil {
			continue
		}
		j, err := g.bus.Join(ctx, key)
		if errors.Is(err, bus.ErrNoJoin) {
			continue
		}
		if err != nil {
			return err
		}
		if j.Prefill.Request.Gateway != g.cfg.Instance {
			continue // another gateway knows whether it has ended
		}
		if err := g.bus.DeleteJoin(ctx, key); err != nil {
			return err
		}
	}
	return nil
}
