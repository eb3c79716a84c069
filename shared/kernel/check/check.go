// Package check tests the arguments of kernel.Compute for consistent lengths, so that every backend refuses the same
// calls with the same words. A wrong length is a programmer error: each function panics with a "BUG:" prefix that names
// the operation. It looks at lengths and host values only, never at the elements of a device slice.
package check

import (
	"fmt"

	"trireme.dev/shared/kernel"
	"trireme.dev/shared/model"
)

func fail(op, format string, args ...any) {
	panic("BUG: kernel " + op + ": " + fmt.Sprintf(format, args...))
}

func length(op, what string, got, want int) {
	if got != want {
		fail(op, "%s has %d elements, want %d", what, got, want)
	}
}

func matrix(op string, m model.Matrix) {
	if m.Rows < 0 || m.Cols < 0 {
		fail(op, "matrix of %d by %d", m.Rows, m.Cols)
	}
	if len(m.Data) != m.Rows*m.Cols {
		fail(op, "matrix of %d by %d with %d elements", m.Rows, m.Cols, len(m.Data))
	}
}

// Same panics unless dst and src have equal lengths.
func Same(op string, dst, src []float32) { length(op, "src", len(src), len(dst)) }

// Fetch checks the arguments of Compute.Fetch, but not that to names no row twice.
func Fetch(dst []float32, to []int32, src []float32, from []int32, width int) {
	length("Fetch", "from", len(from), len(to))
	if width <= 0 {
		fail("Fetch", "rows of %d elements", width)
	}
	for i := range to {
		if to[i] < 0 || (int(to[i])+1)*width > len(dst) || from[i] < 0 || (int(from[i])+1)*width > len(src) {
			fail("Fetch", "row %d of %d becomes row %d of %d", from[i], len(src)/width, to[i], len(dst)/width)
		}
	}
}

// Embed checks the arguments of Compute.Embed, ids included.
func Embed(out []float32, table model.Matrix, ids []int32) {
	matrix("Embed", table)
	length("Embed", "out", len(out), len(ids)*table.Cols)
	for _, id := range ids {
		if id < 0 || int(id) >= table.Rows {
			fail("Embed", "id %d of a table of %d rows", id, table.Rows)
		}
	}
}

// Linear checks the arguments of Compute.Linear.
func Linear(out, x []float32, rows int, w model.Matrix, bias []float32) {
	matrix("Linear", w)
	length("Linear", "x", len(x), rows*w.Cols)
	length("Linear", "out", len(out), rows*w.Rows)
	if bias != nil {
		length("Linear", "bias", len(bias), w.Rows)
	}
}

// Norm checks the arguments of Compute.RMSNorm and, with a bias, of Compute.LayerNorm.
func Norm(op string, out, x []float32, rows int, weight []float32) {
	length(op, "x", len(x), rows*len(weight))
	length(op, "out", len(out), rows*len(weight))
}

// Rotate checks the arguments of Compute.Rotate.
func Rotate(x []float32, rows, stride, heads, dim int, cos, sin []float32) {
	if rows < 0 || heads < 0 || dim < 0 || dim%2 != 0 || stride < heads*dim {
		fail("Rotate", "%d rows of stride %d, %d heads of %d", rows, stride, heads, dim)
	}
	if rows > 0 && len(x) < (rows-1)*stride+heads*dim {
		fail("Rotate", "x has %d elements, want %d", len(x), (rows-1)*stride+heads*dim)
	}
	length("Rotate", "cos", len(cos), rows*dim/2)
	length("Rotate", "sin", len(sin), rows*dim/2)
}

