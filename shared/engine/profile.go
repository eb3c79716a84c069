package engine

import (
	"sync/atomic"
	"time"

	"trireme.dev/shared/kernel"
	"trireme.dev/shared/model"
)

// Profile is a kernel.Compute that measures the time spent inside another one, so that the share of a step spent
// outside kernels can be told. It costs two clock readings a call. On a backend whose calls return before the work is
// done, the waiting shows up in Download. Benchmarks use it; no service does.
type Profile struct {
	c      kernel.Compute
	inside atomic.Int64 // ns
	calls  atomic.Int64
}

var _ kernel.Compute = (*Profile)(nil)

// NewProfile wraps c, which Close closes.
func NewProfile(c kernel.Compute) *Profile { return &Profile{c: c} }

// Inside is the time spent inside kernel calls so far. It may be called at any time by any goroutine.
func (p *Profile) Inside() time.Duration { return time.Duration(p.inside.Load()) }

// Calls is the number of kernel calls so far. It may be called at any time by any goroutine.
func (p *Profile) Calls() int64 { return p.calls.Load() }

// since books a call that began at start.
func (p *Profile) since(start time.Time) {
	p.inside.Add(int64(time.Since(start)))
	p.calls.Add(1)
}

// Digest names the wrapped kernel set.
func (p *Profile) Digest() string { return p.c.Digest() }

// Alloc allocates from the wrapped Compute; it is not measured.
func (p *Profile) Alloc(n int) ([]float32, error) { return p.c.Alloc(n) }

// Free gives back to the wrapped Compute; it is not measured.
func (p *Profile) Free(scratch []float32) { p.c.Free(scratch) }

// Close closes the wrapped Compute.
func (p *Profile) Close() error { return p.c.Close() }

// Upload is measured.
func (p *Profile) Upload(dst, src []float32) {
	defer p.since(time.Now())
	p.c.Upload(dst, src)
}

// Download is measured.
func (p *Profile) Download(dst, src []float32) {
	defer p.since(time.Now())
	p.c.Download(dst, src)
}

// Embed is measured.
func (p *Profile) Embed(out []float32, table model.Matrix, ids []int32) {
	defer p.since(time.Now())
	p.c.Embed(out, table, ids)
}

// Copy is measured.
func (p *Profile) Copy(dst, src []float32) {
	defer p.since(time.Now())
	p.c.Copy(dst, src)
}

// Add is measured.
func (p *Profile) Add(dst, src []float32) {
	defer p.since(time.Now())
	p.c.Add(dst, src)
}

// Linear is measured.
func (p *Profile) Linear(out, x []float32, rows int, w model.Matrix, bias []float32) {
	defer p.since(time.Now())
	p.c.Linear(out, x, rows, w, bias)
}

// RMSNorm is measured.
func (p *Profile) RMSNorm(out, x []float32, rows int, weight []float32, eps float32) {
	defer p.since(time.Now())
	p.c.RMSNorm(out, x, rows, weight, eps)
}

// LayerNorm is measured.
func (p *Profile) LayerNorm(out, x []float32, rows int, weight, bias []float32, eps float32) {
	defer p.since(time.Now())
	p.c.LayerNorm(out, x, rows, weight, bias, eps)
}

// SiLUMul is measured.
func (p *Profile) SiLUMul(gate, up []float32) {
	defer p.since(time.Now())
	p.c.SiLUMul(gate, up)
}

// GELU is measured.
func (p *Profile) GELU(x []float32, tanh bool) {
	defer p.since(time.Now())
	p.c.GELU(x, tanh)
}

// Rotate is measured.
func (p *Profile) Rotate(x []float32, rows, stride, heads, dim int, cos, sin []float32) {
	defer p.since(time.Now())
	p.c.Rotate(x, rows, stride, heads, dim, cos, sin)
}

// StoreKV is measured.
func (p *Profile) StoreKV(layer int, shape kernel.AttnShape, k, v []float32, seqs []kernel.Seq) {
	defer p.since(time.Now())
	p.c.StoreKV(layer, shape, k, v, seqs)
}

// Attention is measured.
func (p *Profile) Attention(layer int, shape kernel.AttnShape, out, q []float32, seqs []kernel.Seq) {
	defer p.since(time.Now())
	p.c.Attention(layer, shape, out, q, seqs)
}

// SegmentAttention is measured.
func (p *Profile) SegmentAttention(out, qkv []float32, segs []int, heads, dim int) {
	defer p.since(time.Now())
	p.c.SegmentAttention(out, qkv, segs, heads, dim)
}

// Route is measured.
func (p *Profile) Route(logits []float32, rows, experts, topK int, norm bool, ids []int32, weights []float32) {
	defer p.since(time.Now())
	p.c.Route(logits, rows, experts, topK, norm, ids, weights)
}

// Experts is measured.
func (p *Profile) Experts(out, x []float32, rows, topK int, ids []int32, experts []model.Expert) {
	defer p.since(time.Now())
	p.c.Experts(out, x, rows, topK, ids, experts)
}

// Combine is measured.
func (p *Profile) Combine(dst, slots []float32, rows, topK int, weights []float32) {
	defer p.since(time.Now())
	p.c.Combine(dst, slots, rows, topK, weights)
}

// Fetch is measured.
func (p *Profile) Fetch(dst []float32, to []int32, src []float32, from []int32, width int) {
	defer p.since(time.Now())
	p.c.Fetch(dst, to, src, from, width)
}

// Sync is measured.
func (p *Profile) Sync() {
	defer p.since(time.Now())
	p.c.Sync()
}
