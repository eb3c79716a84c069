package ref

import (
	"math"

	"trireme.dev/shared/kernel/check"
	"trireme.dev/shared/model"
)

// Route ranks by logit, which is the order of the exact probabilities.
func (compute) Route(logits []float32, rows, experts, topK int, norm bool, ids []int32, weights []float32) {
	check.Route(logits, rows, experts, topK, ids, weights)
	for r := range rows {
		row := logits[r*experts:][:experts]
		top := math.Inf(-1)
		for _, v := range row {
			top = max(top, float64(v))
		}
		var total float64
		for _, v := range row {
			total += math.Exp(float64(v) - top)
		}
		taken := make([]bool, experts)
		var kept float64
		for k := range topK {
			best := -1
			for e, v := range row {
				if !taken[e] && (best < 0 || v > row[best]) {
					best = e
				}
			}
			taken[best] = true
			ids[r*topK+k] = int32(best)
			kept += math.Exp(float64(row[best]) - top)
		}
		if norm {
			total = kept
		}
		for k, e := range ids[r*topK:][:topK] {
			weights[r*topK+k] = float32(math.Exp(float64(row[e])-top) / total)
		}
	}
}

func (compute) Experts(out, x []float32, rows, topK int, ids []int32, experts []model.Expert) {
	hidden := check.Experts(out, x, rows, topK, ids, experts)
	for slot, id := range ids {
		e := experts[id]
		if e.Down.Data == nil {
			continue
		}
		in := x[slot/topK*hidden:][:hidden]
		gate, up := make([]float32, e.Gate.Rows), make([]float32, e.Up.Rows)
		linear(gate, in, 1, e.Gate, nil)
		linear(up, in, 1, e.Up, nil)
		siluMul(gate, up)
		linear(out[slot*hidden:][:hidden], gate, 1, e.Down, nil)
	}
}

func (compute) Combine(dst, slots []float32, rows, topK int, weights []float32) {
	hidden := check.Combine(dst, slots, rows, topK, weights)
	for r := range rows {
		for i := range hidden {
			var sum float64
			for k := r * topK; k < (r+1)*topK; k++ {
				sum += float64(weights[k]) * float64(slots[k*hidden+i])
			}
			dst[r*hidden+i] = float32(float64(dst[r*hidden+i]) + sum)
		}
	}
}
