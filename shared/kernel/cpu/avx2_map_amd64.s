#include "go_asm.h"
#include "textflag.h"
#include "constants_amd64.h"
#include "avx2_amd64.h"

// Elementwise functions, eight elements at a time, the last ones masked by Y14. CX counts the elements left.

// SILU computes Y0 = Y4 / (1 + exp(-Y4)) * Y5. Y12 is one, Y13 zero.
#define SILU \
	VSUBPS Y4, Y13, Y0  \
	EXP(Y0, Y1, Y2, Y3) \
	VADDPS Y12, Y0, Y0  \
	VDIVPS Y0, Y4, Y0   \
	VMULPS Y5, Y0, Y0

// GELU computes gelu32 of Y4 in place. Y12 is one, Y13 zero.
#define GELU \
	VPSLLD       $1, Y4, Y5   \
	VPSRLD       $1, Y5, Y5   \
	VBROADCASTSS SLOPE, Y6    \
	VFMADD213PS  Y12, Y5, Y6  \
	VDIVPS       Y6, Y12, Y6  \
	VBROADCASTSS TAIL9, Y7    \
	VBROADCASTSS TAIL8, Y8    \
	VFMADD213PS  Y8, Y6, Y7   \
	VBROADCASTSS TAIL7, Y8    \
	VFMADD213PS  Y8, Y6, Y7   \
	VBROADCASTSS TAIL6, Y8    \
	VFMADD213PS  Y8, Y6, Y7   \
	VBROADCASTSS TAIL5, Y8    \
	VFMADD213PS  Y8, Y6, Y7   \
	VBROADCASTSS TAIL4, Y8    \
	VFMADD213PS  Y8, Y6, Y7   \
	VBROADCASTSS TAIL3, Y8    \
	VFMADD213PS  Y8, Y6, Y7   \
	VBROADCASTSS TAIL2, Y8    \
	VFMADD213PS  Y8, Y6, Y7   \
	VBROADCASTSS TAIL1, Y8    \
	VFMADD213PS  Y8, Y6, Y7   \
	VMULPS       Y6, Y7, Y7   \
	VBROADCASTSS HALF, Y0     \
	VMULPS       Y0, Y5, Y0   \
	VMULPS       Y5, Y0, Y0   \
	VSUBPS       Y0, Y13, Y0  \
	EXP(Y0, Y1, Y2, Y3)       \
	VMULPS       Y0, Y7, Y7   \
	VMAXPS       Y4, Y13, Y4  \
	VFNMADD231PS Y7, Y5, Y4

// GELUTANH computes geluTanh32 of Y4 in place. Y12 is one.
#define GELUTANH \
	VMULPS       Y4, Y4, Y5   \
	VBROADCASTSS TANH3, Y0    \
	VBROADCASTSS TANH1, Y1    \
	VFMADD213PS  Y1, Y5, Y0   \
	VMULPS       Y4, Y0, Y0   \
	EXP(Y0, Y1, Y2, Y3)       \
	VADDPS       Y12, Y0, Y0  \
	VDIVPS       Y0, Y4, Y4

// func expAVX2(dst, src *float32, n int, shift float32)
TEXT ·expAVX2(SB), NOSPLIT, $0-28
	MOVQ         dst+0(FP), DI
	MOVQ         src+8(FP), SI
	MOVQ         n+16(FP), CX
	VBROADCASTSS shift+24(FP), Y8
	JMP          more

loop:
	VMOVUPS (SI), Y0
	VSUBPS  Y8, Y0, Y0
	EXP(Y0, Y1, Y2, Y3)
	VMOVUPS Y0, (DI)
	ADDQ    $32, SI
	ADDQ    $32, DI
	SUBQ    $8, CX

more:
	CMPQ  CX, $8
	JGE   loop
	TESTQ CX, CX
	JZ    done
	MASKS(CX, R10)
	VMASKMOVPS (SI), Y14, Y0
	VSUBPS     Y8, Y0, Y0
	EXP(Y0, Y1, Y2, Y3)
	VMASKMOVPS Y0, Y14, (DI)

done:
	VZEROUPPER
	RET

// func siluMulAVX2(gate, up *float32, n int)
TEXT ·siluMulAVX2(SB), NOSPLIT, $0-24
	MOVQ         gate+0(FP), DI
	MOVQ         up+8(FP), SI
	MOVQ         n+16(FP), CX
	VBROADCASTSS ONE, Y12
	VXORPS       Y13, Y13, Y13
	JMP          more

loop:
	VMOVUPS (DI), Y4
	VMOVUPS (SI), Y5
	SILU
	VMOVUPS Y0, (DI)
	ADDQ    $32, SI
	ADDQ    $32, DI
	SUBQ    $8, CX

more:
	CMPQ  CX, $8
	JGE   loop
	TESTQ CX, CX
	JZ    done
	MASKS(CX, R10)
	VMASKMOVPS (DI), Y14, Y4
	VMASKMOVPS (SI), Y14, Y5
	SILU
	VMASKMOVPS Y0, Y14, (DI)

done:
	VZEROUPPER
	RET

// func geluAVX2(x *float32, n int)
TEXT ·geluAVX2(SB), NOSPLIT, $0-16
	MOVQ         x+0(FP), DI
	MOVQ         n+8(FP), CX
	VBROADCASTSS ONE, Y12
	VXORPS       Y13, Y13, Y13
	JMP          more

loop:
	VMOVUPS (DI), Y4
	GELU
	VMOVUPS Y4, (DI)
	ADDQ    $32, DI
	SUBQ    $8, CX

