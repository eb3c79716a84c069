package cpu

import (
	"trireme.dev/shared/kernel/check"
)

// rowsTask applies a function of one row to many, or of one element to pieces of a long slice.
type rowsTask struct {
	vec                  vector
	do                   func(t *rowsTask, first, end int)
	out, x, weight, bias []float32
	rows, pieces         int
	eps                  float32
}

func (t *rowsTask) run(_, i int) { t.do(t, t.rows*i/t.pieces, t.rows*(i+1)/t.pieces) }

// spread runs t, whose rows cost the given number of floating-point operations each.
func (c *compute) spread(t rowsTask, flops int) {
	t.vec = c.vec
	t.pieces = c.pool.pieces(t.rows*flops, t.rows)
	c.rows = t
	c.pool.do(&c.rows, t.pieces)
	c.rows = rowsTask{}
}

func (c *compute) RMSNorm(out, x []float32, rows int, weight []float32, eps float32) {
	check.Norm("RMSNorm", out, x, rows, weight)
	c.spread(rowsTask{do: rmsNorm, out: out, x: x, weight: weight, rows: rows, eps: eps}, 16*len(weight))
}

func rmsNorm(t *rowsTask, first, end int) {
	n := len(t.weight)
	for r := first; r < end; r++ {
		x := t.x[r*n:][:n]
		squares := float64(t.vec.squares(x, 0)) / float64(n)
		t.vec.normalize(t.out[r*n:][:n], x, t.weight, nil, 0, rsqrt(squares+float64(t.eps)))
	}
}

func (c *compute) LayerNorm(out, x []float32, rows int, weight, bias []float32, eps float32) {
	check.Norm("LayerNorm", out, x, rows, weight)
	check.Same("LayerNorm", weight, bias)
	c.spread(rowsTask{do: layerNorm, out: out, x: x, weight: weight, bias: bias, rows: rows, eps: eps}, 16*len(weight))
}

func layerNorm(t *rowsTask, first, end int) {
	n := len(t.weight)
	for r := first; r < end; r++ {
		x := t.x[r*n:][:n]
		mean := t.vec.sum(x) / float32(n)
		squares := float64(t.vec.squares(x, mean)) / float64(n)
		t.vec.normalize(t.out[r*n:][:n], x, t.weight, t.bias, mean, rsqrt(squares+float64(t.eps)))
	}
}

// mapPiece is the length of the pieces in which elementwise functions are spread.
const mapPiece = 1024

func (c *compute) SiLUMul(gate, up []float32) {
	check.Same("SiLUMul", gate, up)
	c.spread(rowsTask{do: siluMul, out: gate, x: up, rows: (len(gate) + mapPiece - 1) / mapPiece}, 32*mapPiece)
}

func siluMul(t *rowsTask, first, end int) {
	from, to := first*mapPiece, min(end*mapPiece, len(t.out))
	t.vec.siluMul(t.out[from:to], t.x[from:to])
}

func (c *compute) GELU(x []float32, tanh bool) {
	t := rowsTask{do: gelu, out: x, rows: (len(x) + mapPiece - 1) / mapPiece}
	if tanh {
		t.do = geluTanh
	}
	c.spread(t, 32*mapPiece)
}

func gelu(t *rowsTask, first, end int) {
	t.vec.gelu(t.out[first*mapPiece : min(end*mapPiece, len(t.out))])
}

func geluTanh(t *rowsTask, first, end int) {
	t.vec.geluTanh(t.out[first*mapPiece : min(end*mapPiece, len(t.out))])
}

func (c *compute) Rotate(x []float32, rows, stride, heads, dim int, cos, sin []float32) {
	check.Rotate(x, rows, stride, heads, dim, cos, sin)
	t := &c.rotation
	*t = rotateTask{x: x, cos: cos, sin: sin, rows: rows, stride: stride, heads: heads, dim: dim}
	t.pieces = c.pool.pieces(32*rows*heads*dim, rows)
	c.pool.do(t, t.pieces)
	*t = rotateTask{}
}

// rotateTask is one Rotate, cut over rows.
type rotateTask struct {
	x, cos, sin              []float32
	rows, stride, heads, dim int
	pieces                   int
}

func (t *rotateTask) run(_, i int) {
	half := t.dim / 2
	for r := t.rows * i / t.pieces; r < t.rows*(i+1)/t.pieces; r++ {
		cos, sin := t.cos[r*half:][:half], t.sin[r*half:][:half]
		for h := range t.heads {
			head := t.x[r*t.stride+h*t.dim:][:t.dim]
			lo, hi := head[:half], head[half:][:half]
			for i, a := range lo {
				b, c, s := hi[i], cos[i], sin[i]
				// The conversions keep a compiler from fusing, which would make results depend on the machine.
				lo[i] = float32(a*c) - float32(b*s)
				hi[i] = float32(b*c) + float32(a*s)
			}
		}
	}
}
