package cpu

import "math"

// Constants of exp32 and gelu32, by index. The assembly reads this table, so there is one copy of each number.
const (
	cLog2E  = iota // 1/ln 2
	cLn2Hi         // ln 2, the upper bits, so that n*cLn2Hi is exact
	cLn2Lo         // ln 2 - cLn2Hi
	cExpMax        // arguments of exp are clamped to [cExpMin, cExpMax]
	cExpMin
	cExp6   // exp(r) = 1 + r + r^2*(cExp2 + r*(cExp3 + ...)): Chebyshev fit on |r| <= 0.35, error 1e-8
	cExp5   //
	cExp4   //
	cExp3   //
	cExp2   //
	cOne    //
	cNegInf //
	cSlope  // t = 1/(1+cSlope*a)
	cTail9  // Phi(-a) = exp(-a^2/2)*(t*cTail1 + t^2*cTail2 + ...): Chebyshev fit on 0 <= a <= 14, error 1.1e-7
	cTail8  // of itself
	cTail7  //
	cTail6  //
	cTail5  //
	cTail4  //
	cTail3  //
	cTail2  //
	cTail1  //
	cHalf   //
	cTanh1  // -2*sqrt(2/pi)
	cTanh3  // -2*sqrt(2/pi)*0.044715
	constants
)

var table = [constants]float32{
	cLog2E: math.Log2E, cLn2Hi: 0.693359375, cLn2Lo: -2.12194440e-4, cExpMax: 88.37, cExpMin: -87.33,
	cExp6: 0.001392692661, cExp5: 0.008363773874, cExp4: 0.04166655011, cExp3: 0.1666657338, cExp2: 0.5,
	cOne: 1, cNegInf: float32(math.Inf(-1)),
	cSlope: 0.35,
	cTail9: -0.029679522, cTail8: 0.1465458303, cTail7: -0.2609612283, cTail6: 0.1650509959, cTail5: -0.02704660827,
	cTail4: 0.1071145876, cTail3: 0.1194449168, cTail2: 0.1399122981, cTail1: 0.1396187126,
	cHalf: 0.5, cTanh1: -1.59576912161, cTanh3: -0.0713548162726,
}

// fma32 is a*b+c rounded once to float32, as the instruction does it. The product is exact in float64. Rounding the
// sum to float64 and again to float32 goes wrong only if the first rounding lands in the middle between two float32
// numbers, or among the subnormal ones, where the middle is elsewhere.
func fma32(a, b, c float32) float32 {
	p := float64(a) * float64(b)
	s := p + float64(c)
	bits := math.Float64bits(s)
	if bits&(1<<29-1) == 1<<28 || bits<<1 < (1023-126)<<53 {
		return fmaOdd(p, float64(c))
	}
	return float32(s)
}

// fmaOdd rounds p+c to float32 by way of rounding to odd (Boldo and Melquiond, "Emulation of a FMA and correctly
// rounded sums", 2008): if p+c is not a float64, take the neighbour whose last bit is 1.
func fmaOdd(p, c float64) float32 {
	s := p + c
	back := s - p
	err := (p - (s - back)) + (c - back) // Knuth's TwoSum: p+c = s+err exactly
	if bits := math.Float64bits(s); err != 0 && bits&1 == 0 && !math.IsInf(s, 0) {
		if (err > 0) == (s > 0) {
			bits++
		} else {
			bits--
		}
		s = math.Float64frombits(bits)
	}
	return float32(s)
}

// exp32 is e^x to about 2 units in the last place: x = n*ln 2 + r, a polynomial in r, times 2^n. Arguments are clamped
// to [-87.33, 88.37], so the result is never 0 nor infinite; NaN stays NaN.
func exp32(x float32) float32 {
	if table[cExpMax] < x {
		x = table[cExpMax]
	}
	if table[cExpMin] > x {
		x = table[cExpMin]
	}
	n := float32(math.RoundToEven(float64(float32(x * table[cLog2E]))))
	r := fma32(-n, table[cLn2Hi], x)
	r = fma32(-n, table[cLn2Lo], r)
	p := fma32(table[cExp6], r, table[cExp5])
	p = fma32(p, r, table[cExp4])
	p = fma32(p, r, table[cExp3])
	p = fma32(p, r, table[cExp2])
	p = fma32(p, float32(r*r), r)
	p = float32(p + 1)
	if n != n {
		return n
	}
	return float32(p * math.Float32frombits(uint32(int32(n)+127)<<23))
}

// gelu32 is x*Phi(x) = max(x, 0) - |x|*Phi(-|x|), to about 1e-7 of |x|, and to 1e-6 of itself down to where it leaves
// the range of exp32.
func gelu32(x float32) float32 {
	a := math.Float32frombits(math.Float32bits(x) &^ (1 << 31))
	t := float32(1 / fma32(a, table[cSlope], 1))
	q := table[cTail9]
	for _, c := range table[cTail8 : cTail1+1] {
		q = fma32(q, t, c)
	}
	q = float32(q * t)
	q = float32(q * exp32(float32(-a*float32(a*table[cHalf]))))
	if 0 > x {
		x = 0
	}
	return fma32(-a, q, x)
}

// geluTanh32 is x/2*(1+tanh(u)) = x/(1+exp(-2u)) with u = sqrt(2/pi)*(x+0.044715*x^3).
func geluTanh32(x float32) float32 {
	u := float32(fma32(float32(x*x), table[cTanh3], table[cTanh1]) * x)
	return float32(x / float32(1+exp32(u)))
}

// silu32 is x/(1+exp(-x)).
func silu32(x float32) float32 { return float32(x / float32(1+exp32(-x))) }
