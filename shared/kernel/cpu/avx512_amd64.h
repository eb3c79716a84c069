// EXP is exp32 of x in place. n, p and q are scratch.
#define EXP(x, n, p, q) \
	VBROADCASTSS      EXPMAX, n   \
	VMINPS            x, n, x     \
	VBROADCASTSS      EXPMIN, n   \
	VMAXPS            x, n, x     \
	VMULPS.BCST       LOG2E, x, n \
	VRNDSCALEPS       $8, n, n    \
	VFNMADD231PS.BCST LN2HI, n, x \
	VFNMADD231PS.BCST LN2LO, n, x \
	VBROADCASTSS      EXP6, p     \
	VFMADD213PS.BCST  EXP5, x, p  \
	VFMADD213PS.BCST  EXP4, x, p  \
	VFMADD213PS.BCST  EXP3, x, p  \
	VFMADD213PS.BCST  EXP2, x, p  \
	VMULPS            x, x, q     \
	VFMADD213PS       x, q, p     \
	VADDPS.BCST       ONE, p, p   \
	VCVTPS2DQ         n, n        \
	VPSLLD            $23, n, n   \
	VPADDD.BCST       ONE, n, n   \
	VMULPS            n, p, x

// FOLD_ONE adds up the 16 lanes of Z0, lane i and i+8, then i+4, i+2, i+1, into lane 0. Z1 is scratch.
#define FOLD_ONE \
	VEXTRACTF64X4 $1, Z0, Y1    \
	VADDPS        Y1, Y0, Y0    \
	VEXTRACTF128  $1, Y0, X1    \
	VADDPS        X1, X0, X0    \
	VPERMILPS     $0x4e, X0, X1 \
	VADDPS        X1, X0, X0    \
	VPERMILPS     $0xb1, X0, X1 \
	VADDPS        X1, X0, X0

// FOLD adds up the 16 lanes of a, b, c and d likewise and leaves the four sums in the low quarter of a. pick holds the
// indices 0, 4, 8, 12; s and t are scratch.
#define FOLD(a, b, c, d, pick, s, t) \
	VSHUFF32X4 $0x44, b, a, s \
	VSHUFF32X4 $0xee, b, a, t \
	VADDPS     t, s, a        \
	VSHUFF32X4 $0x44, d, c, s \
	VSHUFF32X4 $0xee, d, c, t \
	VADDPS     t, s, c        \
	VSHUFF32X4 $0x88, c, a, s \
	VSHUFF32X4 $0xdd, c, a, t \
	VADDPS     t, s, a        \
	VPERMILPS  $0x4e, a, s    \
	VADDPS     s, a, a        \
	VPERMILPS  $0xb1, a, s    \
	VADDPS     s, a, a        \
	VPERMPS    a, pick, a
