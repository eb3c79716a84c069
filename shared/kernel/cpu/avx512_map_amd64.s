#include "go_asm.h"
#include "textflag.h"
#include "constants_amd64.h"
#include "avx512_amd64.h"

// Elementwise functions. Registers in all of them: CX elements left, K1 the lanes in use.

// LANES sets K1 to the lanes of the next sixteen elements.
#define LANES \
	MOVQ    $16, DX     \
	CMPQ    CX, DX      \
	CMOVQLT CX, DX      \
	MOVL    $0xffff, AX \
	BZHIL   DX, AX, AX  \
	KMOVW   AX, K1

// func expAVX512(dst, src *float32, n int, shift float32)
TEXT ·expAVX512(SB), NOSPLIT, $0-28
	MOVQ         dst+0(FP), DI
	MOVQ         src+8(FP), SI
	MOVQ         n+16(FP), CX
	VBROADCASTSS shift+24(FP), Z8
	JMP          more

loop:
	LANES
	VMOVUPS.Z (SI), K1, Z0
	VSUBPS    Z8, Z0, Z0
	EXP(Z0, Z1, Z2, Z3)
	VMOVUPS Z0, K1, (DI)
	ADDQ    $64, SI
	ADDQ    $64, DI
	SUBQ    $16, CX

more:
	CMPQ CX, $0
	JG   loop
	VZEROUPPER
	RET

// func siluMulAVX512(gate, up *float32, n int)
TEXT ·siluMulAVX512(SB), NOSPLIT, $0-24
	MOVQ         gate+0(FP), DI
	MOVQ         up+8(FP), SI
	MOVQ         n+16(FP), CX
	VBROADCASTSS ONE, Z8
	VXORPS       Z9, Z9, Z9
	JMP          more

loop:
	LANES
	VMOVUPS.Z (DI), K1, Z4
	VMOVUPS.Z (SI), K1, Z5
	VSUBPS    Z4, Z9, Z0
	EXP(Z0, Z1, Z2, Z3)
	VADDPS  Z8, Z0, Z0
	VDIVPS  Z0, Z4, Z0
	VMULPS  Z5, Z0, Z0
	VMOVUPS Z0, K1, (DI)
	ADDQ    $64, SI
	ADDQ    $64, DI
	SUBQ    $16, CX

more:
	CMPQ CX, $0
	JG   loop
	VZEROUPPER
	RET

// func geluAVX512(x *float32, n int)
TEXT ·geluAVX512(SB), NOSPLIT, $0-16
	MOVQ         x+0(FP), DI
	MOVQ         n+8(FP), CX
	VBROADCASTSS ONE, Z8
	VXORPS       Z9, Z9, Z9
	JMP          more

loop:
	LANES
	VMOVUPS.Z (DI), K1, Z4
	VMOVAPS   Z4, Z5
	VPSLLD    $1, Z5, Z5
	VPSRLD           $1, Z5, Z5         // a = |x|
	VBROADCASTSS SLOPE, Z6
	VFMADD213PS  Z8, Z5, Z6
	VDIVPS           Z6, Z8, Z6         // t = 1/(1+slope*a)
	VBROADCASTSS     TAIL9, Z7
	VFMADD213PS.BCST TAIL8, Z6, Z7
	VFMADD213PS.BCST TAIL7, Z6, Z7
	VFMADD213PS.BCST TAIL6, Z6, Z7
	VFMADD213PS.BCST TAIL5, Z6, Z7
	VFMADD213PS.BCST TAIL4, Z6, Z7
	VFMADD213PS.BCST TAIL3, Z6, Z7
	VFMADD213PS.BCST TAIL2, Z6, Z7
	VFMADD213PS.BCST TAIL1, Z6, Z7
	VMULPS           Z6, Z7, Z7
	VMULPS.BCST      HALF, Z5, Z0
	VMULPS           Z5, Z0, Z0
	VSUBPS           Z0, Z9, Z0
	EXP(Z0, Z1, Z2, Z3)
	VMULPS       Z0, Z7, Z7
	VMAXPS       Z4, Z9, Z4
	VFNMADD231PS Z7, Z5, Z4
	VMOVUPS      Z4, K1, (DI)
	ADDQ         $64, DI
	SUBQ         $16, CX

