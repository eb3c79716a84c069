package cpu

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"trireme.dev/shared/kernel"
	"trireme.dev/shared/kernel/ref"
	"trireme.dev/shared/model"
)

// compare runs op on the reference and on every instruction set of this machine, with one thread and with all. It
// reports GFLOP/s for flops and GB/s for the bytes of weights or KV that one op reads; 0 of either is not reported.
func compare(b *testing.B, flops, bytes float64, op func(c kernel.Compute)) {
	b.Helper()
	run := func(name string, c kernel.Compute) {
		b.Run(name, func(b *testing.B) {
			if c.Digest() == Digest {
				op(c) // pages are touched, scratch has grown
			}
			for b.Loop() {
				op(c)
			}
			seconds := b.Elapsed().Seconds() / float64(b.N)
			if flops > 0 {
				b.ReportMetric(flops/seconds/1e9, "GFLOP/s")
			}
			if bytes > 0 {
				b.ReportMetric(bytes/seconds/1e9, "GB/s")
			}
		})
		if err := c.Close(); err != nil {
			b.Error("closing:", err)
		}
	}
	run("ref", ref.New())
	for _, isa := range []ISA{AVX2, AVX512, Auto} {
		threads := 1
		name := isa.String()
		if isa == Auto {
			threads, name = 0, "all threads"
		}
		c, err := New(Options{ISA: isa, Threads: threads})
		if errors.Is(err, ErrNotSupported) {
			continue
		}
		if err != nil {
			b.Fatal(err)
		}
		run(name, c)
	}
}

func normals(n int) []float32 {
	s := make([]float32, n)
	for i := range s {
		s[i] = float32(rand.NormFloat64())
	}
	return s
}

// weights fills a matrix cheaply: only its size matters here.
func weights(rows, cols int) model.Matrix {
	m := model.Matrix{Data: make([]model.BF16, rows*cols), Rows: rows, Cols: cols}
	for i := range m.Data {
		m.Data[i] = model.BF16(0x3c00 + i%509)
	}
	return m
}

func BenchmarkLinear(b *testing.B) {
	for _, size := range []struct {
		name             string
		rows, outs, cols int
	}{
		{"GEMV in cache", 1, 256, 1024},
		{"GEMV of the demo model", 1, 128, 256},
		{"GEMV from memory", 1, 65536, 2048},
		{"GEMM 4 rows", 4, 1024, 1024},
		{"GEMM 8 rows from memory", 8, 16384, 2048},
		{"GEMM 192 rows", 192, 1024, 1024},
		{"GEMM of the demo model", 192, 128, 256},
	} {
		b.Run(size.name, func(b *testing.B) {
			w, x, out := weights(size.outs, size.cols), normals(size.rows*size.cols), make([]float32, size.rows*size.outs)
			compare(b, 2*float64(size.rows*size.outs*size.cols), 2*float64(size.outs*size.cols), func(c kernel.Compute) {
				c.Linear(out, x, size.rows, w, nil)
			})
		})
	}
}

func BenchmarkAttention(b *testing.B) {
	for _, size := range []struct {
		name      string
		shape     kernel.AttnShape
		rows, pos int
	}{
		{"decode demo at 200", kernel.AttnShape{Layers: 1, Heads: 8, KVHeads: 2, Dim: 32}, 1, 199},
		{"decode Qwen3-30B-A3B at 4096", kernel.AttnShape{Layers: 1, Heads: 32, KVHeads: 4, Dim: 128}, 1, 4095},
		{"prefill demo 192", kernel.AttnShape{Layers: 1, Heads: 8, KVHeads: 2, Dim: 32}, 192, 0},
		{"prefill Qwen3-30B-A3B 32 at 1024", kernel.AttnShape{Layers: 1, Heads: 32, KVHeads: 4, Dim: 128}, 32, 1024},
	} {
		b.Run(size.name, func(b *testing.B) {
			s := size.shape
			seqs := []kernel.Seq{{Rows: size.rows, Pos: size.pos}}
			for range (size.pos + size.rows + model.BlockTokens - 1) / model.BlockTokens {
				seqs[0].Blocks = append(seqs[0].Blocks, normals(2*model.BlockTokens*s.KVHeads*s.Dim))
			}
			q := normals(size.rows * s.Heads * s.Dim)
			out := make([]float32, len(q))
			seen := float64(size.rows)*float64(size.pos) + float64(size.rows*(size.rows+1))/2
			bytes := float64(8 * (size.pos + size.rows) * s.KVHeads * s.Dim)
			compare(b, 4*seen*float64(s.Heads*s.Dim), bytes, func(c kernel.Compute) { c.Attention(0, s, out, q, seqs) })
		})
	}
}