func seqs(op string, layer int, shape kernel.AttnShape, rows int, seqs []kernel.Seq) {
	if layer < 0 || layer >= shape.Layers || shape.KVHeads <= 0 || shape.Dim <= 0 || shape.Heads%shape.KVHeads != 0 {
		fail(op, "layer %d of shape %+v", layer, shape)
	}
	floats := shape.Layers * 2 * model.BlockTokens * shape.KVHeads * shape.Dim
	for i := range seqs {
		s := &seqs[i]
		if s.Row < 0 || s.Rows < 0 || s.Pos < 0 || s.Row+s.Rows > rows {
			fail(op, "sequence %d: rows %d+%d of %d at position %d", i, s.Row, s.Rows, rows, s.Pos)
		}
		need := 0
		if s.Rows > 0 {
			need = (s.Pos + s.Rows + model.BlockTokens - 1) / model.BlockTokens
		}
		if len(s.Blocks) < need {
			fail(op, "sequence %d: %d blocks, want %d", i, len(s.Blocks), need)
		}
		for j, b := range s.Blocks[:need] {
			if len(b) != floats {
				fail(op, "sequence %d: block %d has %d elements, want %d", i, j, len(b), floats)
			}
		}
	}
}

// StoreKV checks the arguments of Compute.StoreKV.
func StoreKV(layer int, shape kernel.AttnShape, k, v []float32, batch []kernel.Seq) {
	width := shape.KVHeads * shape.Dim
	rows := 0
	if width > 0 {
		rows = len(k) / width
	}
	length("StoreKV", "k", len(k), rows*width)
	length("StoreKV", "v", len(v), len(k))
	seqs("StoreKV", layer, shape, rows, batch)
}

// Attention checks the arguments of Compute.Attention.
func Attention(layer int, shape kernel.AttnShape, out, q []float32, batch []kernel.Seq) {
	width := shape.Heads * shape.Dim
	rows := 0
	if width > 0 {
		rows = len(q) / width
	}
	length("Attention", "q", len(q), rows*width)
	length("Attention", "out", len(out), len(q))
	seqs("Attention", layer, shape, rows, batch)
}

// SegmentAttention checks the arguments of Compute.SegmentAttention.
func SegmentAttention(out, qkv []float32, segs []int, heads, dim int) {
	rows := 0
	for _, n := range segs {
		if n < 0 {
			fail("SegmentAttention", "segment of %d rows", n)
		}
		rows += n
	}
	length("SegmentAttention", "qkv", len(qkv), rows*3*heads*dim)
	length("SegmentAttention", "out", len(out), rows*heads*dim)
}

// Route checks the arguments of Compute.Route.
func Route(logits []float32, rows, experts, topK int, ids []int32, weights []float32) {
	if topK < 0 || topK > experts {
		fail("Route", "top %d of %d experts", topK, experts)
	}
	length("Route", "logits", len(logits), rows*experts)
	length("Route", "ids", len(ids), rows*topK)
	length("Route", "weights", len(weights), rows*topK)
}

// Experts checks the arguments of Compute.Experts, ids and the shapes of the experts in use included. It returns the
// width of a row of x.
func Experts(out, x []float32, rows, topK int, ids []int32, experts []model.Expert) (hidden int) {
	length("Experts", "ids", len(ids), rows*topK)
	if rows > 0 {
		hidden = len(x) / rows
	}
	length("Experts", "x", len(x), rows*hidden)
	length("Experts", "out", len(out), rows*topK*hidden)
	for _, id := range ids {
		if id < 0 || int(id) >= len(experts) {
			fail("Experts", "expert %d of %d", id, len(experts))
		}
		e := &experts[id]
		if e.Down.Data == nil {
			continue
		}
		matrix("Experts", e.Gate)
		matrix("Experts", e.Up)
		matrix("Experts", e.Down)
		inner := e.Gate.Rows
		if e.Gate.Cols != hidden || e.Up.Cols != hidden || e.Up.Rows != inner || e.Down.Rows != hidden || e.Down.Cols != inner {
			fail("Experts", "expert %d: gate %d by %d, up %d by %d, down %d by %d, rows of %d", id, inner, e.Gate.Cols,
				e.Up.Rows, e.Up.Cols, e.Down.Rows, e.Down.Cols, hidden)
		}
	}
	return hidden
}

// Combine checks the arguments of Compute.Combine and returns the width of a row of dst.
func Combine(dst, slots []float32, rows, topK int, weights []float32) (hidden int) {
	if rows > 0 {
		hidden = len(dst) / rows
	}
	length("Combine", "dst", len(dst), rows*hidden)
	length("Combine", "slots", len(slots), rows*topK*hidden)
	length("Combine", "weights", len(weights), rows*topK)
	return hidden
}
