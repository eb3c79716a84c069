package bus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"trireme.dev/shared/wire"
)

// Bounds of the stream of events: what is older, or more, goes first. There is no bound of bytes, which the server would
// reserve at once and refuse on a small disk.
const (
	eventsAge  = 7 * 24 * time.Hour
	eventsMost = 100_000
)

// ensureEvents makes the stream of events.
func (b *Bus) ensureEvents(ctx context.Context) error {
	copies, err := b.copies(ctx, wire.StreamEvents)
	if err != nil {
		return err
	}
	_, err = b.ensureStream(ctx, jetstream.StreamConfig{
		Name:        wire.StreamEvents,
		Description: "what has happened to the system, for operators",
		Subjects:    []string{wire.EventSubjects("")},
		Storage:     jetstream.FileStorage,
		Discard:     jetstream.DiscardOld,
		MaxAge:      eventsAge,
		MaxMsgs:     eventsMost,
		MaxMsgSize:  wire.MaxMessage,
		Replicas:    copies,
	})
	if err != nil {
		return fmt.Errorf("stream %s: %w", wire.StreamEvents, err)
	}
	return nil
}

// Emit publishes an event. It does not wait for NATS to store it: while there is no connection it is kept and sent later, or
// lost with the process, which is logged nowhere but here.
func (b *Bus) Emit(e wire.Event) {
	subject, data, err := e.Message()
	if err == nil {
		err = b.conn.Publish(subject, data)
	}
	if err != nil {
		b.log.Warn("an event is lost", "kind", e.Kind, "text", e.Text, "error", err)
	}
}

// EventQuery says which events are asked for.
type EventQuery struct {
	Kinds []string      // kinds or groups; none: all
	Since time.Duration // how old the oldest may be; 0: as old as there are
	After uint64        // only what comes behind the event of this sequence; 0: all. Since is then without effect
	// Follow has Events go on with what comes after the last that is there.
	Follow bool
}

// Events calls f with the events that are asked for, oldest first, until there are no more or, with Follow, until ctx ends,
// which is no error then. It returns f's error at once. A message that is no event is skipped.
func (b *Bus) Events(ctx context.Context, q EventQuery, f func(wire.Event) error) error {
	err := b.events(ctx, q, f)
	if q.Follow && ctx.Err() != nil {
		return nil
	}
	return err
}

func (b *Bus) events(ctx context.Context, q EventQuery, f func(wire.Event) error) error {
	stream, err := b.js.Stream(ctx, wire.StreamEvents)
	if err != nil {
		return fmt.Errorf("opening stream %s: %w", wire.StreamEvents, err)
	}
	cfg := jetstream.OrderedConsumerConfig{DeliverPolicy: jetstream.DeliverAllPolicy}
	for _, kind := range q.Kinds {
		cfg.FilterSubjects = append(cfg.FilterSubjects, wire.EventSubjects(kind))
	}
	switch {
	case q.After > 0:
		cfg.DeliverPolicy, cfg.OptStartSeq = jetstream.DeliverByStartSequencePolicy, q.After+1
	case q.Since > 0:
		from := stream.CachedInfo().TimeStamp.Add(-q.Since) // by the server's clock, as the messages' times are
		cfg.DeliverPolicy, cfg.OptStartTime = jetstream.DeliverByStartTimePolicy, &from
	}
	consumer, err := stream.OrderedConsumer(ctx, cfg)
	if err != nil {
		return fmt.Errorf("reading stream %s: %w", wire.StreamEvents, err)
	}
	defer func() { // the server would keep it for minutes: the client does not delete what it has made
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), tryTimeout)
		defer cancel()
		if err := stream.DeleteConsumer(last, consumer.CachedInfo().Name); err != nil {
			b.log.Debug("the consumer of events is not deleted; it expires", "error", err)
		}
	}()
	if left := consumer.CachedInfo().NumPending; left == 0 && !q.Follow {
		return nil
	}
	messages, err := consumer.Messages()
	if err != nil {
		return fmt.Errorf("reading stream %s: %w", wire.StreamEvents, err)
	}
	defer messages.Stop()
	for {
		m, err := messages.Next(jetstream.NextContext(ctx))
		if err != nil {
			return fmt.Errorf("reading stream %s: %w", wire.StreamEvents, errors.Join(err, context.Cause(ctx)))
		}
		meta, err := m.Metadata()
		if err != nil {
			return fmt.Errorf("reading stream %s: %w", wire.StreamEvents, err)
		}
		var e wire.Event
		if json.Unmarshal(m.Data(), &e) == nil && e.Kind != "" {
			e.Time, e.Sequence = meta.Timestamp, meta.Sequence.Stream
			if err := f(e); err != nil {
				return err
			}
		}
		if meta.NumPending == 0 && !q.Follow {
			return nil
		}
	}
}
