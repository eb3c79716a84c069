// Package kernel is the interface between the engine and the arithmetic of one NPU. Implementations live in
// kernel/ref (plain Go, the oracle), kernel/cpu (AVX2 and AVX-512 assembly) and, later, kernel/cuda. It says what is
// computed and in which order of summation, not how; it allocates no device memory but scratch.
//
// # Device slices
//
// A []float32 or []model.BF16 that is passed to a Compute lies in the memory of its NPU. Outside a backend such a slice
// may be sliced and measured, but its elements may not be read or written: on a GPU they are not addressable. Move data
// with Upload and Download. Slices said to be "host" are ordinary memory. A backend keeps no slice after a call
// returns, and callers keep them alive and mapped until the call returns (on a GPU: until the next Download or Sync).
//
// # Batch invariance (DESIGN.md, Determinism)
//
// Every output element is summed in one order that depends on the shapes of the weights and on the element's own
// position only: not on the number of rows beside it, on how a prompt was cut into chunks, on the thread count, or on
// whether AVX2 or AVX-512 was chosen. Backends whose Digest is equal give bit-equal results.
package kernel

import (
	"errors"

	"trireme.dev/shared/model"
)

// ErrNoMemory is wrapped by the error of Alloc when the device has not so much memory.
var ErrNoMemory = errors.New("no memory for scratch")

