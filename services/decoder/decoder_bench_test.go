package decoder_test

import (
	"context"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/services/decoder"
	"trireme.dev/services/hmm"
	"trireme.dev/shared/engine"
	"trireme.dev/shared/npu"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/stagetest"
	"trireme.dev/shared/wire"
)

// BenchmarkStep measures decode steps of a running stage, with NATS and a gateway beside it: time of a step, share of it
// that is spent outside kernels, tokens per second. An iteration is one step of the whole batch.
func BenchmarkStep(b *testing.B) {
	for _, batch := range []int{1, 8, 32, 200} {
		b.Run(fmt.Sprint(batch), func(b *testing.B) { benchmarkSteps(b, batch) })
	}
}

func benchmarkSteps(b *testing.B, batch int) {
	b.StopTimer()
	r := stagetest.New(b, func(ctx context.Context, socket string, conn *nats.Conn, log *slog.Logger) error {
		return hmm.Run(ctx, hmm.Config{Socket: socket, Node: "n", NPUs: 4, NPUBytes: 2 << 30, HostBytes: 16 << 20, NATS: conn}, log)
	}, stagetest.Long)
	r.Stage.NPU = npu.Options{}
	gateway := r.Gateway()
	var profile *engine.Profile
	r.Open(stage.Decode, func(ctx context.Context, s *stage.Stage) error {
		profile = engine.NewProfile(s.NPUs()[0].Compute)
		s.NPUs()[0].Compute = profile
		return decoder.Serve(ctx, s, decoder.Config{})
	})
	const warm = 8 // steps before and after the measured ones
	tokens := b.N + 2*warm
	spec := r.Model.Greedy(stagetest.Cases(b)[1].Input, min(tokens, 8000))
	if tokens > 8000 {
		b.Fatalf("%d steps are more than the context has", tokens)
	}
	var requests []wire.Request
	var messages []wire.Decode
	for range batch {
		req := r.Request(gateway.ID)
		messages = append(messages, r.Prefilled(req, spec, 0))
		requests = append(requests, req)
	}
	for i := range messages {
		r.Publish(stage.Decode, requests[i].ID, &messages[i])
	}
	// The last to join counts: it has company until it ends.
	last := requests[batch-1].ID
	gateway.Tokens(last, 0, warm)
	start, inside, first := time.Now(), profile.Inside(), len(gateway.Answer(last, 0).IDs)
	b.StartTimer()
	answer := gateway.Tokens(last, 0, tokens-warm)
	b.StopTimer()
	wall, kernels, steps := time.Since(start), profile.Inside()-inside, len(answer.IDs)-first
	b.ReportMetric(float64(wall.Nanoseconds())/float64(steps), "ns/step")
	b.ReportMetric(100*(1-float64(kernels)/float64(wall)), "%-outside")
	b.ReportMetric(float64(batch*steps)/wall.Seconds(), "tokens/s")
	for _, req := range requests {
		r.Done(req.ID, -1)
	}
}
