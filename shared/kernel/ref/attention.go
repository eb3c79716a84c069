package ref

import (
	"math"

	"trireme.dev/shared/kernel"
	"trireme.dev/shared/kernel/check"
	"trireme.dev/shared/model"
)

func (compute) StoreKV(layer int, shape kernel.AttnShape, k, v []float32, seqs []kernel.Seq) {
	check.StoreKV(layer, shape, k, v, seqs)
	width := shape.KVHeads * shape.Dim
	for _, s := range seqs {
		for i := range s.Rows {
			keys, values := cached(layer, shape, s, s.Pos+i)
			copy(keys, k[(s.Row+i)*width:][:width])
			copy(values, v[(s.Row+i)*width:][:width])
		}
	}
}

// cached returns the keys and values, [KVHeads, Dim] each, of one layer at position pos of a sequence
// (model.Text.BlockFloats).
func cached(layer int, shape kernel.AttnShape, s kernel.Seq, pos int) (keys, values []float32) {
	width := shape.KVHeads * shape.Dim
	block := s.Blocks[pos/model.BlockTokens]
	at := (layer*2*model.BlockTokens + pos%model.BlockTokens) * width
	return block[at:][:width], block[at+model.BlockTokens*width:][:width]
}

func (compute) Attention(layer int, shape kernel.AttnShape, out, q []float32, seqs []kernel.Seq) {
	check.Attention(layer, shape, out, q, seqs)
	group := shape.Heads / shape.KVHeads
	for _, s := range seqs {
		for i := range s.Rows {
			for h := range shape.Heads {
				at := ((s.Row+i)*shape.Heads + h) * shape.Dim
				attend(out[at:][:shape.Dim], q[at:][:shape.Dim], s.Pos+i+1, func(pos int) (key, value []float32) {
					keys, values := cached(layer, shape, s, pos)
					from := h / group * shape.Dim
					return keys[from:][:shape.Dim], values[from:][:shape.Dim]
				})
			}
		}
	}
}

func (compute) SegmentAttention(out, qkv []float32, segs []int, heads, dim int) {
	check.SegmentAttention(out, qkv, segs, heads, dim)
	width := heads * dim
	first := 0
	for _, n := range segs {
		for r := first; r < first+n; r++ {
			for h := range heads {
				attend(out[r*width+h*dim:][:dim], qkv[r*3*width+h*dim:][:dim], n, func(pos int) (key, value []float32) {
					row := qkv[(first+pos)*3*width:][:3*width]
					return row[width+h*dim:][:dim], row[2*width+h*dim:][:dim]
				})
			}
		}
		first += n
	}
}

// attend computes softmax(q k / sqrt(dim)) v for one head over n positions.
func attend(out, q []float32, n int, at func(pos int) (key, value []float32)) {
	scores := make([]float64, n)
	top := math.Inf(-1)
	for pos := range n {
		key, _ := at(pos)
		for i, v := range key {
			scores[pos] += float64(q[i]) * float64(v)
		}
		scores[pos] /= math.Sqrt(float64(len(q)))
		top = max(top, scores[pos])
	}
	var total float64
	sum := make([]float64, len(out))
	for pos := range n {
		p := math.Exp(scores[pos] - top)
		total += p
		_, value := at(pos)
		for i, v := range value {
			sum[i] += p * float64(v)
		}
	}
	for i, v := range sum {
		out[i] = float32(v / total)
	}
}
