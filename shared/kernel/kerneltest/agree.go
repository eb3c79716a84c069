package kerneltest

import (
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"trireme.dev/shared/kernel"
	"trireme.dev/shared/model"
)

// unit is half a unit in the last place of a float32 near 1.
const unit = 1.0 / (1 << 24)

// Agree tests that c agrees with the oracle on float32 operands and bf16 weights, to within
//
//	Linear            the error bound (cols/16 + 8) * 2^-24 * (sum of |x w| + |bias|) of a sum in 16 lanes
//	RMSNorm           16 units (of 2^-24) of the result
//	LayerNorm         16 units of (the largest |x| in the row / deviation * |weight| + |bias|)
//	SiLUMul, GELU     32 units of the largest of |x| and, for SiLUMul, |x * up|
//	Rotate            3 units of |a| + |b|
//	Attention         64 units of the largest |value|
//	Route             16 units of 1; the same ids
//	Experts           64 units of (1 + cols/16) times the largest result
//	Combine           topK + 2 units of the sum of |weight * slot| and |dst|
//	Embed, Copy, Add, StoreKV, Upload, Download, Fetch   nothing: bit-equal
func Agree(t *testing.T, c, oracle kernel.Compute) {
	t.Helper()
	t.Run("Linear", func(t *testing.T) { on(t, func(rt *rapid.T, f *field) { linearAgrees(rt, f, c, oracle) }) })
	t.Run("Memory", func(t *testing.T) { on(t, func(rt *rapid.T, f *field) { memoryAgrees(rt, f, c, oracle) }) })
	t.Run("Norms", func(t *testing.T) { on(t, func(rt *rapid.T, f *field) { normsAgree(rt, f, c, oracle) }) })
	t.Run("Elements", func(t *testing.T) { on(t, func(rt *rapid.T, f *field) { elementsAgree(rt, f, c, oracle) }) })
	t.Run("Rotate", func(t *testing.T) { on(t, func(rt *rapid.T, f *field) { rotateAgrees(rt, f, c, oracle) }) })
	t.Run("Attention", func(t *testing.T) { on(t, func(rt *rapid.T, f *field) { attentionAgrees(rt, f, c, oracle) }) })
	t.Run("Segments", func(t *testing.T) { on(t, func(rt *rapid.T, f *field) { segmentsAgree(rt, f, c, oracle) }) })
	t.Run("Experts", func(t *testing.T) { on(t, func(rt *rapid.T, f *field) { expertsAgree(rt, f, c, oracle) }) })
}

func linearAgrees(rt *rapid.T, f *field, c, oracle kernel.Compute) {
	rows := rapid.IntRange(0, 20).Draw(rt, "rows")
	w := f.matrix(rapid.IntRange(1, 40).Draw(rt, "outputs"), rapid.IntRange(1, 400).Draw(rt, "cols"))
	x, bias := f.normals(rows*w.Cols, 1), f.normals(w.Rows, 1)
	got, want, bound := f.zeros(rows*w.Rows), f.zeros(rows*w.Rows), f.zeros(rows*w.Rows)
	c.Linear(got, x, rows, w, bias)
	oracle.Linear(want, x, rows, w, bias)
	positive := model.Matrix{Data: slices.Clone(w.Data), Rows: w.Rows, Cols: w.Cols}
	for i := range positive.Data {
		positive.Data[i] &^= 1 << 15
	}
	oracle.Linear(bound, absolute(x), rows, positive, absolute(bias))
	near(rt, "Linear", got, want, func(i int) float64 { return (float64(w.Cols)/16 + 8) * unit * float64(bound[i]) })
}

func absolute(s []float32) []float32 {
	to := slices.Clone(s)
	for i, v := range to {
		to[i] = max(v, -v)
	}
	return to
}

