package decoder

import (
	"fmt"
	"log/slog"
	"testing"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/wire"
)

// BenchmarkOutbox measures what a step costs besides the forward pass, sampling and the log: collecting and sending the
// tokens of a batch to one gateway.
func BenchmarkOutbox(b *testing.B) {
	server := bustest.Run(b)
	conn, err := bus.Connect(b.Context(), server.URL(), "bench", slog.New(slog.DiscardHandler))
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	for _, batch := range []int{1, 8, 32, 200} {
		b.Run(fmt.Sprint(batch), func(b *testing.B) {
			o := outbox{sender: "decode-12345678"}
			var all []*sequence
			for i := range batch {
				all = append(all, &sequence{
					request: wire.Request{ID: fmt.Sprintf("request%015d", i), Attempt: 1, Gateway: "gateway-12345678"},
					spec:    &wire.Spec{Sampling: wire.Sampling{MaxTokens: 1000}}, claim: new(hbm.Claim), answer: 300, last: 777,
				})
			}
			b.ReportAllocs()
			for b.Loop() {
				for _, s := range all {
					o.add(s, nil)
				}
				if err := o.flush(conn); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
