package sample

import (
	"math"
	"math/bits"
)

// Uniform returns the random number in [0, 1) that decides token index (from 0) of a choice. It is the upper 53 bits
// of the first 64-bit word of Philox-4x32-10, times 2^-53: key is the seed (low half first), counter is {index,
// choice, 0, 0}, and the word is output 0 as the upper half and output 1 as the lower. Examples:
// Uniform(0, 0, 0) = 0.3990464708489645, Uniform(42, 1, 7) = 0.022253272722070228.
func Uniform(seed uint64, choice, index uint32) float64 {
	out := philox([4]uint32{index, choice, 0, 0}, [2]uint32{uint32(seed), uint32(seed >> 32)})
	return float64((uint64(out[0])<<32|uint64(out[1]))>>11) * 0x1p-53
}

// philox is the counter-based generator Philox-4x32 with 10 rounds (Salmon et al., Parallel random numbers: as easy as
// 1, 2, 3, SC 2011; constants as in Random123).
func philox(ctr [4]uint32, key [2]uint32) [4]uint32 {
	for range 10 {
		hi0, lo0 := bits.Mul32(0xD2511F53, ctr[0])
		hi1, lo1 := bits.Mul32(0xCD9E8D57, ctr[2])
		ctr = [4]uint32{hi1 ^ ctr[1] ^ key[0], lo1, hi0 ^ ctr[3] ^ key[1], lo0}
		key[0] += 0x9E3779B9
		key[1] += 0xBB67AE85
	}
	return ctr
}

// exp returns e^x for x <= 0, within one unit in the last place, and 0 below -708, where results become denormal. It
// is here because math.Exp gives other bits on other processors. The conversions keep the compiler from fusing a
// multiplication with an addition. Range reduction and polynomial are those of FreeBSD's e_exp.c (also in Go's
// math/exp.go): x = k ln2 + r, e^r by a rational approximation.
func exp(x float64) float64 {
	const (
		ln2Hi = 6.93147180369123816490e-01
		ln2Lo = 1.90821492927058770002e-10
		log2e = 1.44269504088896338700e+00
		p1    = 1.66666666666666657415e-01
		p2    = -2.77777777770155933842e-03
		p3    = 6.61375632143793436117e-05
		p4    = -1.65339022054652515390e-06
		p5    = 4.13813679705723846039e-08
	)
	if !(x >= -708) { // NaN too
		return 0
	}
	k := math.Floor(float64(x*log2e) + 0.5)
	hi := x - float64(k*ln2Hi)
	lo := float64(k * ln2Lo)
	r := hi - lo
	t := float64(r * r)
	c := float64(t * p5)
	c = float64(t * (p4 + c))
	c = float64(t * (p3 + c))
	c = float64(t * (p2 + c))
	c = float64(t * (p1 + c))
	c = r - c
	y := 1 - ((lo - float64(r*c)/(2-c)) - hi)
	return y * math.Float64frombits(uint64(int64(k)+1023)<<52)
}
