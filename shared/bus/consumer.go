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

// Ask is how somebody asks for messages.
type Ask struct {
	Limit int           // messages at most, and at most 4096
	Wait  time.Duration // for the first one
	// Level is who goes first of those who wait for a message: the lowest, from 0 to MaxLevel; among equals whoever asked first.
	Level int
	// Stale, if not nil, ends the wait when it is closed: the asker's Level or Limit is another by now.
	Stale <-chan struct{}
}

// MaxLevel is the highest Ask.Level (NATS ADR-42, prioritized consumers).
const MaxLevel = 9

// Next is Take for those who are all alike: at level 0.
func (c *Consumer) Next(ctx context.Context, limit int, wait time.Duration) ([]*Delivery, error) {
	return c.Take(ctx, Ask{Limit: limit, Wait: wait})
}

// Take takes up to a.Limit messages. It waits for the first one at most a.Wait and returns with it all that are there at
// once; when a.Wait passes without one, or a.Stale is closed, it returns nil, nil. A broken connection only makes it wait.
// Errors: the end of ctx, ErrClosed; never with messages. Calls from several goroutines take turns.
//
// Each Delivery is kept in progress until its Ack, Nak or Drop.
func (c *Consumer) Take(ctx context.Context, a Ask) ([]*Delivery, error) {
	if a.Limit <= 0 {
		return nil, nil
	}
	a.Limit = min(a.Limit, maxBatch)
	c.turn.Lock()
	defer c.turn.Unlock()
	deadline := time.Now().Add(a.Wait)
	for pause := newPause(); ; {
		a.Wait = time.Until(deadline)
		got, end := c.pull(ctx, a)
		switch {
		case len(got) > 0:
			return got, nil
		case end == pullStale:
			return nil, nil
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
	pullStale                  // the asker wants to ask differently
)

// pull asks the server once.
func (c *Consumer) pull(ctx context.Context, a Ask) (got []*Delivery, end pullEnd) {
	if !c.bus.conn.IsConnected() && !c.bus.conn.IsClosed() {
		return nil, pullRefused // the client would send the request after the reconnect, when nobody waits any more
	}
	a.Wait = max(0, a.Wait)
	p, err := c.startPull(a)
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
	within, stop := c.bus.within(ctx, a.Wait+tryTimeout)
	defer stop()
	for len(got) < a.Limit {
		select {
		case <-within.Done():
			return got, pullOver
		case <-a.Stale:
			return got, pullStale
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
