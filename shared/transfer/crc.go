package transfer

import "hash/crc32"

// combine returns the CRC-32C of one run of bytes followed by another of n bytes from the CRCs a and b of both, where
// shift is power(8*n). A CRC is a remainder modulo the polynomial, so that appending n bytes multiplies it by x^(8n): with
// that the frames of an object may arrive in any order and its own CRC is still known without reading it again. The
// method is zlib's (crc32_combine, Mark Adler), on reflected bits: bit 31 is x^0.
func combine(a, b, shift uint32) uint32 { return multiply(shift, a) ^ b }

// multiply returns a*b modulo the polynomial.
func multiply(a, b uint32) uint32 {
	var p uint32
	for m := uint32(1) << 31; m != 0; m >>= 1 {
		if a&m != 0 {
			p ^= b
		}
		carry := b & 1
		b >>= 1
		if carry != 0 {
			b ^= crc32.Castagnoli
		}
	}
	return p
}

// power returns x^n modulo the polynomial.
func power(n uint64) uint32 {
	result, square := uint32(1)<<31, uint32(1)<<30 // x^0, x^1
	for ; n != 0; n >>= 1 {
		if n&1 != 0 {
			result = multiply(result, square)
		}
		square = multiply(square, square)
	}
	return result
}
