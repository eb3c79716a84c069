package bus

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

// pullRequest is the body of a JetStream pull request. With NoWait and Expires the server waits for the first message
// until Expires, sends all that are there and ends the request with a status message (nats-server 2.10 and later).
type pullRequest struct {
	Batch   int           `json:"batch"`
	NoWait  bool          `json:"no_wait,omitempty"`
	Expires time.Duration `json:"expires,omitempty"` // nanoseconds

	Group    string `json:"group"` // of the consumer's priority groups, the one there is
	Priority int    `json:"priority,omitempty"`
}

// pullGroup is the priority group of all consumers: in one, the server gives a message to who waits at the lowest priority.
const pullGroup = "takers"

// pull is one pull request at the server. It has a subscription of its own, as the server drops a request that nobody
// listens to any more. No message waits for AckWait in a pull that was given up: what still arrives is naked at once,
// so that another instance gets it. Who subscribes to everything (nats sub ">") listens, too, for the server: then a pull that
// was given up goes on there, and its subscription stays for as long.
type pull struct {
	bus     *Bus
	sub     *nats.Subscription
	expires time.Time // at the server, if not before

	mu      sync.Mutex
	arrived chan *nats.Msg // has room for all messages and the status message that ends the pull
	over    bool           // nobody reads arrived any more
	stop    func()         // ends abandon's wait, once that has begun
}

// startPull asks the server for up to a.Limit messages within a.Wait.
func (c *Consumer) startPull(a Ask) (*pull, error) {
	body, err := json.Marshal(pullRequest{
		Batch: a.Limit, NoWait: true, Expires: a.Wait, Group: pullGroup, Priority: min(max(a.Level, 0), MaxLevel),
	})
	if err != nil {
		panic("BUG: a pull request cannot be encoded: " + err.Error())
	}
	p := &pull{bus: c.bus, expires: time.Now().Add(a.Wait + tryTimeout), arrived: make(chan *nats.Msg, a.Limit+1)}
	inbox := c.bus.conn.NewInbox()
	if p.sub, err = c.bus.conn.Subscribe(inbox, p.arrive); err != nil {
		return nil, fmt.Errorf("subscribing to messages of stage %s: %w", c.stage.name, err)
	}
	if err := p.sub.SetPendingLimits(-1, -1); err != nil {
		p.finish(true)
		return nil, fmt.Errorf("subscribing to messages of stage %s: %w", c.stage.name, err)
	}
	if err := c.bus.conn.PublishRequest(c.subject, inbox, body); err != nil {
		p.finish(true)
		return nil, fmt.Errorf("asking for messages of stage %s: %w", c.stage.name, err)
	}
	return p, nil
}

// arrive is called for each message, one at a time.
func (p *pull) arrive(msg *nats.Msg) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case !p.over && len(p.arrived) < cap(p.arrived):
		p.arrived <- msg
	case status(msg) == 0:
		if err := p.bus.NakReply(msg.Reply, 0); err != nil {
			p.bus.log.Debug("a late message is not given back; AckWait redelivers it", "subject", msg.Subject, "error", err)
		}
	case p.stop != nil: // the server has ended it
		p.stop()
	}
}

// finish ends a pull and returns the messages that arrived and were not read. Ended says that the server has ended it
// already; if not, it does as soon as it learns that nobody listens any more, and what it has sent by then is naked.
func (p *pull) finish(ended bool) (rest []*nats.Msg) {
	p.mu.Lock()
	p.over = true
	for len(p.arrived) > 0 {
		if msg := <-p.arrived; status(msg) == 0 {
			rest = append(rest, msg)
		} else {
			ended = true
		}
	}
	p.mu.Unlock()
	if ended || !p.bus.background(p.abandon) {
		p.unsubscribe(p.sub.Unsubscribe)
	}
	return rest
}

// abandon ends the subscription of a pull that was given up: at once, unless somebody subscribes to everything, else when the
// server has ended the pull.
func (p *pull) abandon() {
	ctx, stop := p.bus.within(p.bus.ctx, time.Until(p.expires))
	defer stop()
	p.mu.Lock()
	p.stop = stop
	p.mu.Unlock()
	// A subject that nobody knows: the server says so at once, or somebody hears it, who does not answer.
	if _, err := p.bus.conn.RequestWithContext(ctx, p.bus.conn.NewInbox(), nil); !errors.Is(err, nats.ErrNoResponders) {
		<-ctx.Done()
	}
	p.unsubscribe(p.sub.Drain)
}

// unsubscribe ends the subscription in one of its ways.
func (p *pull) unsubscribe(end func() error) {
	if err := end(); err != nil {
		p.bus.log.Debug("subscription of a pull not ended; it goes with the connection", "error", err)
	}
}

// status is the code of a status message of the server, 0 for a message of the stream.
func status(msg *nats.Msg) int {
	if len(msg.Data) > 0 {
		return 0
	}
	code, _ := strconv.Atoi(msg.Header.Get("Status")) // a header without one is a message
	return code
}
