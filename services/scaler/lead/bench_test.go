package lead_test

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"trireme.dev/services/scaler/lead"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/wire"
)

// BenchmarkNote is what it takes to note an operation before it is asked for: a write that NATS has stored.
func BenchmarkNote(b *testing.B) {
	conn, err := bus.Connect(b.Context(), bustest.Run(b).URL(), "bench", slog.New(slog.DiscardHandler))
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	store, err := conn.JetStream().KeyValue(b.Context(), wire.BucketScaler)
	if err == nil {
		_, err = store.Put(b.Context(), "leader", []byte("{}")) // given up by the one before
	}
	if err != nil {
		b.Fatal(err)
	}
	op := &lead.Operation{ID: "op", Change: autoscale.Change{Action: autoscale.Widen, Instance: "decoder-0", Node: "node", Roles: "D", Numbers: []int{3}, NPUs: 4}}
	err = lead.Run(b.Context(), lead.Config{Bus: conn, ID: "bench", Lease: time.Minute}, func(ctx context.Context, t *lead.Term) error {
		for b.Loop() {
			if err := t.Note(ctx, op); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
}
