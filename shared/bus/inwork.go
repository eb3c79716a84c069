package bus

import (
	"context"
	"errors"
	"fmt"

	"github.com/nats-io/nats.go/jetstream"

	"trireme.dev/shared/wire"
)

// Taken is a message that somebody has taken off a queue, or given back for later, and nobody has acked.
type Taken struct {
	Seq   uint64 // in the stream
	Data  []byte // as wire.Marshal made it
	Reply string // for NakReply
}

// InWork reads a stage's messages in work, oldest first, at most limit, one request each.
func (b *Bus) InWork(ctx context.Context, stage string, limit int) ([]Taken, error) {
	s, err := findStage(stage)
	if err != nil {
		return nil, err
	}
	stream, err := b.js.Stream(ctx, s.stream)
	if err != nil {
		return nil, fmt.Errorf("reading stream %s: %w", s.stream, err)
	}
	consumer, err := stream.Consumer(ctx, s.consumer)
	if err != nil {
		return nil, fmt.Errorf("reading consumer %s of stream %s: %w", s.consumer, s.stream, err)
	}
	info := consumer.CachedInfo()
	var found []Taken
	for seq := info.AckFloor.Stream + 1; seq <= info.Delivered.Stream && len(found) < min(limit, info.NumAckPending); {
		m, err := stream.GetMsg(ctx, seq, jetstream.WithGetMsgSubject(wire.StageSubjects(stage))) // or the next
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("reading message %d of stream %s: %w", seq, s.stream, err)
		}
		if m.Sequence > info.Delivered.Stream {
			break
		}
		found = append(found, Taken{Seq: m.Sequence, Data: m.Data, Reply: s.ackSubject(m.Sequence, info.Delivered.Consumer)})
		seq = m.Sequence + 1
	}
	return found, nil
}

// ackSubject is a subject that acknowledges a message of the stream to the server as a delivery of it does (JetStream
// wire protocol: deliveries, sequence in the stream, sequence of deliveries, time, messages left). The server looks at the
// sequence in the stream, and that of deliveries must be one that was not acknowledged.
func (s stage) ackSubject(seq, delivered uint64) string {
	return fmt.Sprintf("$JS.ACK.%s.%s.1.%d.%d.0.0", s.stream, s.consumer, seq, delivered)
}
