#include "go_asm.h"
#include "textflag.h"
#include "constants_amd64.h"
#include "avx2_amd64.h"

// MASKED adds the products of the query in Y8 and Y9 with 16 elements of a key at ptr+BX, masked by Y14 and Y15.
#define MASKED(ptr, a, b) \
	VMASKMOVPS  (ptr)(BX*1), Y14, Y10   \
	VMASKMOVPS  32(ptr)(BX*1), Y15, Y11 \
	VFMADD231PS Y10, Y8, a              \
	VFMADD231PS Y11, Y9, b

// func scoresAVX2(s, q, k *float32, stride, dim, n int, scale float32)
//
// Registers: SI q; R10 to R13 four keys, the last key again when fewer are left; DX bytes from one key to the next;
// R9 the last key; BX bytes into a key, CX the end of whole sixteens; Y14, Y15 the lanes of the rest, AX not zero when
// there are any.
TEXT ·scoresAVX2(SB), NOSPLIT, $0-52
	MOVQ s+0(FP), DI
	MOVQ q+8(FP), SI
	MOVQ k+16(FP), R10
	MOVQ stride+24(FP), DX
	SHLQ $2, DX
	MOVQ dim+32(FP), CX
	MOVQ CX, AX
	ANDQ $15, AX
	SUBQ AX, CX
	SHLQ $2, CX
	MASKS(AX, R8)
	MOVQ         n+40(FP), R9
	DECQ         R9
	IMULQ        DX, R9
	ADDQ         R10, R9
	VBROADCASTSS scale+48(FP), X13

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
	ZERO
	XORQ    BX, BX
	CMPQ    BX, CX
	JGE     tail

loop:
	VMOVUPS     (SI)(BX*1), Y8
	VMOVUPS     32(SI)(BX*1), Y9
	VFMADD231PS (R10)(BX*1), Y8, Y0
	VFMADD231PS 32(R10)(BX*1), Y9, Y1
	VFMADD231PS (R11)(BX*1), Y8, Y2
	VFMADD231PS 32(R11)(BX*1), Y9, Y3
	VFMADD231PS (R12)(BX*1), Y8, Y4
	VFMADD231PS 32(R12)(BX*1), Y9, Y5
	VFMADD231PS (R13)(BX*1), Y8, Y6
	VFMADD231PS 32(R13)(BX*1), Y9, Y7
	ADDQ        $64, BX
	CMPQ        BX, CX
	JLT         loop

tail:
	TESTQ      AX, AX
	JZ         fold
	VMASKMOVPS (SI)(BX*1), Y14, Y8
	VMASKMOVPS 32(SI)(BX*1), Y15, Y9
	MASKED(R10, Y0, Y1)
	MASKED(R11, Y2, Y3)
	MASKED(R12, Y4, Y5)
	MASKED(R13, Y6, Y7)

fold:
	FOLD
	VMULPS  X13, X0, X0
	VMOVUPS X0, (DI)
	ADDQ    $16, DI
	LEAQ    (R10)(DX*4), R10
	CMPQ    R10, R9
	JLS     next
	VZEROUPPER
	RET

// func softmaxAVX2(queries *query, count, n int)
TEXT ·softmaxAVX2(SB), NOSPLIT, $0-24
	MOVQ queries+0(FP), DI
	MOVQ count+8(FP), SI
	MOVQ n+16(FP), CX
	MASKS(CX, R8)

next:
	VMOVUPS query_s(DI), Y4
	VMOVUPS query_s+32(DI), Y5

	// The largest of top and the scores.
	VBROADCASTSS query_top(DI), Y6
	VBLENDVPS    Y14, Y4, Y6, Y0
	VBLENDVPS    Y15, Y5, Y6, Y1
	VMAXPS       Y1, Y0, Y0
	VEXTRACTF128 $1, Y0, X1
	VMAXPS       X1, X0, X0
	VPERMILPS    $0x4e, X0, X1
	VMAXPS       X1, X0, X0
	VPERMILPS    $0xb1, X0, X1
	VMAXPS       X1, X0, X0
	VMAXPS       X6, X0, X0
	VMOVSS       X0, query_top(DI)
	VBROADCASTSS X0, Y7

	VSUBPS Y7, Y6, Y6
	EXP(Y6, Y1, Y2, Y3)
	VSUBPS Y7, Y4, Y4
	EXP(Y4, Y1, Y2, Y3)
	VSUBPS Y7, Y5, Y5
	EXP(Y5, Y1, Y2, Y3)
	VANDPS  Y14, Y4, Y0
	VANDPS  Y15, Y5, Y1
	VMOVUPS Y0, query_s(DI)
	VMOVUPS Y1, query_s+32(DI)
	FOLD_ONE
	VFMADD231SS query_total(DI), X6, X0
	VMOVSS      X0, query_total(DI)
	VMOVSS      X6, query_decay(DI)
	ADDQ        $query__size, DI
	DECQ        SI
	JNZ         next
	VZEROUPPER
	RET

