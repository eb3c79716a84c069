package hf

import (
	"testing"

	"trireme.dev/shared/model"
)

// BenchmarkTranspose turns the gate of one expert of Qwen3-VL-30B-A3B as transformers 4 stores it: 768 columns of a
// matrix [2048, 1536]. Bytes are those written.
func BenchmarkTranspose(b *testing.B) {
	const h, i = 2048, 768
	src := make([]model.BF16, h*2*i)
	dst := model.Matrix{Data: make([]model.BF16, i*h), Rows: i, Cols: h}
	b.SetBytes(2 * i * h)
	for b.Loop() {
		transpose(dst, src, 2*i)
	}
}