more:
	CMPQ  CX, $8
	JGE   loop
	TESTQ CX, CX
	JZ    done
	MASKS(CX, R10)
	VMASKMOVPS (DI), Y14, Y4
	GELU
	VMASKMOVPS Y4, Y14, (DI)

done:
	VZEROUPPER
	RET

// func geluTanhAVX2(x *float32, n int)
TEXT ·geluTanhAVX2(SB), NOSPLIT, $0-16
	MOVQ         x+0(FP), DI
	MOVQ         n+8(FP), CX
	VBROADCASTSS ONE, Y12
	VXORPS       Y13, Y13, Y13
	JMP          more

loop:
	VMOVUPS (DI), Y4
	GELUTANH
	VMOVUPS Y4, (DI)
	ADDQ    $32, DI
	SUBQ    $8, CX

more:
	CMPQ  CX, $8
	JGE   loop
	TESTQ CX, CX
	JZ    done
	MASKS(CX, R10)
	VMASKMOVPS (DI), Y14, Y4
	GELUTANH
	VMASKMOVPS Y4, Y14, (DI)

done:
	VZEROUPPER
	RET

// NORMALIZE computes Y0 = (Y0-mean)*scale*Y1 + Y2, the last two fused. Y8 is the mean, Y9 the scale.
#define NORMALIZE \
	VSUBPS      Y8, Y0, Y0 \
	VMULPS      Y9, Y0, Y0 \
	VFMADD213PS Y2, Y1, Y0

// func normalizeAVX2(out, x, weight, bias *float32, n int, mean, scale float32)
TEXT ·normalizeAVX2(SB), NOSPLIT, $0-48
	MOVQ         out+0(FP), DI
	MOVQ         x+8(FP), SI
	MOVQ         weight+16(FP), R8
	MOVQ         bias+24(FP), R9
	MOVQ         n+32(FP), CX
	VBROADCASTSS mean+40(FP), Y8
	VBROADCASTSS scale+44(FP), Y9
	VXORPS       Y2, Y2, Y2
	XORQ         BX, BX
	JMP          more

loop:
	VMOVUPS (SI)(BX*1), Y0
	VMOVUPS (R8)(BX*1), Y1
	TESTQ   R9, R9
	JZ      unbiased
	VMOVUPS (R9)(BX*1), Y2

unbiased:
	NORMALIZE
	VMOVUPS Y0, (DI)(BX*1)
	ADDQ    $32, BX
	SUBQ    $8, CX

more:
	CMPQ  CX, $8
	JGE   loop
	TESTQ CX, CX
	JZ    done
	MASKS(CX, R10)
	VMASKMOVPS (SI)(BX*1), Y14, Y0
	VMASKMOVPS (R8)(BX*1), Y14, Y1
	TESTQ      R9, R9
	JZ         unbiasedRest
	VMASKMOVPS (R9)(BX*1), Y14, Y2

unbiasedRest:
	NORMALIZE
	VMASKMOVPS Y0, Y14, (DI)(BX*1)

done:
	VZEROUPPER
	RET

// func sumAVX2(x *float32, n int) float32
TEXT ·sumAVX2(SB), NOSPLIT, $0-20
	MOVQ   x+0(FP), SI
	MOVQ   n+8(FP), CX
	VXORPS Y0, Y0, Y0
	VXORPS Y1, Y1, Y1
	JMP    more

loop:
	VADDPS (SI), Y0, Y0
	VADDPS 32(SI), Y1, Y1
	ADDQ   $64, SI
	SUBQ   $16, CX

more:
	CMPQ  CX, $16
	JGE   loop
	TESTQ CX, CX
	JZ    fold
	MASKS(CX, R10)
	VMASKMOVPS (SI), Y14, Y2
	VMASKMOVPS 32(SI), Y15, Y3
	VADDPS     Y2, Y0, Y0
	VADDPS     Y3, Y1, Y1

fold:
	FOLD_ONE
	VMOVSS X0, ret+16(FP)
	VZEROUPPER
	RET

// func squaresAVX2(x *float32, n int, mean float32) float32
TEXT ·squaresAVX2(SB), NOSPLIT, $0-28
	MOVQ         x+0(FP), SI
	MOVQ         n+8(FP), CX
	VBROADCASTSS mean+16(FP), Y8
	VXORPS       Y0, Y0, Y0
	VXORPS       Y1, Y1, Y1
	JMP          more

loop:
	VMOVUPS     (SI), Y2
	VMOVUPS     32(SI), Y3
	VSUBPS      Y8, Y2, Y2
	VSUBPS      Y8, Y3, Y3
	VFMADD231PS Y2, Y2, Y0
	VFMADD231PS Y3, Y3, Y1
	ADDQ        $64, SI
	SUBQ        $16, CX

more:
	CMPQ  CX, $16
	JGE   loop
	TESTQ CX, CX
	JZ    fold
	MASKS(CX, R10)
	VMASKMOVPS  (SI), Y14, Y2
	VMASKMOVPS  32(SI), Y15, Y3
	VSUBPS      Y8, Y2, Y2
	VSUBPS      Y8, Y3, Y3
	VANDPS      Y14, Y2, Y2
	VANDPS      Y15, Y3, Y3
	VFMADD231PS Y2, Y2, Y0
	VFMADD231PS Y3, Y3, Y1

fold:
	FOLD_ONE
	VMOVSS X0, ret+24(FP)
	VZEROUPPER
	RET
