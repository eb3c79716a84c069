package kerneltest

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"trireme.dev/shared/kernel"
	"trireme.dev/shared/model"
)

// Laws tests c against known answers, worked out by hand or taken from a table, and for the calls it must refuse.
func Laws(t *testing.T, c kernel.Compute) {
	t.Helper()
	t.Run("Products", func(t *testing.T) { products(t, c) })
	t.Run("Functions", func(t *testing.T) { functions(t, c) })
	t.Run("Attention", func(t *testing.T) { attentionLaws(t, c) })
	t.Run("Route", func(t *testing.T) { routeLaws(t, c) })
	t.Run("Experts", func(t *testing.T) { expertsLaws(t, c) })
	t.Run("Refusals", func(t *testing.T) { refusals(t, c) })
}

func expect(t *testing.T, what string, got []float32, want ...float32) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%s: %v, want %v", what, got, want)
	}
	for i := range got {
		if d := math.Abs(float64(got[i] - want[i])); !(d <= 1e-6*max(1, math.Abs(float64(want[i])))) {
			t.Errorf("%s: %v, want %v", what, got, want)
			return
		}
	}
}

// weights makes a matrix of numbers that bfloat16 has exactly.
func weights(rows, cols int, values ...float32) model.Matrix {
	m := model.Matrix{Rows: rows, Cols: cols}
	for _, v := range values {
		m.Data = append(m.Data, narrow(v))
	}
	return m
}

func products(t *testing.T, c kernel.Compute) {
	w := weights(2, 3, 1, 2, 3, -1, 0.5, 4)
	out := make([]float32, 4)
	c.Linear(out, []float32{1, 10, 100, 2, 0, -1}, 2, w, nil)
	expect(t, "Linear", out, 321, 404, -1, -6)
	c.Linear(out, []float32{1, 10, 100, 2, 0, -1}, 2, w, []float32{1000, -1})
	expect(t, "Linear with bias", out, 1321, 403, 999, -7)
	emb := make([]float32, 9)
	c.Embed(emb, w, []int32{1, 0, 1})
	expect(t, "Embed", emb, -1, 0.5, 4, 1, 2, 3, -1, 0.5, 4)
	c.Fetch(emb, []int32{2, 0}, []float32{10, 20, 30, 40, 50, 60}, []int32{0, 1}, 3)
	c.Sync()
	expect(t, "Fetch", emb, 40, 50, 60, 1, 2, 3, 10, 20, 30)

	// Every product of 2^k and its place: any element missed or taken twice shows.
	for cols := 1; cols <= 70; cols++ {
		w := weights(1, cols, slices.Repeat([]float32{1}, cols)...)
		for k := range cols {
			x := make([]float32, cols)
			x[k] = float32(k + 1)
			c.Linear(out[:1], x, 1, w, nil)
			if out[0] != x[k] {
				t.Fatalf("element %d of %d columns: %v", k, cols, out[0])
			}
		}
	}
}

func functions(t *testing.T, c kernel.Compute) {
	// x/(1+e^-x) and x*Phi(x), from tables of e and of the normal distribution.
	x := []float32{0, 1, -1, 2, -3, 20}
	c.SiLUMul(x, []float32{5, 1, 1, 2, 1, 1})
	expect(t, "SiLUMul", x, 0, 0.7310586, -0.26894143, 3.5231884, -0.14227763, 20)
	x = []float32{0, 1, -1, 2, -3, 20}
	c.GELU(x, false)
	expect(t, "GELU", x, 0, 0.8413447, -0.15865526, 1.9544997, -0.00404969, 20)
	x = []float32{0, 1, -1, 2, -3, 20} // torch.nn.functional.gelu(x, approximate="tanh")
	c.GELU(x, true)
	expect(t, "GELU tanh", x, 0, 0.841192, -0.158808, 1.9545977, -0.00363739, 20)

	x = []float32{3, 4, 0, 0}
	c.RMSNorm(x, x, 1, []float32{1, 2, 1, 1}, 0)
	expect(t, "RMSNorm", x, 1.2, 3.2, 0, 0)
	x = []float32{0, 0}
	c.RMSNorm(x, x, 1, []float32{1, 1}, 1e-6)
	expect(t, "RMSNorm of zeros", x, 0, 0)
	x = []float32{1, 3, 5, 7, 2, 2, 2, 2}
	c.LayerNorm(x, x, 2, []float32{1, 1, 1, 2}, []float32{0, 0, 10, 0}, 0.000001)
	r := float32(1 / math.Sqrt(5+1e-6))
	expect(t, "LayerNorm", x, -3*r, -r, 10+r, 6*r, 0, 0, 10, 0)

	// A quarter turn and none; the element between the rows stays.
	x = []float32{1, 2, 3, 4, 9, 5, 6, 7, 8}
	c.Rotate(x, 2, 5, 1, 4, []float32{0, 1, 1, 0}, []float32{1, 0, 0, -1})
	expect(t, "Rotate", x, -3, 2, 1, 4, 9, 5, 8, 7, -6)
}

