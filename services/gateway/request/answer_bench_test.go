package request

import (
	"testing"

	"trireme.dev/shared/wire"
)

// BenchmarkTake is the cost of one token with two stop strings watched.
func BenchmarkTake(b *testing.B) {
	words := pieces{" some", " words", "\n", " and", " more"}
	cfg := Config{Choices: 1, Stop: []string{"\n\n", "<end>"}}
	a := New(cfg, func() TextStream { return words })
	r := &wire.Run{Attempt: 1, IDs: []int32{0}, Generation: 1}
	n := 0
	emit := func(p *Piece) { n += len(p.Text) }
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		r.Index, r.IDs[0] = i, int32(i%len(words))
		a.Take("d", r, emit)
	}
	if n == 0 {
		b.Fatal("no text came out")
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "tokens/s")
}
