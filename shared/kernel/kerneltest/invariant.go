package kerneltest

import (
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"trireme.dev/shared/kernel"
	"trireme.dev/shared/model"
)

// Invariant tests that a, given a whole batch, and b, given its parts, compute the same bits: rows alone or together,
// prompts whole or in chunks, sequences alone or in a batch, experts' slots alone or grouped. a and b may be one
// Compute, or two of one Digest that differ in threads or instruction set.
func Invariant(t *testing.T, a, b kernel.Compute) {
	t.Helper()
	if a.Digest() != b.Digest() {
		t.Fatalf("digests %q and %q", a.Digest(), b.Digest())
	}
	t.Run("Linear", func(t *testing.T) { on(t, func(rt *rapid.T, f *field) { linearInvariant(rt, f, a, b) }) })
	t.Run("Rows", func(t *testing.T) { on(t, func(rt *rapid.T, f *field) { rowsInvariant(rt, f, a, b) }) })
	t.Run("Elements", func(t *testing.T) { on(t, func(rt *rapid.T, f *field) { elementsInvariant(rt, f, a, b) }) })
	t.Run("Attention", func(t *testing.T) { on(t, func(rt *rapid.T, f *field) { attentionInvariant(rt, f, a, b) }) })
	t.Run("Segments", func(t *testing.T) { on(t, func(rt *rapid.T, f *field) { segmentsInvariant(rt, f, a, b) }) })
	t.Run("Experts", func(t *testing.T) { on(t, func(rt *rapid.T, f *field) { expertsInvariant(rt, f, a, b) }) })
}

func linearInvariant(rt *rapid.T, f *field, a, b kernel.Compute) {
	rows := rapid.IntRange(1, 64).Draw(rt, "rows")
	w := f.matrix(rapid.IntRange(1, 70).Draw(rt, "outputs"), rapid.IntRange(1, 200).Draw(rt, "cols"))
	var bias []float32
	if rapid.Bool().Draw(rt, "biased") {
		bias = f.normals(w.Rows, 1)
	}
	x := f.normals(rows*w.Cols, 1)
	whole, parts := f.zeros(rows*w.Rows), f.zeros(rows*w.Rows)
	a.Linear(whole, x, rows, w, bias)
	r := 0
	for _, n := range f.cuts(rows, rapid.SampledFrom([]int{1, 5, 64}).Draw(rt, "part")) {
		b.Linear(parts[r*w.Rows:][:n*w.Rows], x[r*w.Cols:][:n*w.Cols], n, w, bias)
		r += n
	}
	equal(rt, "Linear", whole, parts)
}

func rowsInvariant(rt *rapid.T, f *field, a, b kernel.Compute) {
	rows, n := rapid.IntRange(1, 64).Draw(rt, "rows"), rapid.IntRange(1, 150).Draw(rt, "width")
	x := f.normals(rows*n, 3)
	weight, bias := f.normals(n, 1), f.normals(n, 1)
	whole, parts := f.zeros(len(x)), f.like(x)
	a.RMSNorm(whole, x, rows, weight, 1e-6)
	for r := range rows {
		row := parts[r*n:][:n]
		b.RMSNorm(row, row, 1, weight, 1e-6)
	}
	equal(rt, "RMSNorm", whole, parts)
	copy(parts, x)
	a.LayerNorm(whole, x, rows, weight, bias, 1e-6)
	for r := range rows {
		row := parts[r*n:][:n]
		b.LayerNorm(row, row, 1, weight, bias, 1e-6)
	}
	equal(rt, "LayerNorm", whole, parts)

	heads, half := rapid.IntRange(1, 4).Draw(rt, "heads"), rapid.IntRange(1, 40).Draw(rt, "half")
	stride := heads*half*2 + rapid.IntRange(0, 9).Draw(rt, "gap")
	x = f.normals(rows*stride, 1)
	cos, sin := f.normals(rows*half, 1), f.normals(rows*half, 1)
	parts = f.like(x)
	a.Rotate(x, rows, stride, heads, half*2, cos, sin)
	for r := range rows {
		b.Rotate(parts[r*stride:][:stride], 1, stride, heads, half*2, cos[r*half:][:half], sin[r*half:][:half])
	}
	equal(rt, "Rotate", x, parts)
}

func elementsInvariant(rt *rapid.T, f *field, a, b kernel.Compute) {
	n := rapid.IntRange(1, 5000).Draw(rt, "elements")
	x, y := f.normals(n, 4), f.normals(n, 1)
	for i := range x {
		if f.rand.IntN(20) == 0 { // every range of exp, and both zeros
			x[i] = float32(math.Copysign(math.Pow(2, 30*f.rand.Float64()-20), f.rand.Float64()-0.5))
		}
	}
	x[0] = float32(math.Copysign(0, -1))
	cuts := f.cuts(n, rapid.SampledFrom([]int{1, 40, 3000}).Draw(rt, "part"))
	for _, op := range []struct {
		name string
		do   func(c kernel.Compute, x, y []float32)
	}{
		{"SiLUMul", func(c kernel.Compute, x, y []float32) { c.SiLUMul(x, y) }},
		{"GELU", func(c kernel.Compute, x, _ []float32) { c.GELU(x, false) }},
		{"GELU tanh", func(c kernel.Compute, x, _ []float32) { c.GELU(x, true) }},
		{"Add", func(c kernel.Compute, x, y []float32) { c.Add(x, y) }},
	} {
		whole, parts := f.like(x), f.like(x)
		op.do(a, whole, y)
		at := 0
		for _, n := range cuts {
			op.do(b, parts[at:at+n], y[at:at+n])
			at += n
		}
		equal(rt, op.name, whole, parts)
	}
}