func attentionLaws(t *testing.T, c kernel.Compute) {
	// Equal keys: the mean of the values so far. A key that dominates: its value.
	const n = 37
	s := kernel.AttnShape{Layers: 2, Heads: 2, KVHeads: 1, Dim: 3}
	k, v, q, out := make([]float32, n*3), make([]float32, n*3), make([]float32, n*6), make([]float32, n*6)
	for i := range n {
		v[i*3], v[i*3+1], v[i*3+2] = float32(i), 1, -float32(i*i)
		q[i*6+3] = 1000 // head 1 looks at the first component of the keys
	}
	k[5*3] = 1
	blocks := make([][]float32, (n+model.BlockTokens-1)/model.BlockTokens)
	for i := range blocks {
		blocks[i] = make([]float32, 2*2*model.BlockTokens*3)
	}
	seqs := []kernel.Seq{{Rows: n, Blocks: blocks}}
	c.StoreKV(1, s, k, v, seqs)
	c.Attention(1, s, out, q, seqs)
	for i := range n {
		mean, squares := float32(i)/2, float32(i*(2*i+1))/6
		expect(t, fmt.Sprint("mean of values at ", i), out[i*6:][:3], mean, 1, -squares)
		if i >= 5 {
			expect(t, fmt.Sprint("value of the largest score at ", i), out[i*6+3:][:3], 5, 1, -25)
		} else {
			expect(t, fmt.Sprint("no look ahead at ", i), out[i*6+3:][:3], mean, 1, -squares)
		}
	}
	for i, b := range blocks {
		if slices.ContainsFunc(b[:len(b)/2], func(v float32) bool { return v != 0 }) {
			t.Errorf("block %d: layer 0 was written", i)
		}
	}

	// Two segments that do not see each other; in each, all positions are seen.
	qkv := []float32{0, 0, 1, 0, 0, 3, 0, 0, 8}
	out = make([]float32, 3)
	c.SegmentAttention(out, qkv, []int{2, 1}, 1, 1)
	expect(t, "SegmentAttention", out, 2, 2, 8)
}

func routeLaws(t *testing.T, c kernel.Compute) {
	log := func(v float64) float32 { return float32(math.Log(v)) }
	logits := []float32{log(1), log(4), log(2), log(1), 0, 0, 0, 0}
	ids, w := make([]int32, 6), make([]float32, 6)
	c.Route(logits, 2, 4, 3, false, ids, w)
	if want := []int32{1, 2, 0, 0, 1, 2}; !slices.Equal(ids, want) {
		t.Errorf("ids %v, want %v", ids, want)
	}
	expect(t, "weights", w, 0.5, 0.25, 0.125, 0.25, 0.25, 0.25)
	c.Route(logits, 2, 4, 3, true, ids, w)
	expect(t, "normalised weights", w, 4./7, 2./7, 1./7, 1./3, 1./3, 1./3)
	c.Route([]float32{-300, -200, -250}, 1, 3, 1, false, ids[:1], w[:1])
	if ids[0] != 1 || w[0] != 1 {
		t.Errorf("far logits: expert %d, weight %v", ids[0], w[0])
	}
}

