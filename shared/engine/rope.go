package engine

import (
	"math"

	"trireme.dev/shared/model"
)

// inverseFrequencies returns base^(-2i/dim) for i in [0, dim/2), rounded to float32 where transformers rounds: the
// exponent, the power and its inverse (compute_default_rope_parameters, Qwen3VLMoeVisionRotaryEmbedding).
func inverseFrequencies(base float64, dim int) []float32 {
	inv := make([]float32, dim/2)
	for i := range inv {
		exponent := float32(2*i) / float32(dim)
		inv[i] = 1 / float32(math.Pow(base, float64(exponent)))
	}
	return inv
}

// rotary turns M-RoPE positions into the cosines and sines of a text model.
type rotary struct {
	inv  []float32 // [HeadDim/2]
	axis []uint8   // [HeadDim/2]: which of (t, h, w) the frequency takes its position from
}

// newRotary prepares r for heads of dim elements (apply_interleaved_mrope says which axis a frequency follows).
func newRotary(r model.Rope, dim int) rotary {
	out := rotary{inv: inverseFrequencies(r.Theta, dim), axis: make([]uint8, dim/2)}
	if r.Sections == nil {
		return out
	}
	for i := range out.axis {
		if axis := i % 3; axis != 0 && i < 3*r.Sections[axis] {
			out.axis[i] = uint8(axis)
		}
	}
	return out
}

// fill writes the cosines and sines of one position, each [HeadDim/2]. Angles are products in float32, as in the
// reference; their cosine and sine are rounded once from float64.
func (r *rotary) fill(cos, sin []float32, pos [3]int32) {
	for i, inv := range r.inv {
		s, c := math.Sincos(float64(inv * float32(pos[r.axis[i]])))
		cos[i], sin[i] = float32(c), float32(s)
	}
}
