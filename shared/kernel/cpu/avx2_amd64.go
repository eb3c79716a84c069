package cpu

import "unsafe"

// avx2 implements vector with AVX2 and FMA. Lengths and pointers are checked here; the assembly in avx2_*_amd64.s
// reads and writes nothing else.
type avx2 struct{}

func (avx2) tile(t *tile) {
	t.check(tileRows)
	tileAVX2(t)
}

func (avx2) pair(t *tile) {
	t.check(2)
	pairAVX2(t)
}

func (avx2) row(t *tile) {
	t.check(1)
	rowAVX2(t)
}

func (avx2) attend(queries []query, k, v []float32, stride, n int, scale float32) {
	dim := len(queries[0].q)
	_, _ = k[:(n-1)*stride+dim], v[:(n-1)*stride+dim]
	for i := range queries {
		_, _ = queries[i].q[:dim], queries[i].acc[:dim]
	}
	for i := range queries {
		q := &queries[i]
		scoresAVX2(&q.s[0], unsafe.SliceData(q.q), unsafe.SliceData(k), stride, dim, n, scale)
	}
	softmaxAVX2(&queries[0], len(queries), n)
	for i := range queries {
		q := &queries[i]
		accumulateAVX2(unsafe.SliceData(q.acc), unsafe.SliceData(v), stride, dim, &q.s[0], n, q.decay)
	}
}

func (avx2) accumulate(acc, v []float32, stride int, p []float32, decay float32) {
	if len(p) > 0 {
		_ = v[:(len(p)-1)*stride+len(acc)]
	}
	accumulateAVX2(unsafe.SliceData(acc), unsafe.SliceData(v), stride, len(acc), unsafe.SliceData(p), len(p), decay)
}

func (avx2) sum(x []float32) float32 { return sumAVX2(unsafe.SliceData(x), len(x)) }

func (avx2) squares(x []float32, mean float32) float32 {
	return squaresAVX2(unsafe.SliceData(x), len(x), mean)
}

func (avx2) normalize(out, x, weight, bias []float32, mean, scale float32) {
	n := len(x)
	_, _ = out[:n], weight[:n]
	if bias != nil {
		_ = bias[:n]
	}
	normalizeAVX2(unsafe.SliceData(out), unsafe.SliceData(x), unsafe.SliceData(weight), unsafe.SliceData(bias), n, mean, scale)
}

func (avx2) exp(dst, src []float32, shift float32) {
	_ = dst[:len(src)]
	expAVX2(unsafe.SliceData(dst), unsafe.SliceData(src), len(src), shift)
}

func (avx2) siluMul(gate, up []float32) {
	_ = up[:len(gate)]
	siluMulAVX2(unsafe.SliceData(gate), unsafe.SliceData(up), len(gate))
}

func (avx2) gelu(x []float32)     { geluAVX2(unsafe.SliceData(x), len(x)) }
func (avx2) geluTanh(x []float32) { geluTanhAVX2(unsafe.SliceData(x), len(x)) }

//go:noescape
func tileAVX2(t *tile)

//go:noescape
func pairAVX2(t *tile)

//go:noescape
func rowAVX2(t *tile)

//go:noescape
func scoresAVX2(s, q, k *float32, stride, dim, n int, scale float32)

//go:noescape
func softmaxAVX2(queries *query, count, n int)

//go:noescape
func accumulateAVX2(acc, v *float32, stride, dim int, p *float32, n int, decay float32)

//go:noescape
func sumAVX2(x *float32, n int) float32

//go:noescape
func squaresAVX2(x *float32, n int, mean float32) float32

//go:noescape
func normalizeAVX2(out, x, weight, bias *float32, n int, mean, scale float32)

//go:noescape
func expAVX2(dst, src *float32, n int, shift float32)

//go:noescape
func siluMulAVX2(gate, up *float32, n int)

//go:noescape
func geluAVX2(x *float32, n int)

//go:noescape
func geluTanhAVX2(x *float32, n int)
