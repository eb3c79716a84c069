// Package kerneltest is the property-test suite of kernel.Compute. Every backend runs it: Laws (known answers and what
// every backend must refuse), Invariant (bit-equality across batches, chunks and, given two of them, threads and
// instruction sets) and, against the oracle, Agree (stated tolerances). It holds no tests of its own and no oracle.
//
// Operands lie directly before or behind a page without access, so a read or write out of bounds kills the test.
package kerneltest

import (
	"math"
	"math/rand/v2"
	"os"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"trireme.dev/shared/kernel"
	"trireme.dev/shared/model"
)

// field is where a test's operands lie. It frees them when the test is over.
type field struct {
	t    testing.TB
	rand *rand.Rand
	maps [][]byte
}

// on runs property for many fields.
func on(t *testing.T, property func(rt *rapid.T, f *field)) {
	t.Helper()
	rapid.Check(t, func(rt *rapid.T) {
		f := &field{t: t, rand: rand.New(rand.NewPCG(rapid.Uint64().Draw(rt, "seed"), 0))}
		defer f.free()
		property(rt, f)
	})
}

func (f *field) free() {
	for _, m := range f.maps {
		if err := unix.Munmap(m); err != nil {
			f.t.Error("unmapping:", err)
		}
	}
	f.maps = nil
}

// guarded returns n zeroed elements with an inaccessible page directly behind them or, for one field in four, directly
// before them.
func guarded[T model.BF16 | float32](f *field, n int) []T {
	f.t.Helper()
	page := os.Getpagesize()
	size := n * int(unsafe.Sizeof(*new(T)))
	body := (size + page - 1) / page * page
	m, err := unix.Mmap(-1, 0, body+2*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		f.t.Fatal("mapping an operand:", err)
	}
	f.maps = append(f.maps, m)
	for _, guard := range [][]byte{m[:page], m[page+body:]} {
		if err := unix.Mprotect(guard, unix.PROT_NONE); err != nil {
			f.t.Fatal("guarding an operand:", err)
		}
	}
	at := page + body - size
	if f.rand.IntN(4) == 0 {
		at = page
	}
	return unsafe.Slice((*T)(unsafe.Pointer(&m[at])), n)
}

// zeros returns n float32 of zero; normals n normally distributed ones.
func (f *field) zeros(n int) []float32 { return guarded[float32](f, n) }

func (f *field) normals(n int, deviation float64) []float32 {
	s := f.zeros(n)
	for i := range s {
		s[i] = float32(f.rand.NormFloat64() * deviation)
	}
	return s
}

// like returns a guarded copy of s.
func (f *field) like(s []float32) []float32 {
	to := f.zeros(len(s))
	copy(to, s)
	return to
}

// matrix returns normally distributed weights, whose products with normal x have about unit variance.
func (f *field) matrix(rows, cols int) model.Matrix {
	m := model.Matrix{Data: guarded[model.BF16](f, rows*cols), Rows: rows, Cols: cols}
	for i := range m.Data {
		m.Data[i] = narrow(float32(f.rand.NormFloat64() / math.Sqrt(float64(cols))))
	}
	return m
}

func (f *field) expert(hidden, inner int) model.Expert {
	return model.Expert{Gate: f.matrix(inner, hidden), Up: f.matrix(inner, hidden), Down: f.matrix(hidden, inner)}
}

// cuts splits n into random parts of at most most.
func (f *field) cuts(n, most int) []int {
	var parts []int
	for n > 0 {
		part := 1 + f.rand.IntN(min(n, most))
		parts = append(parts, part)
		n -= part
	}
	return parts
}

// blocks returns KV blocks for the given number of positions, filled with NaN: nothing may be read before it is
// stored.
func (f *field) blocks(shape kernel.AttnShape, positions int) [][]float32 {
	var blocks [][]float32
	for range (positions + model.BlockTokens - 1) / model.BlockTokens {
		b := f.zeros(shape.Layers * 2 * model.BlockTokens * shape.KVHeads * shape.Dim)
		for i := range b {
			b[i] = float32(math.NaN())
		}
		blocks = append(blocks, b)
	}
	return blocks
}

// shape draws a shape of attention: the head dimensions of real models, small ones and odd ones.
func shape(rt *rapid.T) kernel.AttnShape {
	s := kernel.AttnShape{
		Layers:  rapid.IntRange(1, 2).Draw(rt, "layers"),
		KVHeads: rapid.IntRange(1, 3).Draw(rt, "kv heads"),
		Dim:     dim(rt),
	}
	s.Heads = s.KVHeads * rapid.IntRange(1, 5).Draw(rt, "group")
	return s
}

func dim(rt *rapid.T) int {
	return rapid.OneOf(rapid.SampledFrom([]int{8, 16, 32, 64, 72, 80, 96, 128}), rapid.IntRange(1, 150)).Draw(rt, "dim")
}

// narrow rounds to the nearest bfloat16, ties to even.
func narrow(v float32) model.BF16 {
	bits := math.Float32bits(v)
	return model.BF16((bits + 0x7fff + bits>>16&1) >> 16)
}

// equal fails unless a and b are bit-equal (all NaN being alike).
func equal(rt *rapid.T, what string, a, b []float32) {
	rt.Helper()
	if len(a) != len(b) {
		rt.Fatalf("%s: %d and %d elements", what, len(a), len(b))
	}
	for i := range a {
		if math.Float32bits(a[i]) != math.Float32bits(b[i]) && (a[i] == a[i] || b[i] == b[i]) {
			rt.Fatalf("%s: element %d of %d is %v (%#x) and %v (%#x)", what, i, len(a),
				a[i], math.Float32bits(a[i]), b[i], math.Float32bits(b[i]))
		}
	}
}

// near fails unless got differs from want by at most tolerance(i), elementwise.
func near(rt *rapid.T, what string, got, want []float32, tolerance func(i int) float64) {
	rt.Helper()
	if len(got) != len(want) {
		rt.Fatalf("%s: %d and %d elements", what, len(got), len(want))
	}
	for i := range got {
		if d := math.Abs(float64(got[i]) - float64(want[i])); !(d <= tolerance(i)) {
			rt.Fatalf("%s: element %d of %d is %v, want %v within %g", what, i, len(got), got[i], want[i], tolerance(i))
		}
	}
}