func memoryAgrees(rt *rapid.T, f *field, c, oracle kernel.Compute) {
	table := f.matrix(rapid.IntRange(1, 30).Draw(rt, "rows"), rapid.IntRange(1, 70).Draw(rt, "cols"))
	var ids []int32
	for range rapid.IntRange(0, 10).Draw(rt, "ids") {
		ids = append(ids, int32(f.rand.IntN(table.Rows)))
	}
	n := len(ids) * table.Cols
	got, want := f.zeros(n), f.zeros(n)
	c.Embed(got, table, ids)
	oracle.Embed(want, table, ids)
	equal(rt, "Embed", got, want)

	alloc := func() []float32 {
		x, err := c.Alloc(n)
		if err != nil {
			rt.Fatal(err)
		}
		back := f.normals(n, 1)
		c.Download(back, x)
		equal(rt, "Alloc", back, f.zeros(n))
		return x
	}
	other := alloc()
	c.Upload(other, f.normals(n, 1))
	c.Free(other)
	host, back, device, sum := f.normals(n, 1), f.zeros(n), alloc(), alloc()
	defer func() { c.Free(device); c.Free(sum) }()
	c.Upload(device, host)
	c.Copy(sum, device)
	c.Add(sum, device)
	c.Download(back, sum)
	oracle.Add(host, slices.Clone(host))
	equal(rt, "Upload, Copy, Add and Download", back, host)

	width, rows := rapid.IntRange(1, 40).Draw(rt, "width"), rapid.IntRange(0, 9).Draw(rt, "fetched rows")
	src := f.normals((rows+2)*width, 1)
	got = f.normals((rows+1)*width, 1)
	want = f.like(got)
	var to, from []int32
	for _, row := range f.rand.Perm(rows + 1)[:rows] {
		to, from = append(to, int32(row)), append(from, int32(f.rand.IntN(rows+2)))
	}
	c.Fetch(got, to, src, from, width)
	c.Sync()
	oracle.Fetch(want, to, src, from, width)
	equal(rt, "Fetch", got, want)
}

func normsAgree(rt *rapid.T, f *field, c, oracle kernel.Compute) {
	rows, n := rapid.IntRange(0, 9).Draw(rt, "rows"), rapid.IntRange(1, 300).Draw(rt, "width")
	deviation := rapid.SampledFrom([]float64{1e-3, 1, 100}).Draw(rt, "deviation")
	x, weight, bias := f.normals(rows*n, deviation), f.normals(n, 1), f.normals(n, 1)
	got, want := f.zeros(rows*n), f.zeros(rows*n)
	c.RMSNorm(got, x, rows, weight, 1e-6)
	oracle.RMSNorm(want, x, rows, weight, 1e-6)
	near(rt, "RMSNorm", got, want, func(i int) float64 { return 16*unit*math.Abs(float64(want[i])) + 1e-40 })

	c.LayerNorm(got, x, rows, weight, bias, 1e-6)
	oracle.LayerNorm(want, x, rows, weight, bias, 1e-6)
	near(rt, "LayerNorm", got, want, func(i int) float64 {
		row := x[i/n*n:][:n]
		var mean, squares, largest float64
		for _, v := range row {
			mean += float64(v) / float64(n)
			largest = max(largest, math.Abs(float64(v)))
		}
		for _, v := range row {
			squares += (float64(v) - mean) * (float64(v) - mean)
		}
		scaled := largest / math.Sqrt(squares/float64(n)+1e-6) * math.Abs(float64(weight[i%n]))
		return 16 * unit * (scaled + math.Abs(float64(bias[i%n])))
	})
}