func BenchmarkSegmentAttention(b *testing.B) {
	const n, heads, dim = 196, 6, 32 // a picture of 224 pixels in the demo model
	qkv, out := normals(n*3*heads*dim), make([]float32, n*heads*dim)
	compare(b, 4*n*n*heads*dim, 0, func(c kernel.Compute) { c.SegmentAttention(out, qkv, []int{n}, heads, dim) })
}

func BenchmarkExperts(b *testing.B) {
	for _, size := range []struct {
		name                         string
		rows, hidden, inner, n, topK int
	}{
		{"decode demo", 1, 256, 128, 16, 4},
		{"decode demo 32 rows", 32, 256, 128, 16, 4},
		{"prefill demo 192 rows", 192, 256, 128, 16, 4},
		{"decode Qwen3-30B-A3B, 32 experts", 1, 2048, 768, 32, 8},
		{"prefill Qwen3-30B-A3B, 16 experts, 24 rows", 24, 2048, 768, 16, 8},
	} {
		b.Run(size.name, func(b *testing.B) {
			experts := make([]model.Expert, size.n)
			for e := range experts {
				experts[e] = model.Expert{
					Gate: weights(size.inner, size.hidden), Up: weights(size.inner, size.hidden),
					Down: weights(size.hidden, size.inner),
				}
			}
			var ids []int32
			used := map[int]bool{}
			for range size.rows {
				for _, e := range rand.Perm(size.n)[:size.topK] {
					ids = append(ids, int32(e))
					used[e] = true
				}
			}
			x, out := normals(size.rows*size.hidden), make([]float32, len(ids)*size.hidden)
			one := 3 * float64(size.hidden*size.inner)
			compare(b, 2*one*float64(len(ids)), 2*one*float64(len(used)), func(c kernel.Compute) {
				if size.rows == 1 { // another token, other experts
					for i := range ids {
						ids[i] = (ids[i] + int32(size.topK)) % int32(size.n)
					}
				}
				c.Experts(out, x, size.rows, size.topK, ids, experts)
			})
		})
	}
}

func BenchmarkRows(b *testing.B) {
	const rows, n = 16, 2048
	x, y, weight := normals(rows*n), normals(rows*n), normals(n)
	gb := 4.0 * rows * n
	out := make([]float32, rows*n)
	logits, ids, probs := normals(rows*128), make([]int32, rows*8), make([]float32, rows*8)
	slots := normals(rows * 8 * n)
	cos, sin := normals(rows*64), normals(rows*64)
	for _, op := range []struct {
		name  string
		bytes float64
		do    func(c kernel.Compute)
	}{
		{"RMSNorm", gb, func(c kernel.Compute) { c.RMSNorm(out, x, rows, weight, 1e-6) }},
		{"LayerNorm", gb, func(c kernel.Compute) { c.LayerNorm(out, x, rows, weight, weight, 1e-6) }},
		{"SiLUMul", gb, func(c kernel.Compute) { copy(out, x); c.SiLUMul(out, y) }},
		{"GELU", gb, func(c kernel.Compute) { copy(out, x); c.GELU(out, false) }},
		{"GELU tanh", gb, func(c kernel.Compute) { copy(out, x); c.GELU(out, true) }},
		{"Add", gb, func(c kernel.Compute) { copy(out, x); c.Add(out, y) }},
		{"Rotate", gb, func(c kernel.Compute) { copy(out, x); c.Rotate(out, rows, n, n/128, 128, cos, sin) }},
		{"softmax and top 8 of 128", 4 * rows * 128, func(c kernel.Compute) { c.Route(logits, rows, 128, 8, true, ids, probs) }},
		{"Combine 8", 8 * gb, func(c kernel.Compute) { c.Combine(out, slots, rows, 8, probs) }},
	} {
		b.Run(fmt.Sprintf("%s of %d by %d", op.name, rows, n), func(b *testing.B) { compare(b, 0, op.bytes, op.do) })
	}
}