// Compute does the arithmetic of one NPU. It is used by one goroutine at a time; it spreads work over its own threads.
// Wrong lengths are programmer errors and panic with a "BUG:" prefix. Outputs may not overlap inputs unless said.
type Compute interface {
	// Digest names the kernel set: arithmetic, dtype and order of summation. A sequence never moves between digests.
	Digest() string
	// Alloc returns zeroed scratch on the device of n float32, or an error that wraps ErrNoMemory. It lives until Free, or until
	// Close. Free gives back what Alloc has returned, as a whole, which no operation uses that is under way or follows; it is no
	// memory of the process from then on. Both may be called by any goroutine at any time, beside operations of another one.
	// (CUDA: cuMemCreate and cuMemMap, as cuMemFree would wait for all that the device computes.)
	Alloc(n int) ([]float32, error)
	Free(scratch []float32)
	// Upload copies host src to device dst; Download copies device src to host dst after all earlier operations.
	// Lengths are equal.
	Upload(dst, src []float32)
	Download(dst, src []float32)
	// Close ends the worker threads and frees scratch.
	Close() error

	// Fetch copies rows of width from the memory of another NPU of the same kernel set: row to[i] of dst, in this NPU's memory,
	// becomes row from[i] of src, in the other's. to and from are host, of one length; no row of dst is named twice. It is the
	// one operation that touches memory of another NPU, and nobody else may write to src meanwhile: the other NPU's Compute has
	// returned from Sync behind what it wrote there, and writes there again only when this one has returned from Sync behind the
	// Fetch. (CUDA: a kernel here that reads through peer access, or, between GPUs that have none, a gather there,
	// cuMemcpyPeerAsync and a scatter here.)
	Fetch(dst []float32, to []int32, src []float32, from []int32, width int)
	// Sync returns when all earlier operations are done, so that other NPUs may read what they wrote.
	Sync()

	// Embed copies rows of table: out[i] = float32(table[ids[i]]); out is [len(ids), table.Cols], ids are host.
	Embed(out []float32, table model.Matrix, ids []int32)
	// Copy copies src to dst, equal lengths. Add adds src to dst elementwise.
	Copy(dst, src []float32)
	Add(dst, src []float32)
	// Linear computes out[r] = W x[r] + bias for each of rows; x is [rows, W.Cols], out [rows, W.Rows]. bias is
	// [W.Rows] or nil.
	Linear(out, x []float32, rows int, w model.Matrix, bias []float32)
	// RMSNorm computes out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight over rows of len(weight). out may be x.
	RMSNorm(out, x []float32, rows int, weight []float32, eps float32)
	// LayerNorm computes out[r] = (x[r] - mean) / sqrt(var + eps) * weight + bias over rows of len(weight), with the
	// biased variance. out may be x.
	LayerNorm(out, x []float32, rows int, weight, bias []float32, eps float32)
	// SiLUMul computes gate = silu(gate) * up elementwise.
	SiLUMul(gate, up []float32)
	// GELU applies x*Phi(x) in place: exact (erf) or, with tanh, the tanh approximation of PyTorch.
	GELU(x []float32, tanh bool)
	// Rotate applies the rotary embedding in place (rotate_half form): row r, head h at x[r*stride+h*dim], the pair
	// (i, i+dim/2) turned by the angle whose cosine and sine are cos[r*dim/2+i], sin[r*dim/2+i]. cos and sin are host.
	Rotate(x []float32, rows, stride, heads, dim int, cos, sin []float32)

	// StoreKV writes keys and values of one layer into KV blocks: row s.Row+i of k and v ([rows, KVHeads, HeadDim])
	// goes to position s.Pos+i of sequence s.
	StoreKV(layer int, shape AttnShape, k, v []float32, seqs []Seq)
	// Attention computes causal grouped-query attention of one layer over KV blocks: query row s.Row+i ([rows, Heads,
	// HeadDim]) attends to positions 0 to s.Pos+i of its sequence, scores scaled by 1/sqrt(HeadDim). out is like q.
	// Reduction runs over fixed spans counted from position 0, alike for one query row or many.
	Attention(layer int, shape AttnShape, out, q []float32, seqs []Seq)
	// SegmentAttention is full (not causal) attention inside each segment of rows, for vision. qkv is [rows, 3, heads,
	// dim], out [rows, heads, dim]; segs are the lengths in rows of the segments, in order, adding up to rows.
	SegmentAttention(out, qkv []float32, segs []int, heads, dim int)

	// Route picks the topK experts of each row by softmax over logits [rows, experts], ranked by falling probability
	// (lower id first among equals); with norm the topK weights are divided by their sum. ids and weights are host,
	// [rows, topK].
	Route(logits []float32, rows, experts, topK int, norm bool, ids []int32, weights []float32)
	// Experts computes out[r*topK+k] = expert ids[r*topK+k] applied to x[r]; x is [rows, hidden], out [rows*topK,
	// hidden], ids host. Slots whose expert has no data here (Down.Data nil) are left alone.
	Experts(out, x []float32, rows, topK int, ids []int32, experts []model.Expert)
	// Combine adds to dst[r] the sum over k, in rank order from 0, of weights[r*topK+k] * slots[r*topK+k]; dst is
	// [rows, hidden], slots [rows*topK, hidden], weights host.
	Combine(dst, slots []float32, rows, topK int, weights []float32)
}

// Meter is a Compute that wants to know what the calls between Begin and End compute together. Stretches do not overlap. The
// engine tells it of every step of the language model and of every piece of a picture.
type Meter interface {
	Compute
	Begin(Work)
	End()
}

// Work is what a stretch of calls computes: a step of the language model, or one of the pieces of a picture.
type Work struct {
	Prompt   int // new tokens of prompts
	Visual   int // of these, multimodal ones
	Pairs    int // of a prompt's new token and one that it attends to, itself included
	Decoding int // sequences that take one more token
	Context  int // tokens that these attend to, all together

	Tokens int // multimodal tokens of the picture
	Parts  int // pieces that it is computed in, of which this is one; 0: no picture
}

// AttnShape is the shape of attention and of KV blocks; see model.Text.BlockFloats for the layout.
type AttnShape struct {
	Layers, Heads, KVHeads, Dim int
}

// Seq is one sequence's part of a batch: query rows [Row, Row+Rows) of the batch stand at positions [Pos, Pos+Rows) of
// the sequence. Blocks are its KV blocks in order, each model.Text.BlockFloats long, enough for Pos+Rows positions.
type Seq struct {
	Row, Rows, Pos int
	Blocks         [][]float32
}
