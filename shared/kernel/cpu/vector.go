package cpu

import "trireme.dev/shared/model"

const (
	lanes       = 16 // partial sums of a dot product
	tileRows    = 4  // rows of x in a tile
	tileOutputs = 4  // rows of the weights in a tile
	span        = model.BlockTokens
)

// vector is what differs between instruction sets. Every implementation rounds alike; fma is the fused multiply-add.
//
// A sum over k is made in 16 lanes: lane l starts from +0 and takes the elements k = l, l+16, l+32, ... by fma (or by
// addition where nothing is multiplied); then lane i adds lane i+8, then i+4, i+2, i+1. This order is "the dot" below.
// exp is the function exp32 of float.go, also inside gelu and siluMul.
type vector interface {
	// tile computes the products of t for four rows of x, pair for the first two and row for the first.
	tile(t *tile)
	pair(t *tile)
	row(t *tile)

	// attend lets queries go through a span of n positions, 1 to 16, whose keys and values are stride apart. For each
	// query, with m the larger of top and all s[j]:
	//
	//	s[j]  = scale times the dot of q and k[j*stride:], for j < n
	//	s[j]  = exp(s[j]-m) for j < n, and 0 from there on
	//	decay = exp(top-m)
	//	total = the fma of total, decay and the sum of s over 16 lanes
	//	top   = m
	//	acc   = acc*decay, then fma(s[j], v[j*stride:], acc) in the order of j, elementwise
	attend(queries []query, k, v []float32, stride, n int, scale float32)
	// accumulate is the last step of attend for any number of weights p.
	accumulate(acc, v []float32, stride int, p []float32, decay float32)

	// sum adds up x; squares adds up (x-mean)^2.
	sum(x []float32) float32
	squares(x []float32, mean float32) float32
	// normalize computes out = fma((x-mean)*scale, weight, bias). out may be x. A nil bias is zero.
	normalize(out, x, weight, bias []float32, mean, scale float32)

	// exp computes dst = exp(src-shift). dst may be src.
	exp(dst, src []float32, shift float32)
	// siluMul computes gate = gate / (1 + exp(-gate)) * up.
	siluMul(gate, up []float32)
	// gelu and geluTanh are the functions gelu32 and geluTanh32 of float.go.
	gelu(x []float32)
	geluTanh(x []float32)
}

// tile is a group of dot products: rows of x with tiles*4 rows of w, in turn. Lengths are in elements. The assembly
// reads its fields by offset.
type tile struct {
	x      [tileRows][]float32 // [16*blocks] each
	out    [tileRows][]float32 // [4*tiles] each; receives the outputs of its row
	xTail  []float32           // [4, 16], the last elements, zero-padded; nil when there are none. Needs tiles == 1
	wTail  []model.BF16        // [4, 16], of the four rows of w
	w      []model.BF16        // the first of the rows of w
	stride int                 // from one row of w to the next; 0: the same row four times (needs tiles == 1)
	blocks int                 // sixteens of elements in a row
	tiles  int
}

// query is one head of one row on its way through the spans, with the state of an online softmax (Milakov and
// Gimelshein, arXiv:1805.02867). The assembly reads and writes its fields by offset.
type query struct {
	q, acc []float32 // [dim]
	s      [span]float32
	top    float32 // largest score so far, from -Inf
	total  float32 // sum of exp(score-top) so far
	decay  float32

	out []float32 // [dim]
	n   int       // positions to attend to
}
