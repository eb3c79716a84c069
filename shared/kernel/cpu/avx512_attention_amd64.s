#include "go_asm.h"
#include "textflag.h"
#include "constants_amd64.h"
#include "avx512_amd64.h"

// func scoresAVX512(s, q, k *float32, stride, dim, n int, scale float32)
//
// Registers: SI q; R10 to R13 four keys, the last key again when fewer are left; DX bytes from one key to the next;
// R9 the last key; BX bytes into a key, CX the end of whole sixteens; K1 the lanes of the rest, AX their number.
TEXT ·scoresAVX512(SB), NOSPLIT, $0-52
	MOVQ         s+0(FP), DI
	MOVQ         q+8(FP), SI
	MOVQ         k+16(FP), R10
	MOVQ         stride+24(FP), DX
	SHLQ         $2, DX
	MOVQ         dim+32(FP), CX
	MOVQ         CX, AX
	ANDQ         $15, AX
	SUBQ         AX, CX
	SHLQ         $2, CX
	MOVL         $0xffff, R8
	BZHIL        AX, R8, R8
	KMOVW        R8, K1
	MOVQ         n+40(FP), R9
	DECQ         R9
	IMULQ        DX, R9
	ADDQ         R10, R9
	VBROADCASTSS scale+48(FP), X30
	VMOVUPS      ·quarters(SB), X31

next:
	LEAQ    (R10)(DX*1), R11
	CMPQ    R11, R9
	CMOVQHI R9, R11
	LEAQ    (R10)(DX*2), R12
	CMPQ    R12, R9
	CMOVQHI R9, R12
	LEAQ    (R12)(DX*1), R13
	CMPQ    R13, R9
	CMOVQHI R9, R13
	VXORPS  Z0, Z0, Z0
	VXORPS  Z1, Z1, Z1
	VXORPS  Z2, Z2, Z2
	VXORPS  Z3, Z3, Z3
	XORQ    BX, BX
	CMPQ    BX, CX
	JGE     tail

loop:
	VMOVUPS     (SI)(BX*1), Z20
	VFMADD231PS (R10)(BX*1), Z20, Z0
	VFMADD231PS (R11)(BX*1), Z20, Z1
	VFMADD231PS (R12)(BX*1), Z20, Z2
	VFMADD231PS (R13)(BX*1), Z20, Z3
	ADDQ        $64, BX
	CMPQ        BX, CX
	JLT         loop

tail:
	TESTQ       AX, AX
	JZ          fold
	VMOVUPS.Z   (SI)(BX*1), K1, Z20
	VMOVUPS.Z   (R10)(BX*1), K1, Z16
	VMOVUPS.Z   (R11)(BX*1), K1, Z17
	VMOVUPS.Z   (R12)(BX*1), K1, Z18
	VMOVUPS.Z   (R13)(BX*1), K1, Z19
	VFMADD231PS Z16, Z20, Z0
	VFMADD231PS Z17, Z20, Z1
	VFMADD231PS Z18, Z20, Z2
	VFMADD231PS Z19, Z20, Z3

fold:
	FOLD(Z0, Z1, Z2, Z3, Z31, Z28, Z29)
	VMULPS  X30, X0, X0
	VMOVUPS X0, (DI)
	ADDQ    $16, DI
	LEAQ    (R10)(DX*4), R10
	CMPQ    R10, R9
	JLS     next
	VZEROUPPER
	RET

// func softmaxAVX512(queries *query, count, n int)
TEXT ·softmaxAVX512(SB), NOSPLIT, $0-24
	MOVQ  queries+0(FP), DI
	MOVQ  count+8(FP), SI
	MOVQ  n+16(FP), CX
	MOVL  $0xffff, AX
	BZHIL CX, AX, AX
	KMOVW AX, K1

