// Package ref is the reference implementation of kernel.Compute: plain Go, one thread, float64 inside every sum and
// function, rounded to float32 once at the end. It is the oracle that other backends are tested against. It is not
// fast, and not the backend to serve with: kernel/cpu is.
package ref

import (
	"math"

	"trireme.dev/shared/kernel"
	"trireme.dev/shared/kernel/check"
	"trireme.dev/shared/model"
)

// Digest is what Compute.Digest returns here.
const Digest = "ref-f64-v1"

type compute struct{}

// New returns the reference implementation. Its device memory is ordinary memory.
func New() kernel.Compute { return compute{} }

func (compute) Digest() string                 { return Digest }
func (compute) Alloc(n int) ([]float32, error) { return make([]float32, n), nil }

// Free leaves it to the garbage collector.
func (compute) Free([]float32) {}

func (compute) Upload(dst, src []float32) {
	check.Same("Upload", dst, src)
	copy(dst, src)
}

func (compute) Download(dst, src []float32) {
	check.Same("Download", dst, src)
	copy(dst, src)
}
func (compute) Close() error { return nil }

func (compute) Fetch(dst []float32, to []int32, src []float32, from []int32, width int) {
	check.Fetch(dst, to, src, from, width)
	for i, row := range to {
		copy(dst[int(row)*width:][:width], src[int(from[i])*width:])
	}
}

func (compute) Sync() {}

func (compute) Embed(out []float32, table model.Matrix, ids []int32) {
	check.Embed(out, table, ids)
	for i, id := range ids {
		row := table.Data[int(id)*table.Cols:][:table.Cols]
		for j, w := range row {
			out[i*table.Cols+j] = widen(w)
		}
	}
}

func (compute) Copy(dst, src []float32) {
	check.Same("Copy", dst, src)
	copy(dst, src)
}

func (compute) Add(dst, src []float32) {
	check.Same("Add", dst, src)
	for i, v := range src {
		dst[i] += v
	}
}

func (compute) Linear(out, x []float32, rows int, w model.Matrix, bias []float32) {
	check.Linear(out, x, rows, w, bias)
	linear(out, x, rows, w, bias)
}

func linear(out, x []float32, rows int, w model.Matrix, bias []float32) {
	row := make([]float64, w.Cols)
	for o := range w.Rows {
		for k, v := range w.Data[o*w.Cols:][:w.Cols] {
			row[k] = float64(widen(v))
		}
		b := 0.0
		if bias != nil {
			b = float64(bias[o])
		}
		for r := range rows {
			sum := b
			for k, v := range x[r*w.Cols:][:w.Cols] {
				sum += float64(v) * row[k]
			}
			out[r*w.Rows+o] = float32(sum)
		}
	}
}

func (compute) RMSNorm(out, x []float32, rows int, weight []float32, eps float32) {
	check.Norm("RMSNorm", out, x, rows, weight)
	n := len(weight)
	for r := range rows {
		in, to := x[r*n:][:n], out[r*n:][:n]
		var squares float64
		for _, v := range in {
			squares += float64(v) * float64(v)
		}
		scale := 1 / math.Sqrt(squares/float64(n)+float64(eps))
		for i, v := range in {
			to[i] = float32(float64(v) * scale * float64(weight[i]))
		}
	}
}

func (compute) LayerNorm(out, x []float32, rows int, weight, bias []float32, eps float32) {
	check.Norm("LayerNorm", out, x, rows, weight)
	check.Same("LayerNorm", weight, bias)
	n := len(weight)
	for r := range rows {
		in, to := x[r*n:][:n], out[r*n:][:n]
		var sum, squares float64
		for _, v := range in {
			sum += float64(v)
		}
		mean := sum / float64(n)
		for _, v := range in {
			squares += (float64(v) - mean) * (float64(v) - mean)
		}
		scale := 1 / math.Sqrt(squares/float64(n)+float64(eps))
		for i, v := range in {
			to[i] = float32((float64(v)-mean)*scale*float64(weight[i]) + float64(bias[i]))
		}
	}
}

func (compute) SiLUMul(gate, up []float32) {
	check.Same("SiLUMul", gate, up)
	siluMul(gate, up)
}

// siluMul computes gate = gate * sigmoid(gate) * up.
func siluMul(gate, up []float32) {
	for i, v := range gate {
		g := float64(v)
		gate[i] = float32(g / (1 + math.Exp(-g)) * float64(up[i]))
	}
}

func (compute) GELU(x []float32, tanh bool) {
	for i, v := range x {
		g := float64(v)
		phi := 0.5 * math.Erfc(-g/math.Sqrt2)
		if tanh {
			phi = 0.5 * (1 + math.Tanh(math.Sqrt(2/math.Pi)*(g+0.044715*g*g*g))) // torch.nn.GELU, approximate="tanh"
		}
		x[i] = float32(g * phi)
	}
}

func (compute) Rotate(x []float32, rows, stride, heads, dim int, cos, sin []float32) {
	check.Rotate(x, rows, stride, heads, dim, cos, sin)
	half := dim / 2
	for r := range rows {
		for h := range heads {
			head := x[r*stride+h*dim:][:dim]
			for i := range half {
				a, b := float64(head[i]), float64(head[half+i])
				c, s := float64(cos[r*half+i]), float64(sin[r*half+i])
				head[i] = float32(a*c - b*s)
				head[half+i] = float32(b*c + a*s)
			}
		}
	}
}

// widen converts a bfloat16 to the float32 of the same value.
func widen(w model.BF16) float32 { return math.Float32frombits(uint32(w) << 16) }
