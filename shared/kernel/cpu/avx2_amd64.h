// EXP is exp32 of x in place. n, p and q are scratch.
#define EXP(x, n, p, q) \
	VBROADCASTSS EXPMAX, n \
	VMINPS       x, n, x   \
	VBROADCASTSS EXPMIN, n \
	VMAXPS       x, n, x   \
	VBROADCASTSS LOG2E, n  \
	VMULPS       n, x, n   \
	VROUNDPS     $8, n, n  \
	VBROADCASTSS LN2HI, q  \
	VFNMADD231PS q, n, x   \
	VBROADCASTSS LN2LO, q  \
	VFNMADD231PS q, n, x   \
	VBROADCASTSS EXP6, p   \
	VBROADCASTSS EXP5, q   \
	VFMADD213PS  q, x, p   \
	VBROADCASTSS EXP4, q   \
	VFMADD213PS  q, x, p   \
	VBROADCASTSS EXP3, q   \
	VFMADD213PS  q, x, p   \
	VBROADCASTSS EXP2, q   \
	VFMADD213PS  q, x, p   \
	VMULPS       x, x, q   \
	VFMADD213PS  x, q, p   \
	VBROADCASTSS ONE, q    \
	VADDPS       q, p, p   \
	VCVTPS2DQ    n, n      \
	VPSLLD       $23, n, n \
	VPADDD       q, n, n   \
	VMULPS       n, p, x

// FOLD_ONE adds up the 16 lanes in Y0 and Y1, lane i and i+8, then i+4, i+2, i+1, into lane 0 of X0.
#define FOLD_ONE \
	VADDPS       Y1, Y0, Y0    \
	VEXTRACTF128 $1, Y0, X1    \
	VADDPS       X1, X0, X0    \
	VPERMILPS    $0x4e, X0, X1 \
	VADDPS       X1, X0, X0    \
	VPERMILPS    $0xb1, X0, X1 \
	VADDPS       X1, X0, X0

// FOLD adds up the 16 lanes in Y0 and Y1, in Y2 and Y3, in Y4 and Y5, in Y6 and Y7 likewise and leaves the four sums
// in X0.
#define FOLD \
	VADDPS       Y1, Y0, Y0        \
	VADDPS       Y3, Y2, Y2        \
	VADDPS       Y5, Y4, Y4        \
	VADDPS       Y7, Y6, Y6        \
	VPERM2F128   $0x20, Y2, Y0, Y1 \
	VPERM2F128   $0x31, Y2, Y0, Y3 \
	VADDPS       Y3, Y1, Y0        \
	VPERM2F128   $0x20, Y6, Y4, Y5 \
	VPERM2F128   $0x31, Y6, Y4, Y7 \
	VADDPS       Y7, Y5, Y4        \
	VUNPCKLPD    Y4, Y0, Y1        \
	VUNPCKHPD    Y4, Y0, Y2        \
	VADDPS       Y2, Y1, Y0        \
	VPERMILPS    $0xb1, Y0, Y1     \
	VADDPS       Y1, Y0, Y0        \
	VEXTRACTF128 $1, Y0, X1        \
	VBLENDPS     $0xa, X1, X0, X0

// ZERO clears the eight accumulators.
#define ZERO \
	VXORPS Y0, Y0, Y0 \
	VXORPS Y1, Y1, Y1 \
	VXORPS Y2, Y2, Y2 \
	VXORPS Y3, Y3, Y3 \
	VXORPS Y4, Y4, Y4 \
	VXORPS Y5, Y5, Y5 \
	VXORPS Y6, Y6, Y6 \
	VXORPS Y7, Y7, Y7

// MASKS sets Y14 and Y15 to the lanes of the first count elements of sixteen. count and base are clobbered.
#define MASKS(count, base) \
	NEGQ    count                 \
	LEAQ    ·masks+64(SB), base   \
	VMOVUPS (base)(count*4), Y14  \
	VMOVUPS 32(base)(count*4), Y15
