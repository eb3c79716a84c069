package engine_test

import (
	"trireme.dev/shared/kernel"
	"trireme.dev/shared/model"
)

// nothing is a Compute that computes nothing once memory has been set up, for counting the engine's own allocations
// and time. Embed, Upload and Download still work, so that an Encoder can be made.
type nothing struct{ kernel.Compute }

func (nothing) Copy(dst, src []float32)                                                         {}
func (nothing) Add(dst, src []float32)                                                          {}
func (nothing) Linear(out, x []float32, rows int, w model.Matrix, bias []float32)               {}
func (nothing) RMSNorm(out, x []float32, rows int, weight []float32, eps float32)               {}
func (nothing) LayerNorm(out, x []float32, rows int, weight, bias []float32, eps float32)       {}
func (nothing) SiLUMul(gate, up []float32)                                                      {}
func (nothing) GELU(x []float32, tanh bool)                                                     {}
func (nothing) Rotate(x []float32, rows, stride, heads, dim int, cos, sin []float32)            {}
func (nothing) StoreKV(layer int, shape kernel.AttnShape, k, v []float32, seqs []kernel.Seq)    {}
func (nothing) Attention(l int, shape kernel.AttnShape, out, q []float32, seqs []kernel.Seq)    {}
func (nothing) SegmentAttention(out, qkv []float32, segs []int, heads, dim int)                 {}
func (nothing) Route(l []float32, rows, experts, topK int, norm bool, ids []int32, w []float32) {}
func (nothing) Experts(out, x []float32, rows, topK int, ids []int32, experts []model.Expert)   {}
func (nothing) Combine(dst, slots []float32, rows, topK int, weights []float32)                 {}
func (nothing) Fetch(dst []float32, to []int32, src []float32, from []int32, width int)         {}