next:
	VMOVUPS.Z query_s(DI), K1, Z4

	// The largest of top and the scores.
	VBROADCASTSS  query_top(DI), Z5
	VMOVAPS       Z5, Z0
	VMAXPS        Z4, Z5, K1, Z0
	VEXTRACTF64X4 $1, Z0, Y1
	VMAXPS        Y1, Y0, Y0
	VEXTRACTF128  $1, Y0, X1
	VMAXPS        X1, X0, X0
	VPERMILPS     $0x4e, X0, X1
	VMAXPS        X1, X0, X0
	VPERMILPS     $0xb1, X0, X1
	VMAXPS        X1, X0, X0
	VMOVSS        X0, query_top(DI)
	VBROADCASTSS  X0, Z6

	VSUBPS Z6, Z5, Z5
	EXP(Z5, Z1, Z2, Z3)
	VSUBPS Z6, Z4, Z4
	EXP(Z4, Z1, Z2, Z3)
	VMOVAPS.Z Z4, K1, Z0
	VMOVUPS   Z0, query_s(DI)
	FOLD_ONE
	VFMADD231SS query_total(DI), X5, X0
	VMOVSS      X0, query_total(DI)
	VMOVSS      X5, query_decay(DI)
	ADDQ        $query__size, DI
	DECQ        SI
	JNZ         next
	VZEROUPPER
	RET

// func accumulateAVX512(acc, v *float32, stride, dim int, p *float32, n int, decay float32)
//
// Registers: DI acc, SI v, DX bytes from one row of v to the next, R8 p, CX n, R9 elements left, R10 the row, BX j.
TEXT ·accumulateAVX512(SB), NOSPLIT, $0-52
	MOVQ         acc+0(FP), DI
	MOVQ         v+8(FP), SI
	MOVQ         stride+16(FP), DX
	SHLQ         $2, DX
	MOVQ         dim+24(FP), R9
	MOVQ         p+32(FP), R8
	MOVQ         n+40(FP), CX
	VBROADCASTSS decay+48(FP), Z31
	CMPQ         R9, $64
	JLT          narrow

wide:
	VMULPS (DI), Z31, Z0
	VMULPS 64(DI), Z31, Z1
	VMULPS 128(DI), Z31, Z2
	VMULPS 192(DI), Z31, Z3
	MOVQ   SI, R10
	XORQ   BX, BX
	JMP    wideMore

wideLoop:
	VBROADCASTSS (R8)(BX*4), Z4
	VFMADD231PS  (R10), Z4, Z0
	VFMADD231PS  64(R10), Z4, Z1
	VFMADD231PS  128(R10), Z4, Z2
	VFMADD231PS  192(R10), Z4, Z3
	ADDQ         DX, R10
	INCQ         BX

wideMore:
	CMPQ    BX, CX
	JLT     wideLoop
	VMOVUPS Z0, (DI)
	VMOVUPS Z1, 64(DI)
	VMOVUPS Z2, 128(DI)
	VMOVUPS Z3, 192(DI)
	ADDQ    $256, DI
	ADDQ    $256, SI
	SUBQ    $64, R9
	CMPQ    R9, $64
	JGE     wide

narrow:
	CMPQ      R9, $0
	JLE       done
	MOVQ      $16, AX
	CMPQ      R9, AX
	CMOVQLT   R9, AX
	MOVL      $0xffff, BX
	BZHIL     AX, BX, BX
	KMOVW     BX, K1
	VMOVUPS.Z (DI), K1, Z0
	VMULPS    Z31, Z0, Z0
	MOVQ      SI, R10
	XORQ      BX, BX
	JMP       narrowMore

narrowLoop:
	VBROADCASTSS (R8)(BX*4), Z4
	VMOVUPS.Z    (R10), K1, Z5
	VFMADD231PS  Z5, Z4, Z0
	ADDQ         DX, R10
	INCQ         BX

narrowMore:
	CMPQ    BX, CX
	JLT     narrowLoop
	VMOVUPS Z0, K1, (DI)
	ADDQ    $64, DI
	ADDQ    $64, SI
	SUBQ    $16, R9
	JMP     narrow

done:
	VZEROUPPER
	RET
