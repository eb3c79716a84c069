package cpu

import "unsafe"

// avx512 implements vector with AVX-512 (F, BW, DQ, VL). Lengths and pointers are checked here; the assembly in avx512_*_amd64.s
// reads and writes nothing else.
type avx512 struct{}

func (avx512) tile(t *tile) {
	t.check(tileRows)
	tileAVX512(t)
}

func (avx512) pair(t *tile) {
	t.check(2)
	pairAVX512(t)
}

func (avx512) row(t *tile) {
	t.check(1)
	rowAVX512(t)
}

func (avx512) attend(queries []query, k, v []float32, stride, n int, scale float32) {
	dim := len(queries[0].q)
	_, _ = k[:(n-1)*stride+dim], v[:(n-1)*stride+dim]
	for i := range queries {
		_, _ = queries[i].q[:dim], queries[i].acc[:dim]
	}
	if n == span {
		scoresWholeAVX512(&queries[0], len(queries), unsafe.SliceData(k), stride, dim, scale)
		softmaxAVX512(&queries[0], len(queries), n)
		accumulateWholeAVX512(&queries[0], len(queries), unsafe.SliceData(v), stride, dim)
		return
	}
	for i := range queries {
		q := &queries[i]
		scoresAVX512(&q.s[0], unsafe.SliceData(q.q), unsafe.SliceData(k), stride, dim, n, scale)
	}
	softmaxAVX512(&queries[0], len(queries), n)
	for i := range queries {
		q := &queries[i]
		accumulateAVX512(unsafe.SliceData(q.acc), unsafe.SliceData(v), stride, dim, &q.s[0], n, q.decay)
	}
}

func (avx512) accumulate(acc, v []float32, stride int, p []float32, decay float32) {
	if len(p) > 0 {
		_ = v[:(len(p)-1)*stride+len(acc)]
	}
	accumulateAVX512(unsafe.SliceData(acc), unsafe.SliceData(v), stride, len(acc), unsafe.SliceData(p), len(p), decay)
}

func (avx512) sum(x []float32) float32 { return sumAVX512(unsafe.SliceData(x), len(x)) }

func (avx512) squares(x []float32, mean float32) float32 {
	return squaresAVX512(unsafe.SliceData(x), len(x), mean)
}

func (avx512) normalize(out, x, weight, bias []float32, mean, scale float32) {
	n := len(x)
	_, _ = out[:n], weight[:n]
	if bias != nil {
		_ = bias[:n]
	}
	normalizeAVX512(unsafe.SliceData(out), unsafe.SliceData(x), unsafe.SliceData(weight), unsafe.SliceData(bias), n, mean, scale)
}

func (avx512) exp(dst, src []float32, shift float32) {
	_ = dst[:len(src)]
	expAVX512(unsafe.SliceData(dst), unsafe.SliceData(src), len(src), shift)
}

func (avx512) siluMul(gate, up []float32) {
	_ = up[:len(gate)]
	siluMulAVX512(unsafe.SliceData(gate), unsafe.SliceData(up), len(gate))
}

func (avx512) gelu(x []float32)     { geluAVX512(unsafe.SliceData(x), len(x)) }
func (avx512) geluTanh(x []float32) { geluTanhAVX512(unsafe.SliceData(x), len(x)) }

//go:noescape
func tileAVX512(t *tile)

//go:noescape
func pairAVX512(t *tile)

//go:noescape
func rowAVX512(t *tile)

// scoresWholeAVX512 and accumulateWholeAVX512 do all queries, for a span of 16.
//
//go:noescape
func scoresWholeAVX512(queries *query, count int, k *float32, stride, dim int, scale float32)

//go:noescape
func accumulateWholeAVX512(queries *query, count int, v *float32, stride, dim int)

//go:noescape
func scoresAVX512(s, q, k *float32, stride, dim, n int, scale float32)

//go:noescape
func softmaxAVX512(queries *query, count, n int)

//go:noescape
func accumulateAVX512(acc, v *float32, stride, dim int, p *float32, n int, decay float32)

//go:noescape
func sumAVX512(x *float32, n int) float32

//go:noescape
func squaresAVX512(x *float32, n int, mean float32) float32

//go:noescape
func normalizeAVX512(out, x, weight, bias *float32, n int, mean, scale float32)

//go:noescape
func expAVX512(dst, src *float32, n int, shift float32)

//go:noescape
func siluMulAVX512(gate, up *float32, n int)

//go:noescape
func geluAVX512(x *float32, n int)

//go:noescape
func geluTanhAVX512(x *float32, n int)
