package bus

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"trireme.dev/shared/wire"
)

// Publish puts message m about a request on a stage's work queue and returns once the server has stored it. A try takes
// 500 ms at most and is repeated until ctx ends. Messages with the msgID of one published within the last two minutes
// are stored once, so a caller may publish again after an error; an empty msgID switches that off. Errors at once:
// ErrStage, wire.ErrTooLarge, and what the server refuses.
func (b *Bus) Publish(ctx context.Context, stage, request, msgID string, m any) error {
	return b.PublishWithin(ctx, 0, stage, request, msgID, m)
}

// PublishWithin is Publish for whoever can tell somebody that it does not work: it fails with ErrNoStore when there is a
// connection and the server has stored nothing for as long as patience: its disk is full, say, or too few servers of a cluster
// are there. The time in which there is no connection does not count. The message may be stored all the same.
func (b *Bus) PublishWithin(ctx context.Context, patience time.Duration, stage, request, msgID string, m any) error {
	if _, err := findStage(stage); err != nil {
		return fmt.Errorf("publishing %T: %w", m, err)
	}
	data, err := wire.Marshal(m)
	if err != nil {
		return err
	}
	subject := wire.StageSubject(stage, request)
	opts := []jetstream.PublishOpt{jetstream.WithRetryAttempts(0)}
	if msgID != "" {
		opts = append(opts, jetstream.WithMsgID(msgID))
	}
	err = b.retryWithin(ctx, patience, func(ctx context.Context) error {
		_, err := b.js.Publish(ctx, subject, data, opts...)
		return err
	})
	if err != nil {
		return fmt.Errorf("publishing %T of request %s to %s: %w", m, request, subject, err)
	}
	return nil
}

// Send publishes m on a subject of core NATS: whoever listens gets it, at most once.
func (b *Bus) Send(subject string, m any) error {
	data, err := wire.Marshal(m)
	if err != nil {
		return err
	}
	if err := b.conn.Publish(subject, data); err != nil {
		return fmt.Errorf("sending %T to %s: %w", m, subject, err)
	}
	return nil
}

// Ask sends m on a subject and decodes the first answer into reply, a pointer. It waits until ctx ends; with nobody
// listening it fails at once with nats.ErrNoResponders.
func (b *Bus) Ask(ctx context.Context, subject string, m, reply any) error {
	data, err := wire.Marshal(m)
	if err != nil {
		return err
	}
	msg, err := b.conn.RequestWithContext(ctx, subject, data)
	if err != nil {
		return fmt.Errorf("asking %s with %T: %w", subject, m, err)
	}
	return wire.Unmarshal(msg.Data, reply)
}

// AskAll sends m on a subject on which many listen and calls f with each answer, until f returns false or ctx ends.
func (b *Bus) AskAll(ctx context.Context, subject string, m any, f func(data []byte) (more bool)) error {
	data, err := wire.Marshal(m)
	if err != nil {
		return err
	}
	inbox := b.conn.NewInbox()
	sub, err := b.conn.SubscribeSync(inbox)
	if err != nil {
		return fmt.Errorf("asking all at %s with %T: %w", subject, m, err)
	}
	defer sub.Unsubscribe() //nolint:errcheck // it ends with the connection at the latest
	if err := b.conn.PublishRequest(subject, inbox, data); err != nil {
		return fmt.Errorf("asking all at %s with %T: %w", subject, m, err)
	}
	for {
		msg, err := sub.NextMsgWithContext(ctx)
		if err != nil { // the time is up, or nobody listens
			return nil
		}
		if !f(msg.Data) {
			return nil
		}
	}
}

// Stats asks all gateways and stages what they have done so far, and returns when those with these heartbeats have answered that can, or ctx
// ends. Others may be among the answers; those that nobody can read are left out.
func (b *Bus) Stats(ctx context.Context, beats []wire.Instance) ([]wire.Stats, error) {
	awaited := make(map[string]bool)
	for _, i := range beats {
		if i.Ready || i.Role == "gateway" {
			awaited[i.ID] = true
		}
	}
	var all []wire.Stats
	err := b.AskAll(ctx, wire.SubjectStats, struct{}{}, func(data []byte) bool {
		if len(data) == 0 { // nobody listens
			return false
		}
		var s wire.Stats
		if err := wire.Unmarshal(data, &s); err != nil {
			b.log.Debug("an answer about work done is ignored", "error", err)
			return true
		}
		all = append(all, s)
		delete(awaited, s.Instance)
		return len(awaited) > 0
	})
	return all, err
}

// errNoReply is returned by respond for a message that asks for no answer.
var errNoReply = errors.New("message asks for no answer")

// Handle calls f for each message on a subject, one at a time in order of arrival, until the subscription's
// Unsubscribe or the Bus's Close. Data belongs to f. Respond answers an Ask and may be called later, from any
// goroutine, once. The subscription is in force at the server when Handle returns, if the connection is up.
func (b *Bus) Handle(subject string, f func(data []byte, respond func(m any) error)) (*nats.Subscription, error) {
	return b.HandleOne(subject, "", f)
}

// HandleOne is Handle for those of a group: each message goes to one of them.
func (b *Bus) HandleOne(subject, group string, f func(data []byte, respond func(m any) error)) (*nats.Subscription, error) {
	sub, err := b.conn.QueueSubscribe(subject, group, func(msg *nats.Msg) {
		f(msg.Data, func(m any) error {
			if msg.Reply == "" {
				return fmt.Errorf("answering %s: %w", msg.Subject, errNoReply)
			}
			return b.Send(msg.Reply, m)
		})
	})
	if err != nil {
		return nil, fmt.Errorf("subscribing to %s: %w", subject, err)
	}
	if err := sub.SetPendingLimits(-1, -1); err != nil {
		return nil, fmt.Errorf("subscribing to %s: %w", subject, err)
	}
	// A flush that fails leaves a subscription that is made when the connection is back.
	if err := b.conn.FlushTimeout(tryTimeout); err != nil {
		b.log.Debug("subscription is not confirmed yet", "subject", subject, "error", err)
	}
	return sub, nil
}
