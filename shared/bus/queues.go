package bus

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"trireme.dev/shared/wire"
)

// Queue is the state of one stage's work queue.
type Queue struct {
	Stage       string        `json:"stage"`
	Stream      string        `json:"stream"`
	Consumer    string        `json:"consumer"`
	Pending     uint64        `json:"pending"`     // messages that nobody has taken yet
	InWork      int           `json:"in_work"`     // taken and not acked
	Redelivered int           `json:"redelivered"` // taken and not acked, delivered more than once
	Waiting     int           `json:"waiting"`     // pull requests that wait for a message
	Oldest      time.Duration `json:"oldest_ns"`   // age of the oldest message on the queue, taken or not; 0 when empty
	Untaken     time.Duration `json:"untaken_ns"`  // age of the oldest message that nobody has taken yet; 0 when there is none
}

// Queues reads the state of all stages' queues, in the order of the path.
func (b *Bus) Queues(ctx context.Context) ([]Queue, error) {
	queues := make([]Queue, 0, len(stages))
	for _, s := range stages {
		q := Queue{Stage: s.name, Stream: s.stream, Consumer: s.consumer}
		stream, err := b.js.Stream(ctx, s.stream) // carries the state
		if err != nil {
			return nil, fmt.Errorf("reading stream %s: %w", s.stream, err)
		}
		if info := stream.CachedInfo(); info.State.Msgs > 0 {
			q.Oldest = max(0, info.TimeStamp.Sub(info.State.FirstTime)) // both by the server's clock
		}
		consumer, err := b.js.Consumer(ctx, s.stream, s.consumer)
		if err != nil {
			return nil, fmt.Errorf("reading consumer %s of stream %s: %w", s.consumer, s.stream, err)
		}
		info := consumer.CachedInfo()
		q.Pending, q.InWork = info.NumPending, info.NumAckPending
		q.Redelivered, q.Waiting = info.NumRedelivered, info.NumWaiting
		if q.Pending > 0 {
			// The first message behind the last that was taken: one message is read, which is small.
			m, err := stream.GetMsg(ctx, info.Delivered.Stream+1, jetstream.WithGetMsgSubject(wire.StageSubjects(s.name)))
			switch {
			case err == nil:
				q.Untaken = max(0, info.TimeStamp.Sub(m.Time)) // both by the server's clock
			case !errors.Is(err, jetstream.ErrMsgNotFound): // taken and acknowledged meanwhile
				return nil, fmt.Errorf("reading the oldest message of stream %s: %w", s.stream, err)
			}
		}
		queues = append(queues, q)
	}
	return queues, nil
}