// attentionInvariant lets a attend to several whole sequences at once, and b to each alone in chunks.
func attentionInvariant(rt *rapid.T, f *field, a, b kernel.Compute) {
	s := shape(rt)
	layer := rapid.IntRange(0, s.Layers-1).Draw(rt, "layer")
	lengths := rapid.SliceOfN(rapid.IntRange(1, 50), 1, 4).Draw(rt, "lengths")
	rows := 0
	var batch []kernel.Seq
	for _, n := range lengths {
		batch = append(batch, kernel.Seq{Row: rows, Rows: n, Blocks: f.blocks(s, n)})
		rows += n
	}
	q, k, v := f.normals(rows*s.Heads*s.Dim, 1), f.normals(rows*s.KVHeads*s.Dim, 1), f.normals(rows*s.KVHeads*s.Dim, 1)
	whole, parts := f.zeros(len(q)), f.zeros(len(q))
	a.StoreKV(layer, s, k, v, batch)
	a.Attention(layer, s, whole, q, batch)
	part := rapid.SampledFrom([]int{1, 7, 16, 50}).Draw(rt, "chunk")
	for _, seq := range batch {
		blocks := f.blocks(s, seq.Rows)
		pos := 0
		for _, n := range f.cuts(seq.Rows, part) {
			chunk := []kernel.Seq{{Row: seq.Row + pos, Rows: n, Pos: pos, Blocks: blocks}}
			b.StoreKV(layer, s, k, v, chunk)
			b.Attention(layer, s, parts, q, chunk)
			pos += n
		}
	}
	equal(rt, "Attention", whole, parts)
}

func segmentsInvariant(rt *rapid.T, f *field, a, b kernel.Compute) {
	heads, dim := rapid.IntRange(1, 4).Draw(rt, "heads"), dim(rt)
	segs := rapid.SliceOfN(rapid.IntRange(0, 45), 1, 4).Draw(rt, "segments")
	rows := 0
	for _, n := range segs {
		rows += n
	}
	qkv := f.normals(rows*3*heads*dim, 1)
	whole, parts := f.zeros(rows*heads*dim), f.zeros(rows*heads*dim)
	a.SegmentAttention(whole, qkv, segs, heads, dim)
	at := 0
	for _, n := range segs {
		b.SegmentAttention(parts[at*heads*dim:][:n*heads*dim], qkv[at*3*heads*dim:][:n*3*heads*dim], []int{n}, heads, dim)
		at += n
	}
	equal(rt, "SegmentAttention", whole, parts)
}

func expertsInvariant(rt *rapid.T, f *field, a, b kernel.Compute) {
	rows, n := rapid.IntRange(1, 40).Draw(rt, "rows"), rapid.IntRange(1, 9).Draw(rt, "experts")
	topK := rapid.IntRange(1, n).Draw(rt, "top k")
	hidden, inner := rapid.IntRange(1, 60).Draw(rt, "hidden"), rapid.IntRange(1, 60).Draw(rt, "inner")
	norm := rapid.Bool().Draw(rt, "norm")
	logits := f.normals(rows*n, 2)
	ids, rowIDs := make([]int32, rows*topK), make([]int32, rows*topK)
	weights, rowWeights := make([]float32, rows*topK), make([]float32, rows*topK)
	a.Route(logits, rows, n, topK, norm, ids, weights)
	for r := range rows {
		b.Route(logits[r*n:][:n], 1, n, topK, norm, rowIDs[r*topK:][:topK], rowWeights[r*topK:][:topK])
	}
	equal(rt, "weights of Route", weights, rowWeights)
	if !slices.Equal(ids, rowIDs) {
		rt.Fatalf("ids of Route: %v and %v", ids, rowIDs)
	}

	experts := make([]model.Expert, n)
	for e := range experts {
		if f.rand.IntN(6) > 0 { // the others have no data here
			experts[e] = f.expert(hidden, inner)
		}
	}
	x := f.normals(rows*hidden, 1)
	slots, rowSlots := f.normals(rows*topK*hidden, 1), f.zeros(rows*topK*hidden)
	copy(rowSlots, slots)
	a.Experts(slots, x, rows, topK, ids, experts)
	for r := range rows {
		b.Experts(rowSlots[r*topK*hidden:][:topK*hidden], x[r*hidden:][:hidden], 1, topK, ids[r*topK:][:topK], experts)
	}
	equal(rt, "Experts", slots, rowSlots)
	whole, parts := f.like(x), f.like(x)
	a.Combine(whole, slots, rows, topK, weights)
	for r := range rows {
		b.Combine(parts[r*hidden:][:hidden], slots[r*topK*hidden:][:topK*hidden], 1, topK, weights[r*topK:][:topK])
	}
	equal(rt, "Combine", whole, parts)
}
