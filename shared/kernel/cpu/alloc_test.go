package cpu

import (
	"math"
	"testing"

	"trireme.dev/shared/kernel"
	"trireme.dev/shared/model"
)

// TestNoAllocation tests that no operation allocates once its scratch has grown.
func TestNoAllocation(t *testing.T) {
	const rows, hidden, inner, experts, topK = 9, 72, 40, 6, 3
	floats := func(n int) []float32 { return make([]float32, n) }
	matrix := func(rows, cols int) model.Matrix {
		return model.Matrix{Data: make([]model.BF16, rows*cols), Rows: rows, Cols: cols}
	}
	w, bias := matrix(hidden+1, hidden), floats(hidden+1)
	x, y, z, wide := floats(rows*hidden), floats(rows*hidden), floats(rows*hidden), floats(rows*(hidden+1))
	norm := floats(hidden)
	set := make([]model.Expert, experts)
	for e := range set {
		set[e] = model.Expert{Gate: matrix(inner, hidden), Up: matrix(inner, hidden), Down: matrix(hidden, inner)}
	}
	logits, ids, weights := floats(rows*experts), make([]int32, rows*topK), floats(rows*topK)
	slots := floats(rows * topK * hidden)
	s := kernel.AttnShape{Layers: 1, Heads: 6, KVHeads: 2, Dim: 12}
	kv := floats(rows * 2 * 12)
	blocks := [][]float32{floats(2 * model.BlockTokens * 2 * 12), floats(2 * model.BlockTokens * 2 * 12)}
	seqs := []kernel.Seq{{Rows: rows, Pos: 20, Blocks: blocks}}
	qkv, segs := floats(rows*3*hidden), []int{4, 5}
	angles := floats(rows * 6)
	ops := map[string]func(c kernel.Compute){
		"Embed":            func(c kernel.Compute) { c.Embed(x, w, ids[:rows]) },
		"Copy":             func(c kernel.Compute) { c.Copy(x, y) },
		"Add":              func(c kernel.Compute) { c.Add(x, y) },
		"Linear":           func(c kernel.Compute) { c.Linear(wide, x, rows, w, bias) },
		"RMSNorm":          func(c kernel.Compute) { c.RMSNorm(y, x, rows, norm, 1e-6) },
		"LayerNorm":        func(c kernel.Compute) { c.LayerNorm(y, x, rows, norm, norm, 1e-6) },
		"SiLUMul":          func(c kernel.Compute) { c.SiLUMul(x, y) },
		"GELU":             func(c kernel.Compute) { c.GELU(x, false); c.GELU(x, true) },
		"Rotate":           func(c kernel.Compute) { c.Rotate(x, rows, hidden, 6, 12, angles, angles) },
		"Attention":        func(c kernel.Compute) { c.StoreKV(0, s, kv, kv, seqs); c.Attention(0, s, z, x, seqs) },
		"SegmentAttention": func(c kernel.Compute) { c.SegmentAttention(z, qkv, segs, 6, 12) },
		"Fetch":            func(c kernel.Compute) { c.Fetch(slots, ids[:1], x, ids[:1], hidden); c.Sync() },
		"Experts": func(c kernel.Compute) {
			c.Route(logits, rows, experts, topK, true, ids, weights)
			c.Experts(slots, x, rows, topK, ids, set)
			c.Combine(z, slots, rows, topK, weights)
		},
	}
	for _, threads := range []int{1, 3} {
		c := open(t, Auto, threads)
		for name, op := range ops {
			// AllocsPerRun counts the whole process and calls op once to warm up. Each worker has scratch of its own,
			// which grows when it first runs a piece: measure until none has to.
			least := math.Inf(1)
			for range 20 {
				least = min(least, testing.AllocsPerRun(10, func() { op(c) }))
			}
			if least > 0 {
				t.Errorf("%s on %d threads: %v allocations a call", name, threads, least)
			}
		}
	}
}