func elementsAgree(rt *rapid.T, f *field, c, oracle kernel.Compute) {
	n := rapid.IntRange(0, 300).Draw(rt, "elements")
	deviation := rapid.SampledFrom([]float64{0.01, 1, 5, 60}).Draw(rt, "deviation")
	x, up := f.normals(n, deviation), f.normals(n, 1)
	got, want := f.like(x), f.like(x)
	c.SiLUMul(got, up)
	oracle.SiLUMul(want, up)
	near(rt, "SiLUMul", got, want, func(i int) float64 { return 32*unit*math.Abs(float64(x[i])*float64(up[i])) + 1e-36 })
	for _, tanh := range []bool{false, true} {
		got, want := f.like(x), f.like(x)
		c.GELU(got, tanh)
		oracle.GELU(want, tanh)
		near(rt, "GELU", got, want, func(i int) float64 { return 32*unit*math.Abs(float64(x[i])) + 1e-36 })
	}
}

func rotateAgrees(rt *rapid.T, f *field, c, oracle kernel.Compute) {
	rows, heads := rapid.IntRange(0, 5).Draw(rt, "rows"), rapid.IntRange(1, 4).Draw(rt, "heads")
	half := rapid.IntRange(1, 40).Draw(rt, "half")
	stride := heads*half*2 + rapid.IntRange(0, 9).Draw(rt, "gap")
	got := f.normals(rows*stride, 1)
	want := f.like(got)
	x := f.like(got)
	cos, sin := f.zeros(rows*half), f.zeros(rows*half)
	for i := range cos {
		s, c := math.Sincos(f.rand.NormFloat64() * 10)
		cos[i], sin[i] = float32(c), float32(s)
	}
	c.Rotate(got, rows, stride, heads, half*2, cos, sin)
	oracle.Rotate(want, rows, stride, heads, half*2, cos, sin)
	near(rt, "Rotate", got, want, func(i int) float64 {
		in := i % stride
		if in >= heads*half*2 {
			return 0
		}
		first := i - in + in/(2*half)*2*half + in%half
		return 3 * unit * (math.Abs(float64(x[first])) + math.Abs(float64(x[first+half])))
	})
}

func attentionAgrees(rt *rapid.T, f *field, c, oracle kernel.Compute) {
	s := shape(rt)
	layer := rapid.IntRange(0, s.Layers-1).Draw(rt, "layer")
	deviation := rapid.SampledFrom([]float64{0.1, 1, 5}).Draw(rt, "deviation")
	got, want := f.attention(rt, c, s, layer, deviation)(oracle)
	near(rt, "Attention", got, want, func(int) float64 { return 64 * unit * 6 })
}

// attention draws sequences and gives them to c, then to another.
func (f *field) attention(rt *rapid.T, c kernel.Compute, s kernel.AttnShape, layer int, deviation float64) func(kernel.Compute) (got, want []float32) {
	lengths := rapid.SliceOfN(rapid.IntRange(1, 60), 1, 3).Draw(rt, "lengths")
	fresh := rapid.IntRange(1, 60).Draw(rt, "new rows")
	var old, batch, other []kernel.Seq
	oldRows, rows := 0, 0
	for _, n := range lengths {
		n0 := max(0, n-fresh)
		blocks := f.blocks(s, n)
		old = append(old, kernel.Seq{Row: oldRows, Rows: n0, Blocks: blocks})
		batch = append(batch, kernel.Seq{Row: rows, Rows: n - n0, Pos: n0, Blocks: blocks})
		other = append(other, kernel.Seq{Row: rows, Rows: n - n0, Pos: n0, Blocks: f.blocks(s, n)})
		oldRows += n0
		rows += n - n0
	}
	width := s.KVHeads * s.Dim
	oldK, oldV := f.normals(oldRows*width, deviation), f.values(oldRows*width)
	q, k, v := f.normals(rows*s.Heads*s.Dim, deviation), f.normals(rows*width, deviation), f.values(rows*width)
	got, want := f.zeros(len(q)), f.zeros(len(q))
	c.StoreKV(layer, s, oldK, oldV, old)
	c.StoreKV(layer, s, k, v, batch)
	c.Attention(layer, s, got, q, batch)
	return func(oracle kernel.Compute) ([]float32, []float32) {
		for i := range old {
			old[i].Blocks = other[i].Blocks
		}
		oracle.StoreKV(layer, s, oldK, oldV, old)
		oracle.StoreKV(layer, s, k, v, other)
		for i := range batch {
			for j := range batch[i].Blocks {
				equal(rt, "KV block", batch[i].Blocks[j], other[i].Blocks[j])
			}
		}
		oracle.Attention(layer, s, want, q, other)
		return got, want
	}
}

