package cpu

import (
	"math"
	"math/big"
	"testing"

	"pgregory.net/rapid"
)

// float draws any float32 bit pattern, with every exponent as likely.
func float(rt *rapid.T, name string) float32 {
	return math.Float32frombits(rapid.Uint32().Draw(rt, name))
}

func finite(v float32) bool { return !math.IsNaN(float64(v)) && !math.IsInf(float64(v), 0) }

// exact is a*b+c rounded once by math/big, whose Float32 rounds subnormal numbers right too.
func exact(a, b, c float32) float32 {
	x := func(v float32) *big.Float { return new(big.Float).SetPrec(1000).SetFloat64(float64(v)) }
	product := new(big.Float).SetPrec(1000).Mul(x(a), x(b))
	v, _ := product.Add(product, x(c)).Float32()
	return v
}

func TestFMA(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		a, b, c := float(rt, "a"), float(rt, "b"), float(rt, "c")
		if rapid.Bool().Draw(rt, "close") {
			// The sum lies beside the middle between two float32, by less than float64 can tell.
			a = math.Float32frombits(rapid.Uint32Range(0x3f800000, 0x3fffffff).Draw(rt, "a in [1, 2)"))
			b = 1 + 1.0/(1<<23)
			scale := math.Pow(2, float64(rapid.IntRange(-20, 60).Draw(rt, "scale")))
			c = float32(float64(c) / math.Pow(2, math.Floor(math.Log2(math.Abs(float64(c))))) * scale)
		}
		if !finite(a) || !finite(b) || !finite(c) {
			rt.Skip("not finite")
		}
		got, want := fma32(a, b, c), exact(a, b, c)
		if got != want {
			rt.Fatalf("fma(%v, %v, %v) = %v (%#x), want %v (%#x)", a, b, c,
				got, math.Float32bits(got), want, math.Float32bits(want))
		}
	})
}

// TestFMAMiddle has the cases in which rounding to float64 first goes wrong.
func TestFMAMiddle(t *testing.T) {
	tiny := float32(math.Pow(2, -60))
	for _, c := range [][3]float32{
		{1, 1 + 1.0/(1<<12), 0},
		{1 + 1.0/(1<<12), 1 + 1.0/(1<<12), tiny}, // 1 + 2^-11 + 2^-24 + 2^-60: just above the middle
		{1 + 1.0/(1<<12), 1 + 1.0/(1<<12), -tiny},
		{-1 - 1.0/(1<<12), 1 + 1.0/(1<<12), tiny},
		{-1 - 1.0/(1<<12), 1 + 1.0/(1<<12), -tiny},
		{math.SmallestNonzeroFloat32, 0.5, 0},
		{math.SmallestNonzeroFloat32, 0.75, 0},
		{math.SmallestNonzeroFloat32, 1.5, math.SmallestNonzeroFloat32},
		{math.MaxFloat32, 1, math.MaxFloat32 / (1 << 25)},
	} {
		if got, want := fma32(c[0], c[1], c[2]), exact(c[0], c[1], c[2]); got != want {
			t.Errorf("fma%v = %v (%#x), want %v (%#x)", c, got, math.Float32bits(got), want, math.Float32bits(want))
		}
	}
}

// TestExp measures the error in units in the last place, over the range where nothing is clamped.
func TestExp(t *testing.T) {
	var worst float64
	for x := -87.3; x < 88.3; x += 0.00093 {
		v := float32(x)
		want := math.Exp(float64(v))
		ulp := math.Pow(2, math.Floor(math.Log2(want))-23)
		worst = max(worst, math.Abs(float64(exp32(v))-want)/ulp)
	}
	if worst > 1.5 {
		t.Errorf("exp32 is off by up to %.2f units in the last place", worst)
	}
	for _, c := range []struct{ x, want float32 }{
		{0, 1}, {float32(math.Inf(-1)), exp32(-87.33)}, {-1e30, exp32(-87.33)}, {1e30, exp32(88.37)},
	} {
		if got := exp32(c.x); got != c.want || !finite(got) || got <= 0 {
			t.Errorf("exp32(%v) = %v, want %v", c.x, got, c.want)
		}
	}
	if v := exp32(float32(math.NaN())); v == v {
		t.Errorf("exp32(NaN) = %v", v)
	}
}

// TestGELUTail tests that gelu keeps its relative accuracy where 1+erf would cancel.
func TestGELUTail(t *testing.T) {
	for x := -13.0; x < 13; x += 0.0037 {
		v := float64(float32(x))
		want := v * 0.5 * math.Erfc(-v/math.Sqrt2)
		if got := float64(gelu32(float32(x))); math.Abs(got-want) > 1e-5*math.Abs(want) {
			t.Fatalf("gelu32(%v) = %v, want %v", v, got, want)
		}
	}
}
