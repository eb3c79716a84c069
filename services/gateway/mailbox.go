package gateway

import (
	"context"
	"fmt"
	"log/slog"
	"sync"

	"github.com/nats-io/nats.go"

	"trireme.dev/shared/wire"
)

// event is one message for one request: exactly one of run, confirm and lost counts.
type event struct {
	instance string    // sender of run
	run      *wire.Run // of a message whose runs are for many requests
	confirm  *wire.Confirm
	reply    *nats.Msg // the message that confirm answers
	lost     *wire.Lost
}

// mailbox holds what has come for one request. What is in it is bounded by the senders: a decoder runs at most 256
// tokens ahead of what the request has confirmed.
type mailbox struct {
	mu     sync.Mutex
	events []event
	wake   chan struct{} // capacity 1: there may be events
}

func newMailbox() *mailbox { return &mailbox{wake: make(chan struct{}, 1)} }

func (m *mailbox) put(e event) {
	m.mu.Lock()
	m.events = append(m.events, e)
	m.mu.Unlock()
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// take swaps the events for spare, which is emptied for its next use.
func (m *mailbox) take(spare []event) []event {
	clear(spare)
	m.mu.Lock()
	defer m.mu.Unlock()
	events := m.events
	m.events = spare[:0]
	return events
}

// dispatcher brings messages of stages to the requests that they are for. One goroutine reads all subjects of this
// gateway from one channel, so messages of one sender stay in order whatever their subject.
type dispatcher struct {
	log      *slog.Logger
	gateway  string
	messages chan *nats.Msg

	mu    sync.RWMutex
	boxes map[string]*mailbox // by request
}

// subscribe listens on the gateway's subjects. Of what is not read in time, more than inbox messages, the client of NATS drops
// the newest (nats.ErrSlowConsumer): tokens are asked for again when their gap is seen, and stages ask again what they asked.
func subscribe(conn *nats.Conn, gateway string, inbox int, log *slog.Logger) (d *dispatcher, unsubscribe func(), err error) {
	d = &dispatcher{log: log, gateway: gateway, messages: make(chan *nats.Msg, inbox), boxes: make(map[string]*mailbox)}
	var subs []*nats.Subscription
	unsubscribe = func() {
		for _, s := range subs {
			_ = s.Unsubscribe() // fails only when the connection is closed
		}
	}
	for _, subject := range []string{wire.SubjectTokens(gateway), wire.SubjectConfirm(gateway), wire.SubjectLost(gateway)} {
		s, err := conn.ChanSubscribe(subject, d.messages)
		if err != nil {
			unsubscribe()
			return nil, nil, fmt.Errorf("subscribing to %s: %w", subject, err)
		}
		subs = append(subs, s)
	}
	return d, unsubscribe, nil
}

// open makes the mailbox of a request.
func (d *dispatcher) open(request string) *mailbox {
	m := newMailbox()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.boxes[request] = m
	return m
}

// close removes a mailbox. Questions that are left in it, and later ones, are answered: nothing is needed any more.
func (d *dispatcher) close(request string) {
	d.mu.Lock()
	m := d.boxes[request]
	delete(d.boxes, request)
	d.mu.Unlock()
	for _, e := range m.take(nil) {
		if e.confirm != nil {
			d.answer(e.reply, &wire.Confirmed{Next: e.confirm.Next, Over: true, Ended: true})
		}
	}
}

func (d *dispatcher) box(request string) *mailbox {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.boxes[request]
}

// run brings messages until ctx ends.
func (d *dispatcher) run(ctx context.Context) {
	tokens, confirm, lost := wire.SubjectTokens(d.gateway), wire.SubjectConfirm(d.gateway), wire.SubjectLost(d.gateway)
	for {
		var msg *nats.Msg
		select {
		case msg = <-d.messages:
		case <-ctx.Done():
			return
		}
		var err error
		switch msg.Subject {
		case tokens:
			err = d.tokens(msg)
		case confirm:
			err = d.confirm(msg)
		case lost:
			err = d.lost(msg)
		}
		if err != nil {
			d.log.Warn("ignoring a message", "subject", msg.Subject, "error", err)
		}
	}
}

func (d *dispatcher) tokens(msg *nats.Msg) error {
	var m wire.Tokens
	if err := wire.Unmarshal(msg.Data, &m); err != nil {
		return err
	}
	for i := range m.Items {
		if box := d.box(m.Items[i].Request); box != nil {
			box.put(event{instance: m.Instance, run: &m.Items[i]})
		}
	}
	return nil
}

func (d *dispatcher) confirm(msg *nats.Msg) error {
	m := new(wire.Confirm)
	if err := wire.Unmarshal(msg.Data, m); err != nil {
		return err
	}
	// Under the lock, so that close sees it or it sees that there is no mailbox.
	d.mu.RLock()
	box := d.boxes[m.Request]
	if box != nil {
		box.put(event{confirm: m, reply: msg})
	}
	d.mu.RUnlock()
	if box == nil {
		d.answer(msg, &wire.Confirmed{Next: m.Next, Over: true, Ended: true})
	}
	return nil
}

func (d *dispatcher) lost(msg *nats.Msg) error {
	m := new(wire.Lost)
	if err := wire.Unmarshal(msg.Data, m); err != nil {
		return err
	}
	box := d.box(m.Request)
	if box != nil {
		box.put(event{lost: m})
	}
	d.answer(msg, &wire.Confirmed{Ended: box == nil})
	return nil
}

// answer answers a stage that asked.
func (d *dispatcher) answer(msg *nats.Msg, c *wire.Confirmed) {
	if msg.Reply == "" {
		return // the sender does not want to know
	}
	data, err := wire.Marshal(c)
	if err == nil {
		err = msg.Respond(data)
	}
	if err != nil {
		d.log.Debug("answering a stage; it asks again", "error", err)
	}
}