// func accumulateAVX2(acc, v *float32, stride, dim int, p *float32, n int, decay float32)
//
// Registers: DI acc, SI v, DX bytes from one row of v to the next, R8 p, CX n, R9 elements left, R10 the row, BX j.
TEXT ·accumulateAVX2(SB), NOSPLIT, $0-52
	MOVQ         acc+0(FP), DI
	MOVQ         v+8(FP), SI
	MOVQ         stride+16(FP), DX
	SHLQ         $2, DX
	MOVQ         dim+24(FP), R9
	MOVQ         p+32(FP), R8
	MOVQ         n+40(FP), CX
	VBROADCASTSS decay+48(FP), Y13
	CMPQ         R9, $64
	JLT          narrow

wide:
	VMULPS (DI), Y13, Y0
	VMULPS 32(DI), Y13, Y1
	VMULPS 64(DI), Y13, Y2
	VMULPS 96(DI), Y13, Y3
	VMULPS 128(DI), Y13, Y4
	VMULPS 160(DI), Y13, Y5
	VMULPS 192(DI), Y13, Y6
	VMULPS 224(DI), Y13, Y7
	MOVQ   SI, R10
	XORQ   BX, BX
	JMP    wideMore

wideLoop:
	VBROADCASTSS (R8)(BX*4), Y8
	VFMADD231PS  (R10), Y8, Y0
	VFMADD231PS  32(R10), Y8, Y1
	VFMADD231PS  64(R10), Y8, Y2
	VFMADD231PS  96(R10), Y8, Y3
	VFMADD231PS  128(R10), Y8, Y4
	VFMADD231PS  160(R10), Y8, Y5
	VFMADD231PS  192(R10), Y8, Y6
	VFMADD231PS  224(R10), Y8, Y7
	ADDQ         DX, R10
	INCQ         BX

wideMore:
	CMPQ    BX, CX
	JLT     wideLoop
	VMOVUPS Y0, (DI)
	VMOVUPS Y1, 32(DI)
	VMOVUPS Y2, 64(DI)
	VMOVUPS Y3, 96(DI)
	VMOVUPS Y4, 128(DI)
	VMOVUPS Y5, 160(DI)
	VMOVUPS Y6, 192(DI)
	VMOVUPS Y7, 224(DI)
	ADDQ    $256, DI
	ADDQ    $256, SI
	SUBQ    $64, R9
	CMPQ    R9, $64
	JGE     wide

narrow:
	CMPQ   R9, $16
	JLT    rest
	VMULPS (DI), Y13, Y0
	VMULPS 32(DI), Y13, Y1
	MOVQ   SI, R10
	XORQ   BX, BX
	JMP    narrowMore

narrowLoop:
	VBROADCASTSS (R8)(BX*4), Y8
	VFMADD231PS  (R10), Y8, Y0
	VFMADD231PS  32(R10), Y8, Y1
	ADDQ         DX, R10
	INCQ         BX

narrowMore:
	CMPQ    BX, CX
	JLT     narrowLoop
	VMOVUPS Y0, (DI)
	VMOVUPS Y1, 32(DI)
	ADDQ    $64, DI
	ADDQ    $64, SI
	SUBQ    $16, R9
	JMP     narrow

rest:
	TESTQ R9, R9
	JZ    done
	MASKS(R9, R10)
	VMASKMOVPS (DI), Y14, Y0
	VMASKMOVPS 32(DI), Y15, Y1
	VMULPS     Y13, Y0, Y0
	VMULPS     Y13, Y1, Y1
	XORQ       BX, BX
	JMP        restMore

restLoop:
	VBROADCASTSS (R8)(BX*4), Y8
	VMASKMOVPS   (SI), Y14, Y10
	VMASKMOVPS   32(SI), Y15, Y11
	VFMADD231PS  Y10, Y8, Y0
	VFMADD231PS  Y11, Y8, Y1
	ADDQ         DX, SI
	INCQ         BX

restMore:
	CMPQ       BX, CX
	JLT        restLoop
	VMASKMOVPS Y0, Y14, (DI)
	VMASKMOVPS Y1, Y15, 32(DI)

done:
	VZEROUPPER
	RET
