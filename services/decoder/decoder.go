// Package decoder is the decode stage: KV to tokens. It attaches a sequence's KV and token log, batches sequences
// continuously (they join and leave at any step), and in each step writes KV, appends the log record, commits it and
// publishes the token. It acks a message only after the gateway has confirmed the last token.
//
// A decoder that takes a sequence over from another one writes to no page that the other has mapped for writing (succeed in
// sequence.go).
//
// The process' runner (stage/runner), called the loop here, owns all sequences in work and waits for nobody; what it does
// with them in a step is in step.go. Each message has a handler, which opens its sequence, gives it to the loop and settles
// the message when the loop has let go of it. What the loop needs of others, a slab or a confirmation, every hundred tokens or so, it has fetched by an errand, a
// goroutine of the sequence's that ends before its handler does.
package decoder

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/engine/sample"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/kv"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/wire"
)

// Config is a decode instance's configuration.
type Config struct {
	Stage stage.Config
	Slots int // sequences in work at once; 0: 256
}

// Run serves the decode queue until ctx ends. It returns an error when it cannot start or loses the HMM.
func Run(ctx context.Context, cfg Config, log *slog.Logger) error {
	s, err := stage.Open(ctx, stage.Decode, cfg.Stage, log)
	if err != nil {
		return err
	}
	defer s.Close()
	return Serve(ctx, s, cfg)
}

// Serve runs the decode stage on an open stage process.
func Serve(ctx context.Context, s *stage.Stage, cfg Config) error { return s.Serve(ctx, Role(cfg)) }

// Role is the decode stage as a role of a stage process.
func Role(cfg Config) stage.Role {
	if cfg.Slots == 0 {
		cfg.Slots = 256
	}
	return stage.Role{Name: stage.Decode, Slots: cfg.Slots, Start: func(s *stage.Stage) (stage.Worker, error) {
		d := &decoder{
			Stage: s, space: sample.NewSpace(s.Model.Text.Vocab), rows: s.Metrics.Rows.WithLabelValues(stage.Decode), live: map[key]*sequence{}, outbox: outbox{sender: s.ID},
		}
		d.missed = prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "trireme_decode_move_missed_steps", Help: "Steps that were computed without a sequence while it moved to another NPU.",
			Buckets: []float64{0, 1, 2, 4, 8, 16, 32, 64},
		})
		if err := s.Metrics.Registry.Register(d.missed); err != nil {
			return nil, fmt.Errorf("registering metrics: %w", err)
		}
		var err error
		if d.resends, err = s.Bus.Handle(wire.SubjectResend(s.ID), d.resend); err != nil {
			return nil, fmt.Errorf("listening for resend requests: %w", err)
		}
		s.Runner.AddDecoding(stage.Decode, d, cfg.Slots)
		return d, nil
	}}
}

// decoder is the running role. The loop owns what stands below resends; others reach it through do.
type decoder struct {
	*stage.Stage
	space   *sample.Space
	rows    prometheus.Counter
	missed  prometheus.Histogram // steps, by sequence that has moved
	resends *nats.Subscription

	live   map[key]*sequence
	active []*sequence // in order of arrival
	taken  []*sequence // those in the step being computed, in its order
	gave   time.Time   // when a sequence was last given up for want of room
	moving int         // sequences that move to another NPU
	outbox outbox
}

// do runs f on the loop's goroutine, now or later, as long as there are handlers.
func (d *decoder) do(f func()) { d.Runner.Do(f) }

// Close implements stage.Worker.
func (d *decoder) Close() { _ = d.resends.Unsubscribe() } // it ends with the connection at the latest

// Handle implements stage.Worker.
func (d *decoder) Handle(ctx context.Context, dl *bus.Delivery) {
	var m wire.Decode
	if err := wire.Unmarshal(dl.Data, &m); err != nil {
		d.Log.Error("dropping a message that is no decode message", "error", err)
		_ = dl.Ack(ctx)
		return
	}
	if !d.offered(ctx, dl, &m) {
		d.handle(ctx, dl, &m)
	}
}

func (d *decoder) handle(ctx context.Context, dl *bus.Delivery, m *wire.Decode) {
	d.Work(ctx, dl, m.Request, m.Choice, func(ctx context.Context, claim *hbm.Claim) error { return d.work(ctx, m, claim) })
}

// work decodes one choice to its end and has that confirmed.
func (d *decoder) work(ctx context.Context, m *wire.Decode, claim *hbm.Claim) error {
	spec, err := d.Spec(ctx, m.Inline, m.Spec)
	if err != nil {
		return err
	}
	s := newSequence(m, spec, claim)
	defer func() { d.Free(ctx, s.objects...); s.seat.Leave() }()
	if err := d.open(ctx, s, m.Log); err != nil {
		if errors.Is(err, mem.ErrCorrupt) { // what of it is cached must not be given to the next attempt
			err = errors.Join(err, d.HBM.Forget(ctx, s.objects...))
		}
		return fmt.Errorf("attaching the KV of choice %d: %w", m.Choice, err)
	}
	if s.finish() == wire.FinishNone {
		err := d.attend(ctx, s)
		if err == nil || errors.Is(err, mem.ErrEnded) {
			d.cache(ctx, s)
		}
		if err != nil {
			return err
		}
	}
	return d.confirmEnd(ctx, s)
}

// attend gives s to the loop and waits until the loop lets go of it.
func (d *decoder) attend(ctx context.Context, s *sequence) error {
	s.life, s.release = context.WithCancel(ctx)
	defer s.errands.Wait()
	defer s.release()
	d.do(func() { d.add(s) }) // the loop outlives all handlers
	select {
	case err := <-s.done:
		return err
	case <-ctx.Done():
		d.do(func() { d.drop(s, context.Cause(ctx)) })
		return <-s.done
	}
}

// roomWait is the pause between two tries to get a slab: room comes when others end, or are given up (room.go).
const roomWait = 100 * time.Millisecond

// grow takes one more slab for s. It is an errand.
func (d *decoder) grow(ctx context.Context, s *sequence) {
	for short := false; ; short = true {
		var seat *stage.Seat
		d.between(func() { seat = s.seat })
		objs, err := d.HBM.Alloc(ctx, hbm.Spec{
			Kind: mem.KindKV, NPU: seat.Number(), Bytes: kv.SlabBytes(&d.Model.Text), Ref: stage.Ref(s.request),
		})
		switch {
		case err == nil:
			hbm.Prefault(objs...)
			if d.added(ctx, s, seat, objs[0]) {
				return
			}
			continue // it has moved meanwhile
		case ctx.Err() != nil:
			return
		case !errors.Is(err, mem.ErrExhausted):
			d.do(func() { d.drop(s, fmt.Errorf("taking a KV slab: %w", err)) })
			return
		case !short:
			d.Log.Info("no room for a KV slab; waiting for it", "request", s.request.ID, "error", err)
		}
		d.do(func() { d.short(s) })
		pause(ctx, roomWait)
	}
}

// pause waits for d, or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