func expertsLaws(t *testing.T, c kernel.Compute) {
	// gate 20 is its own silu; expert e multiplies x[0] by 20 and by e+1; expert 1 is not here.
	experts := make([]model.Expert, 3)
	for e := range experts {
		if e != 1 {
			experts[e] = model.Expert{Gate: weights(1, 2, 0, 20), Up: weights(1, 2, float32(e+1), 0), Down: weights(2, 1, 1, -1)}
		}
	}
	out := slices.Repeat([]float32{7}, 8)
	c.Experts(out, []float32{2, 1, 3, 1}, 2, 2, []int32{0, 1, 2, 0}, experts)
	expect(t, "Experts", out, 40, -40, 7, 7, 180, -180, 60, -60)
	dst := []float32{1, 2, 3, 4}
	c.Combine(dst, out, 2, 2, []float32{0.5, 1, 1, 2})
	expect(t, "Combine", dst, 28, -11, 303, -296)
}

func refusals(t *testing.T, c kernel.Compute) {
	w := weights(2, 3, 1, 2, 3, 4, 5, 6)
	s := kernel.AttnShape{Layers: 1, Heads: 2, KVHeads: 1, Dim: 4}
	floats := func(n int) []float32 { return make([]float32, n) }
	block := [][]float32{floats(2 * model.BlockTokens * 4)}
	expert := []model.Expert{{Gate: w, Up: w, Down: weights(3, 1, 1, 2, 3)}}
	for name, call := range map[string]func(){
		"Upload":           func() { c.Upload(floats(2), floats(3)) },
		"Download":         func() { c.Download(floats(2), floats(3)) },
		"Embed":            func() { c.Embed(floats(3), w, []int32{2}) },
		"Copy":             func() { c.Copy(floats(2), floats(3)) },
		"Add":              func() { c.Add(floats(2), floats(3)) },
		"Fetch":            func() { c.Fetch(floats(6), []int32{3}, floats(6), []int32{0}, 2) },
		"Fetch from":       func() { c.Fetch(floats(6), []int32{2}, floats(5), []int32{2}, 2) },
		"Fetch rows":       func() { c.Fetch(floats(6), []int32{0, 1}, floats(6), []int32{0}, 2) },
		"Linear":           func() { c.Linear(floats(2), floats(2), 1, w, nil) },
		"Linear bias":      func() { c.Linear(floats(2), floats(3), 1, w, floats(1)) },
		"RMSNorm":          func() { c.RMSNorm(floats(6), floats(5), 2, floats(3), 0) },
		"LayerNorm":        func() { c.LayerNorm(floats(6), floats(6), 2, floats(3), floats(2), 0) },
		"SiLUMul":          func() { c.SiLUMul(floats(2), floats(3)) },
		"Rotate":           func() { c.Rotate(floats(7), 2, 4, 1, 4, floats(4), floats(4)) },
		"StoreKV":          func() { c.StoreKV(0, s, floats(4), floats(4), []kernel.Seq{{Rows: 2, Blocks: block}}) },
		"StoreKV blocks":   func() { c.StoreKV(0, s, floats(4), floats(4), []kernel.Seq{{Rows: 1, Pos: 16, Blocks: block}}) },
		"Attention":        func() { c.Attention(1, s, floats(8), floats(8), []kernel.Seq{{Rows: 1, Blocks: block}}) },
		"SegmentAttention": func() { c.SegmentAttention(floats(4), floats(12), []int{2}, 1, 4) },
		"Route":            func() { c.Route(floats(4), 1, 4, 5, true, make([]int32, 5), floats(5)) },
		"Experts":          func() { c.Experts(floats(3), floats(3), 1, 1, []int32{0}, expert) },
		"Experts id":       func() { c.Experts(floats(3), floats(3), 1, 1, []int32{1}, expert) },
		"Combine":          func() { c.Combine(floats(3), floats(3), 1, 2, floats(2)) },
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if p := fmt.Sprint(recover()); !strings.HasPrefix(p, "BUG: kernel "+strings.Fields(name)[0]+":") {
					t.Errorf("panic %q, want one that names the operation", p)
				}
			}()
			call()
		})
	}
}
