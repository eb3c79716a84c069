package bus

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

// maxBatch is the most messages that one call of Next takes.
const maxBatch = 1 << 12

// Consumer takes messages from one stage's work queue. Each message goes to one of all Consumers of the stage, in
// whatever process. Its owner is the Bus.
type Consumer struct {
	bus     *Bus
	stage   stage
	subject string     // of pull requests
	turn    sync.Mutex // held by Next
}

// Consumer prepares to take messages of a stage; none is taken before Next asks for it.
func (b *Bus) Consumer(ctx context.Context, stage string) (*Consumer, error) {
	s, err := findStage(stage)
	if err != nil {
		return nil, err
	}
	err = b.retry(ctx, func(ctx context.Context) error {
		_, err := b.js.Consumer(ctx, s.stream, s.consumer)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("consumer of stage %s: %w", stage, err)
	}
	return &Consumer{bus: b, stage: s, subject: "$JS.API.CONSUMER.MSG.NEXT." + s.stream + "." + s.consumer}, nil
}

// Next takes up to limit messages (and at most 4096). It waits for the first one at most wait and returns with it all
// that are there at once; when wait passes without one it returns nil, nil. A broken connection only makes it wait.
// Errors: the end of ctx, ErrClosed; never with messages. Calls from several goroutines take turns.
//
// Each Delivery is kept in progress until its Ack, Nak or Drop.
func (c *Consumer) Next(ctx context.Context, limit int, wait time.Duration) ([]*Delivery, error) {
	if limit <= 0 {
		return nil, nil
	}
	c.turn.Lock()
	defer c.turn.Unlock()
	deadline := time.Now().Add(wait)
	for pause := newPause(); ; {
		got, end := c.pull(ctx, min(limit, maxBatch), time.Until(deadline))
		switch {
		case len(got) > 0:
			return got, nil
		case ctx.Err() != nil:
			return nil, fmt.Errorf("taking messages of stage %s: %w", c.stage.name, context.Cause(ctx))
		case end == pullClosed, c.bus.ctx.Err() != nil:
			return nil, fmt.Errorf("taking messages of stage %s: %w", c.stage.name, ErrClosed)
		case time.Until(deadline) <= 0:
			return nil, nil
		case end == pullRefused:
			rest, stop := c.bus.within(ctx, time.Until(deadline))
			pause.sleep(rest) //nolint:errcheck // the next turn of the loop sees what has ended
			stop()
		}
	}
}

// pullEnd says why a pull gave no more messages.
type pullEnd int

const (
	pullOver    pullEnd = iota // the server has no more for now, or the time is up
	pullRefused                // the server cannot serve pulls at the moment
	pullClosed                 // the Bus is closed
)

// pull asks the server once.
func (c *Consumer) pull(ctx context.Context, limit int, wait time.Duration) (got []*Delivery, end pullEnd) {
	if !c.bus.conn.IsConnected() && !c.bus.conn.IsClosed() {
		return nil, pullRefused // the client would send the request after the reconnect, when nobody waits any more
	}
	wait = max(0, wait)
	p, err := c.startPull(limit, wait)
	if err != nil {
		if errors.Is(err, nats.ErrConnectionClosed) || errors.Is(err, nats.ErrConnectionDraining) {
			return nil, pullClosed
		}
		return nil, pullRefused
	}
	ended := false // by the server
	defer func() {
		for _, msg := range p.finish(ended) {
			got = append(got, c.bus.newDelivery(c.stage.name, msg))
		}
	}()
	// The server ends the request; the margin is for an end that the network swallowed.
	within, stop := c.bus.within(ctx, wait+tryTimeout)
	defer stop()
	for len(got) < limit {
		select {
		case <-within.Done():
			return got, pullOver
		case msg := <-p.arrived:
			if code := status(msg); code != 0 {
				ended = true
				return got, c.ended(code, msg)
			}
			got = append(got, c.bus.newDelivery(c.stage.name, msg))
		}
	}
	ended = true
	return got, pullOver
}

// ended reads the status message that ends a pull.
func (c *Consumer) ended(code int, msg *nats.Msg) pullEnd {
	why := msg.Header.Get("Description")
	if code == 404 || code == 408 && why != "Requests Pending" { // pending: others wait for the few messages there are
		return pullOver
	}
	c.bus.log.Debug("JetStream refuses a pull", "stage", c.stage.name, "status", code, "why", why)
	return pullRefused
}
