package bus

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

// Bodies of acknowledgements (JetStream wire protocol, docs.nats.io "JetStream wire API reference").
var (
	ackAck      = []byte("+ACK")
	ackNak      = []byte("-NAK")
	ackProgress = []byte("+WPI")
)

// Delivery is one delivery of a message to this instance. Whoever took it calls exactly one of Ack, Nak and Drop; until
// then it is kept in progress, so that the server does not deliver it again.
type Delivery struct {
	Data  []byte // as wire.Marshal made it; belongs to the taker
	Reply string // acknowledgement subject, for the claim record: NakReply works on it from any process
	Stage string // whose queue it is from
	Count uint64 // how often the message was delivered, 1 is the first; counts restart with a consumer

	bus *Bus
}

func (b *Bus) newDelivery(stage string, msg *nats.Msg) *Delivery {
	d := &Delivery{Data: msg.Data, Reply: msg.Reply, Stage: stage, Count: 1, bus: b}
	if meta, err := msg.Metadata(); err == nil {
		d.Count = meta.NumDelivered
	}
	b.keeper.add(d)
	return d
}

// Adopt makes a delivery of a message that another instance has taken for the first time, not claimed, and handed to this one:
// data and reply are those of its Delivery. It is kept in progress from here, and settled as any other.
func (b *Bus) Adopt(stage string, data []byte, reply string) *Delivery {
	d := &Delivery{Data: data, Reply: reply, Stage: stage, Count: 1, bus: b}
	b.keeper.add(d)
	return d
}

// Ack takes the message off the queue and returns once the server has confirmed it (a repeated Ack is confirmed too).
// It tries until ctx ends; on an error the message is still kept in progress and Ack may be called again.
func (d *Delivery) Ack(ctx context.Context) error {
	err := d.bus.retry(ctx, func(ctx context.Context) error {
		_, err := d.bus.conn.RequestWithContext(ctx, d.Reply, ackAck)
		return err
	})
	if err != nil {
		return fmt.Errorf("acknowledging a message: %w", err)
	}
	d.bus.keeper.remove(d)
	return nil
}

// Nak gives the message back; the server delivers it again after delay, to whoever asks next. Not confirmed: if the
// nak is lost AckWait does the same later.
func (d *Delivery) Nak(delay time.Duration) error {
	d.bus.keeper.remove(d)
	return d.bus.NakReply(d.Reply, delay)
}

// Drop ends the keeping in progress and tells the server nothing: for a worker that lost its claim. The message is
// delivered again after AckWait, unless whoever took the claim acks it.
func (d *Delivery) Drop() { d.bus.keeper.remove(d) }

// NakReply gives back the message that was delivered under a reply subject, also on behalf of an instance that is gone;
// the server delivers it again after delay. The caller checks the claim first: a nak of an old delivery is honoured by
// the server. For a process that has just died a delay of some 10 ms gives the server time to see that its connection
// has ended; before that it may send the message there once more.
func (b *Bus) NakReply(reply string, delay time.Duration) error {
	body := ackNak
	if delay > 0 {
		body = fmt.Appendf(nil, `-NAK {"delay": %d}`, delay.Nanoseconds())
	}
	if err := b.conn.Publish(reply, body); err != nil {
		return fmt.Errorf("giving a message back: %w", err)
	}
	return nil
}

// keeper keeps deliveries in progress.
type keeper struct {
	every time.Duration
	send  func(reply string) error
	now   chan struct{}

	mu   sync.Mutex
	open map[*Delivery]struct{}
}

func newKeeper(every time.Duration, send func(reply string) error) *keeper {
	return &keeper{every: every, send: send, now: make(chan struct{}, 1), open: map[*Delivery]struct{}{}}
}

func (k *keeper) add(d *Delivery) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.open[d] = struct{}{}
}

func (k *keeper) remove(d *Delivery) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.open, d)
}

// kick sends for all at once, after a time without a connection.
func (k *keeper) kick() {
	select {
	case k.now <- struct{}{}:
	default: // one is under way
	}
}

func (k *keeper) run(ctx context.Context) {
	t := time.NewTicker(k.every)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		case <-k.now:
		}
		k.progress()
	}
}

// progress sends one in-progress acknowledgement for each open delivery. The lock is held while sending: a delivery
// that was removed gets none afterwards, as the one who removed it may have lost its claim. Sending only fills a
// buffer.
func (k *keeper) progress() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for d := range k.open {
		if k.send(d.Reply) != nil {
			return // the connection is closed
		}
	}
}