more:
	CMPQ CX, $0
	JG   loop
	VZEROUPPER
	RET

// func geluTanhAVX512(x *float32, n int)
TEXT ·geluTanhAVX512(SB), NOSPLIT, $0-16
	MOVQ         x+0(FP), DI
	MOVQ         n+8(FP), CX
	VBROADCASTSS ONE, Z8
	VBROADCASTSS TANH1, Z9
	JMP          more

loop:
	LANES
	VMOVUPS.Z    (DI), K1, Z4
	VMULPS       Z4, Z4, Z5
	VBROADCASTSS TANH3, Z0
	VFMADD213PS  Z9, Z5, Z0
	VMULPS       Z4, Z0, Z0
	EXP(Z0, Z1, Z2, Z3)
	VADDPS  Z8, Z0, Z0
	VDIVPS  Z0, Z4, Z0
	VMOVUPS Z0, K1, (DI)
	ADDQ    $64, DI
	SUBQ    $16, CX

more:
	CMPQ CX, $0
	JG   loop
	VZEROUPPER
	RET

// func normalizeAVX512(out, x, weight, bias *float32, n int, mean, scale float32)
TEXT ·normalizeAVX512(SB), NOSPLIT, $0-48
	MOVQ         out+0(FP), DI
	MOVQ         x+8(FP), SI
	MOVQ         weight+16(FP), R8
	MOVQ         bias+24(FP), R9
	MOVQ         n+32(FP), CX
	VBROADCASTSS mean+40(FP), Z8
	VBROADCASTSS scale+44(FP), Z9
	VXORPS       Z2, Z2, Z2
	XORQ         BX, BX
	JMP          more

loop:
	LANES
	VMOVUPS.Z (SI)(BX*1), K1, Z0
	VMOVUPS.Z (R8)(BX*1), K1, Z1
	TESTQ     R9, R9
	JZ        unbiased
	VMOVUPS.Z (R9)(BX*1), K1, Z2

unbiased:
	VSUBPS      Z8, Z0, Z0
	VMULPS      Z9, Z0, Z0
	VFMADD213PS Z2, Z1, Z0
	VMOVUPS     Z0, K1, (DI)(BX*1)
	ADDQ        $64, BX
	SUBQ        $16, CX

more:
	CMPQ CX, $0
	JG   loop
	VZEROUPPER
	RET

// func sumAVX512(x *float32, n int) float32
TEXT ·sumAVX512(SB), NOSPLIT, $0-20
	MOVQ   x+0(FP), SI
	MOVQ   n+8(FP), CX
	VXORPS Z0, Z0, Z0
	JMP    more

loop:
	LANES
	VMOVUPS.Z (SI), K1, Z1
	VADDPS    Z1, Z0, Z0
	ADDQ      $64, SI
	SUBQ      $16, CX

more:
	CMPQ CX, $0
	JG   loop
	FOLD_ONE
	VMOVSS X0, ret+16(FP)
	VZEROUPPER
	RET

// func squaresAVX512(x *float32, n int, mean float32) float32
TEXT ·squaresAVX512(SB), NOSPLIT, $0-28
	MOVQ         x+0(FP), SI
	MOVQ         n+8(FP), CX
	VBROADCASTSS mean+16(FP), Z8
	VXORPS       Z0, Z0, Z0
	JMP          more

loop:
	LANES
	VMOVUPS.Z   (SI), K1, Z1
	VSUBPS.Z    Z8, Z1, K1, Z1
	VFMADD231PS Z1, Z1, Z0
	ADDQ        $64, SI
	SUBQ        $16, CX

more:
	CMPQ CX, $0
	JG   loop
	FOLD_ONE
	VMOVSS X0, ret+24(FP)
	VZEROUPPER
	RET
