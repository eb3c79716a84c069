package cpu

import "math"

// portable implements vector in plain Go.
type portable struct{}

// fold adds up the lanes of a sum.
func fold(l *[lanes]float32) float32 {
	for half := lanes / 2; half > 0; half /= 2 {
		for i := range half {
			l[i] += l[i+half]
		}
	}
	return l[0]
}

func (portable) tile(t *tile) {
	for r := range tileRows {
		portableRow(t, r)
	}
}

func (portable) pair(t *tile) {
	portableRow(t, 0)
	portableRow(t, 1)
}

func (portable) row(t *tile) { portableRow(t, 0) }

func portableRow(t *tile, r int) {
	for o := range t.tiles * tileOutputs {
		var sum [lanes]float32
		x, w := t.x[r], t.w[o*t.stride:]
		for k := 0; k < t.blocks*lanes; k += lanes {
			xs, ws := x[k:][:lanes], w[k:][:lanes]
			for l := range sum {
				sum[l] = fma32(xs[l], widen(ws[l]), sum[l])
			}
		}
		if t.xTail != nil {
			for l := range sum {
				sum[l] = fma32(t.xTail[r*lanes+l], widen(t.wTail[o*lanes+l]), sum[l])
			}
		}
		t.out[r][o] = fold(&sum)
	}
}

func (p portable) attend(queries []query, k, v []float32, stride, n int, scale float32) {
	for i := range queries {
		q := &queries[i]
		top := q.top
		for j := range n {
			var sum [lanes]float32
			for i, x := range k[j*stride:][:len(q.q)] {
				sum[i%lanes] = fma32(q.q[i], x, sum[i%lanes])
			}
			q.s[j] = float32(fold(&sum) * scale)
			top = max(top, q.s[j])
		}
		for j := range n {
			q.s[j] = exp32(q.s[j] - top)
		}
		clear(q.s[n:])
		q.decay = exp32(q.top - top)
		sum := q.s
		q.top, q.total = top, fma32(q.total, q.decay, fold(&sum))
		p.accumulate(q.acc, v, stride, q.s[:n], q.decay)
	}
}

func (portable) accumulate(acc, v []float32, stride int, p []float32, decay float32) {
	for i := range acc {
		a := float32(acc[i] * decay)
		for j, w := range p {
			a = fma32(w, v[j*stride+i], a)
		}
		acc[i] = a
	}
}

func (portable) sum(x []float32) float32 {
	var sum [lanes]float32
	for i, v := range x {
		sum[i%lanes] += v
	}
	return fold(&sum)
}

func (portable) squares(x []float32, mean float32) float32 {
	var sum [lanes]float32
	for i, v := range x {
		d := v - mean
		sum[i%lanes] = fma32(d, d, sum[i%lanes])
	}
	return fold(&sum)
}

func (portable) normalize(out, x, weight, bias []float32, mean, scale float32) {
	for i, v := range x {
		var b float32
		if bias != nil {
			b = bias[i]
		}
		out[i] = fma32(float32((v-mean)*scale), weight[i], b)
	}
}

func (portable) exp(dst, src []float32, shift float32) {
	for i, v := range src {
		dst[i] = exp32(v - shift)
	}
}

func (portable) siluMul(gate, up []float32) {
	for i, v := range gate {
		gate[i] = float32(silu32(v) * up[i])
	}
}

func (portable) gelu(x []float32) {
	for i, v := range x {
		x[i] = gelu32(v)
	}
}

func (portable) geluTanh(x []float32) {
	for i, v := range x {
		x[i] = geluTanh32(v)
	}
}

// rsqrt is 1/sqrt(x) by way of float64.
func rsqrt(x float64) float32 { return float32(1 / math.Sqrt(x)) }