// values are at most 6 in magnitude.
func (f *field) values(n int) []float32 {
	s := f.normals(n, 1)
	for i, v := range s {
		s[i] = max(-6, min(v, 6))
	}
	return s
}

func segmentsAgree(rt *rapid.T, f *field, c, oracle kernel.Compute) {
	heads, dim := rapid.IntRange(1, 3).Draw(rt, "heads"), dim(rt)
	segs := rapid.SliceOfN(rapid.IntRange(0, 40), 0, 3).Draw(rt, "segments")
	rows := 0
	for _, n := range segs {
		rows += n
	}
	qkv := f.values(rows * 3 * heads * dim)
	got, want := f.zeros(rows*heads*dim), f.zeros(rows*heads*dim)
	c.SegmentAttention(got, qkv, segs, heads, dim)
	oracle.SegmentAttention(want, qkv, segs, heads, dim)
	near(rt, "SegmentAttention", got, want, func(int) float64 { return 64 * unit * 6 })
}

func expertsAgree(rt *rapid.T, f *field, c, oracle kernel.Compute) {
	rows, n := rapid.IntRange(0, 12).Draw(rt, "rows"), rapid.IntRange(1, 20).Draw(rt, "experts")
	topK := rapid.IntRange(1, n).Draw(rt, "top k")
	hidden, inner := rapid.IntRange(1, 60).Draw(rt, "hidden"), rapid.IntRange(1, 60).Draw(rt, "inner")
	norm := rapid.Bool().Draw(rt, "norm")
	logits := f.normals(rows*n, 3)
	for i := range logits {
		if f.rand.IntN(4) == 0 {
			logits[i] = float32(f.rand.IntN(3)) // ties
		}
	}
	ids, wantIDs := make([]int32, rows*topK), make([]int32, rows*topK)
	weights, wantWeights := make([]float32, rows*topK), make([]float32, rows*topK)
	c.Route(logits, rows, n, topK, norm, ids, weights)
	oracle.Route(logits, rows, n, topK, norm, wantIDs, wantWeights)
	if !slices.Equal(ids, wantIDs) {
		rt.Fatalf("ids of Route: %v, want %v", ids, wantIDs)
	}
	near(rt, "weights of Route", weights, wantWeights, func(int) float64 { return 16 * unit })

	experts := make([]model.Expert, n)
	for e := range experts {
		if f.rand.IntN(6) > 0 {
			experts[e] = f.expert(hidden, inner)
		}
	}
	x := f.normals(rows*hidden, 1)
	got := f.normals(rows*topK*hidden, 1)
	want := f.like(got)
	c.Experts(got, x, rows, topK, ids, experts)
	oracle.Experts(want, x, rows, topK, ids, experts)
	largest := 1.0
	for _, v := range want {
		largest = max(largest, math.Abs(float64(v)))
	}
	near(rt, "Experts", got, want, func(i int) float64 {
		if experts[ids[i/hidden]].Down.Data == nil {
			return 0
		}
		return 64 * unit * (1 + float64(max(hidden, inner))/16) * largest
	})

	sum, wantSum := f.like(x), f.like(x)
	c.Combine(sum, got, rows, topK, weights)
	oracle.Combine(wantSum, got, rows, topK, weights)
	near(rt, "Combine", sum, wantSum, func(i int) float64 {
		bound := math.Abs(float64(x[i]))
		for k := range topK {
			slot := i/hidden*topK + k
			bound += math.Abs(float64(weights[slot]) * float64(got[slot*hidden+i%hidden]))
		}
		return float64(topK+2) * unit * bound
	})
}
