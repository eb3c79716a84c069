#include "go_asm.h"
#include "textflag.h"
#include "avx2_amd64.h"

// WEIGHTS widens 16 bfloat16 at mem and mem+16 to Y8 and Y9.
#define WEIGHTS(low, high) \
	VPMOVZXWD low, Y8     \
	VPMOVZXWD high, Y9    \
	VPSLLD    $16, Y8, Y8 \
	VPSLLD    $16, Y9, Y9

// func tileAVX2(t *tile)
//
// The sixteen registers hold four rows of x with one row of w at a time. Registers: AX t; SI, DI, R8, R9 rows of x;
// R10 the row of w; BX bytes into it (half of those into a row of x); DX bytes from one row of w to the next; CX where
// to prefetch, four rows on; R11 bytes into the outputs, R12 their end; R13 the row of wTail.
TEXT ·tileAVX2(SB), NOSPLIT, $8-8
	MOVQ t+0(FP), AX
	MOVQ tile_w(AX), R10
	MOVQ tile_wTail(AX), R13
	MOVQ tile_stride(AX), DX
	SHLQ $1, DX
	MOVQ tile_blocks(AX), CX
	SHLQ $5, CX
	MOVQ CX, end-8(SP)
	XORQ R11, R11
	MOVQ tile_tiles(AX), R12
	SHLQ $4, R12

next:
	MOVQ tile_x+0(AX), SI
	MOVQ tile_x+24(AX), DI
	MOVQ tile_x+48(AX), R8
	MOVQ tile_x+72(AX), R9
	ZERO
	XORQ BX, BX
	CMPQ BX, end-8(SP)
	JGE  tail

loop:
	TESTQ      $32, BX
	JNZ        fetched
	LEAQ       (BX)(DX*4), CX
	PREFETCHT1 (R10)(CX*1)

fetched:
	WEIGHTS((R10)(BX*1), 16(R10)(BX*1))
	VFMADD231PS (SI)(BX*2), Y8, Y0
	VFMADD231PS 32(SI)(BX*2), Y9, Y1
	VFMADD231PS (DI)(BX*2), Y8, Y2
	VFMADD231PS 32(DI)(BX*2), Y9, Y3
	VFMADD231PS (R8)(BX*2), Y8, Y4
	VFMADD231PS 32(R8)(BX*2), Y9, Y5
	VFMADD231PS (R9)(BX*2), Y8, Y6
	VFMADD231PS 32(R9)(BX*2), Y9, Y7
	ADDQ        $32, BX
	CMPQ        BX, end-8(SP)
	JLT         loop

tail:
	MOVQ  tile_xTail(AX), SI
	TESTQ SI, SI
	JZ    fold
	WEIGHTS((R13), 16(R13))
	ADDQ        $32, R13
	VFMADD231PS (SI), Y8, Y0
	VFMADD231PS 32(SI), Y9, Y1
	VFMADD231PS 64(SI), Y8, Y2
	VFMADD231PS 96(SI), Y9, Y3
	VFMADD231PS 128(SI), Y8, Y4
	VFMADD231PS 160(SI), Y9, Y5
	VFMADD231PS 192(SI), Y8, Y6
	VFMADD231PS 224(SI), Y9, Y7

fold:
	FOLD
	MOVQ       tile_out+0(AX), SI
	MOVQ       tile_out+24(AX), DI
	MOVQ       tile_out+48(AX), R8
	MOVQ       tile_out+72(AX), R9
	VMOVSS     X0, (SI)(R11*1)
	VEXTRACTPS $1, X0, (DI)(R11*1)
	VEXTRACTPS $2, X0, (R8)(R11*1)
	VEXTRACTPS $3, X0, (R9)(R11*1)
	ADDQ       DX, R10
	ADDQ       $4, R11
	CMPQ       R11, R12
	JLT        next
	VZEROUPPER
	RET

// TWO adds the products of two rows of x, in Y8 and Y9 and in Y12 and Y13, with 16 weights at low and high.
#define TWO(low, high, a, b, c, d) \
	VPMOVZXWD   low, Y10      \
	VPMOVZXWD   high, Y11     \
	VPSLLD      $16, Y10, Y10 \
	VPSLLD      $16, Y11, Y11 \
	VFMADD231PS Y10, Y8, a    \
	VFMADD231PS Y11, Y9, b    \
	VFMADD231PS Y10, Y12, c   \
	VFMADD231PS Y11, Y13, d

// func pairAVX2(t *tile)
//
// Two rows of x with two rows of w at a time. Registers: AX t; SI, DI rows of x; R10, R11 rows of w; BX bytes into them
// (half of those into a row of x), CX its end; DX bytes from one row of w to the next; R8 bytes into the outputs, R9
// their end; R12 where to prefetch, four rows on; R13 the rows of wTail.
TEXT ·pairAVX2(SB), NOSPLIT, $0-8
	MOVQ t+0(FP), AX
	MOVQ tile_w(AX), R10
	MOVQ tile_wTail(AX), R13
	MOVQ tile_stride(AX), DX
	SHLQ $1, DX
	LEAQ (R10)(DX*1), R11
	MOVQ tile_blocks(AX), CX
	SHLQ $5, CX
	XORQ R8, R8
	MOVQ tile_tiles(AX), R9
	SHLQ $4, R9

