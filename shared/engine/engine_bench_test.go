package engine_test

import (
	"fmt"
	"testing"
	"time"

	"trireme.dev/shared/engine"
	"trireme.dev/shared/kernel/ref"
)

// BenchmarkDecode measures decode steps of the bundled model at several batch sizes, 128 tokens into each sequence, and
// the share of the time spent outside kernels.
func BenchmarkDecode(b *testing.B) {
	for _, n := range []int{1, 8, 32} {
		b.Run(fmt.Sprintf("batch=%d", n), func(b *testing.B) {
			r, p := newBenchRig(b, engine.Limits{Rows: n, Seqs: n})
			measure(b, r, p, decodeBatch(r, n), n)
		})
	}
}

// BenchmarkOutside measures what a decode step costs outside kernels: on a backend that computes nothing.
func BenchmarkOutside(b *testing.B) {
	for _, n := range []int{1, 8, 32} {
		b.Run(fmt.Sprintf("batch=%d", n), func(b *testing.B) {
			r := newRig(b, shapesModel, nothing{ref.New()}, engine.Limits{Rows: n, Seqs: n})
			batch := decodeBatch(r, n)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := r.text.Forward(batch); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// decodeBatch returns a decode step of n sequences, 128 tokens into each.
func decodeBatch(r *rig, n int) []engine.Seq {
	var batch []engine.Seq
	for i := range n {
		batch = append(batch, engine.Seq{Tokens: []int32{int32(i + 5)}, Pos: 128, Blocks: r.blocks(144), Want: true})
	}
	return batch
}

// BenchmarkPrefill measures a prompt of 512 tokens in one piece.
func BenchmarkPrefill(b *testing.B) {
	const n = 512
	r, p := newBenchRig(b, engine.Limits{Rows: n, Seqs: 1})
	tokens := make([]int32, n)
	for i := range tokens {
		tokens[i] = int32(i % 600)
	}
	measure(b, r, p, []engine.Seq{{Tokens: tokens, Blocks: r.blocks(n), Want: true}}, n)
}

// BenchmarkEncode measures a picture of 224 x 224 pixels.
func BenchmarkEncode(b *testing.B) {
	r, p := newBenchRig(b, engine.Limits{Rows: 1, Seqs: 1})
	grid := engine.Grid{T: 1, H: 14, W: 14}
	pixels, out := make([]float32, grid.Patches()*r.cfg.Vision.PatchDim()), r.alloc(r.enc.Floats(grid))
	b.ReportAllocs()
	inside, start := p.Inside(), time.Now()
	for b.Loop() {
		if err := r.enc.Encode(out, pixels, grid); err != nil {
			b.Fatal(err)
		}
	}
	report(b, time.Since(start), p.Inside()-inside, r.enc.Tokens(grid))
}

// newBenchRig opens the bundled model on the backend that serves, measured.
func newBenchRig(b *testing.B, lim engine.Limits) (*rig, *engine.Profile) {
	b.Helper()
	p := engine.NewProfile(serving())
	return newRig(b, shapesModel, p, lim), p
}

// measure runs one batch again and again.
func measure(b *testing.B, r *rig, p *engine.Profile, batch []engine.Seq, tokens int) {
	b.Helper()
	if _, err := r.text.Forward(batch); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	inside, start := p.Inside(), time.Now()
	for b.Loop() {
		if _, err := r.text.Forward(batch); err != nil {
			b.Fatal(err)
		}
	}
	report(b, time.Since(start), p.Inside()-inside, tokens)
}

// report adds tokens per second and the share of the time outside kernels.
func report(b *testing.B, wall, inside time.Duration, tokens int) {
	b.ReportMetric(float64(tokens)*float64(b.N)/wall.Seconds(), "tokens/s")
	b.ReportMetric(100*float64(wall-inside)/float64(wall), "%outside")
}