next:
	MOVQ tile_x+0(AX), SI
	MOVQ tile_x+24(AX), DI
	ZERO
	XORQ BX, BX
	CMPQ BX, CX
	JGE  tail

loop:
	TESTQ      $32, BX
	JNZ        fetched
	LEAQ       (BX)(DX*4), R12
	PREFETCHT1 (R10)(R12*1)
	PREFETCHT1 (R11)(R12*1)

fetched:
	VMOVUPS (SI)(BX*2), Y8
	VMOVUPS 32(SI)(BX*2), Y9
	VMOVUPS (DI)(BX*2), Y12
	VMOVUPS 32(DI)(BX*2), Y13
	TWO((R10)(BX*1), 16(R10)(BX*1), Y0, Y1, Y2, Y3)
	TWO((R11)(BX*1), 16(R11)(BX*1), Y4, Y5, Y6, Y7)
	ADDQ $32, BX
	CMPQ BX, CX
	JLT  loop

tail:
	MOVQ    tile_xTail(AX), SI
	TESTQ   SI, SI
	JZ      fold
	VMOVUPS (SI), Y8
	VMOVUPS 32(SI), Y9
	VMOVUPS 64(SI), Y12
	VMOVUPS 96(SI), Y13
	TWO((R13), 16(R13), Y0, Y1, Y2, Y3)
	TWO(32(R13), 48(R13), Y4, Y5, Y6, Y7)
	ADDQ $64, R13

fold:
	FOLD
	VPERMILPS $0xd8, X0, X0
	MOVQ      tile_out+0(AX), SI
	MOVQ      tile_out+24(AX), DI
	VMOVLPS   X0, (SI)(R8*1)
	VMOVHPS   X0, (DI)(R8*1)
	LEAQ      (R10)(DX*2), R10
	LEAQ      (R11)(DX*2), R11
	ADDQ      $8, R8
	CMPQ      R8, R9
	JLT       next
	VZEROUPPER
	RET

// MULTIPLY adds the products of the row of x in Y8 and Y9 with 16 weights at low and high.
#define MULTIPLY(low, high, a, b) \
	VPMOVZXWD   low, Y10      \
	VPMOVZXWD   high, Y11     \
	VPSLLD      $16, Y10, Y10 \
	VPSLLD      $16, Y11, Y11 \
	VFMADD231PS Y10, Y8, a    \
	VFMADD231PS Y11, Y9, b

// func rowAVX2(t *tile)
//
// Registers: AX t; SI the row of x; R10 to R13 rows of w; BX bytes into a row of w (half of those into x), CX its end;
// DX bytes from one row of w to the next; DI bytes into the outputs, R8 their end; R9 where to prefetch: the next four
// rows of w.
TEXT ·rowAVX2(SB), NOSPLIT, $0-8
	MOVQ t+0(FP), AX
	MOVQ tile_x+0(AX), SI
	MOVQ tile_w(AX), R10
	MOVQ tile_stride(AX), DX
	SHLQ $1, DX
	LEAQ (R10)(DX*1), R11
	LEAQ (R10)(DX*2), R12
	LEAQ (R11)(DX*2), R13
	MOVQ tile_blocks(AX), CX
	SHLQ $5, CX
	XORQ DI, DI
	MOVQ tile_tiles(AX), R8
	SHLQ $4, R8

next:
	ZERO
	XORQ BX, BX
	CMPQ BX, CX
	JGE  tail

loop:
	TESTQ      $32, BX
	JNZ        fetched
	LEAQ       (BX)(DX*4), R9
	PREFETCHT1 (R10)(R9*1)
	PREFETCHT1 (R11)(R9*1)
	PREFETCHT1 (R12)(R9*1)
	PREFETCHT1 (R13)(R9*1)

fetched:
	VMOVUPS (SI)(BX*2), Y8
	VMOVUPS 32(SI)(BX*2), Y9
	MULTIPLY((R10)(BX*1), 16(R10)(BX*1), Y0, Y1)
	MULTIPLY((R11)(BX*1), 16(R11)(BX*1), Y2, Y3)
	MULTIPLY((R12)(BX*1), 16(R12)(BX*1), Y4, Y5)
	MULTIPLY((R13)(BX*1), 16(R13)(BX*1), Y6, Y7)
	ADDQ $32, BX
	CMPQ BX, CX
	JLT  loop

tail:
	MOVQ    tile_xTail(AX), R9
	TESTQ   R9, R9
	JZ      fold
	VMOVUPS (R9), Y8
	VMOVUPS 32(R9), Y9
	MOVQ    tile_wTail(AX), R9
	MULTIPLY((R9), 16(R9), Y0, Y1)
	MULTIPLY(32(R9), 48(R9), Y2, Y3)
	MULTIPLY(64(R9), 80(R9), Y4, Y5)
	MULTIPLY(96(R9), 112(R9), Y6, Y7)

fold:
	FOLD
	MOVQ    tile_out+0(AX), R9
	VMOVUPS X0, (R9)(DI*1)
	LEAQ    (R10)(DX*4), R10
	LEAQ    (R11)(DX*4), R11
	LEAQ    (R12)(DX*4), R12
	LEAQ    (R13)(DX*4), R13
	ADDQ    $16, DI
	CMPQ    DI, R8
	JLT     next
	VZEROUPPER
	RET
