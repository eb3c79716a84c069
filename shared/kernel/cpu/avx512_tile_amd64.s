#include "go_asm.h"
#include "textflag.h"
#include "avx512_amd64.h"

// WEIGHTS widens 16 bfloat16 at ptr+BX to z.
#define WEIGHTS(ptr, z) \
	VPMOVZXWD (ptr)(BX*1), z \
	VPSLLD    $16, z, z

#define TAIL_WEIGHTS(offset, z) \
	VPMOVZXWD offset(R10), z \
	VPSLLD    $16, z, z

// MULTIPLY adds the products of the row of x in mem with four rows of weights in Z16 to Z19.
#define MULTIPLY(mem, a, b, c, d) \
	VMOVUPS     mem, Z20 \
	VFMADD231PS Z16, Z20, a \
	VFMADD231PS Z17, Z20, b \
	VFMADD231PS Z18, Z20, c \
	VFMADD231PS Z19, Z20, d

// func tileAVX512(t *tile)
//
// Registers: AX t; SI, DI, R8, R9 rows of x; R10 to R13 rows of w; BX bytes into a row of w (half of those into a row
// of x); DX bytes from one row of w to the next; CX where to prefetch: the next four rows of w.
TEXT ·tileAVX512(SB), NOSPLIT, $16-8
	MOVQ    t+0(FP), AX
	MOVQ    tile_w(AX), R10
	MOVQ    tile_stride(AX), DX
	SHLQ    $1, DX
	LEAQ    (R10)(DX*1), R11
	LEAQ    (R10)(DX*2), R12
	LEAQ    (R11)(DX*2), R13
	MOVQ    tile_blocks(AX), CX
	SHLQ    $5, CX
	MOVQ    CX, end-16(SP)
	MOVQ    $0, out-8(SP)
	VMOVUPS ·quarters(SB), X31

next:
	MOVQ   tile_x+0(AX), SI
	MOVQ   tile_x+24(AX), DI
	MOVQ   tile_x+48(AX), R8
	MOVQ   tile_x+72(AX), R9
	VXORPS Z0, Z0, Z0
	VXORPS Z1, Z1, Z1
	VXORPS Z2, Z2, Z2
	VXORPS Z3, Z3, Z3
	VXORPS Z4, Z4, Z4
	VXORPS Z5, Z5, Z5
	VXORPS Z6, Z6, Z6
	VXORPS Z7, Z7, Z7
	VXORPS Z8, Z8, Z8
	VXORPS Z9, Z9, Z9
	VXORPS Z10, Z10, Z10
	VXORPS Z11, Z11, Z11
	VXORPS Z12, Z12, Z12
	VXORPS Z13, Z13, Z13
	VXORPS Z14, Z14, Z14
	VXORPS Z15, Z15, Z15
	XORQ   BX, BX
	CMPQ   BX, end-16(SP)
	JGE    tail

loop:
	LEAQ       (BX)(DX*4), CX
	PREFETCHT1 (R10)(CX*1)
	PREFETCHT1 (R11)(CX*1)
	PREFETCHT1 (R12)(CX*1)
	PREFETCHT1 (R13)(CX*1)
	WEIGHTS(R10, Z16)
	WEIGHTS(R11, Z17)
	WEIGHTS(R12, Z18)
	WEIGHTS(R13, Z19)
	MULTIPLY((SI)(BX*2), Z0, Z1, Z2, Z3)
	MULTIPLY((DI)(BX*2), Z4, Z5, Z6, Z7)
	MULTIPLY((R8)(BX*2), Z8, Z9, Z10, Z11)
	MULTIPLY((R9)(BX*2), Z12, Z13, Z14, Z15)
	ADDQ $32, BX
	CMPQ BX, end-16(SP)
	JLT  loop

tail:
	MOVQ  tile_xTail(AX), SI
	TESTQ SI, SI
	JZ    fold
	MOVQ  tile_wTail(AX), R10
	TAIL_WEIGHTS(0, Z16)
	TAIL_WEIGHTS(32, Z17)
	TAIL_WEIGHTS(64, Z18)
	TAIL_WEIGHTS(96, Z19)
	MULTIPLY(0(SI), Z0, Z1, Z2, Z3)
	MULTIPLY(64(SI), Z4, Z5, Z6, Z7)
	MULTIPLY(128(SI), Z8, Z9, Z10, Z11)
	MULTIPLY(192(SI), Z12, Z13, Z14, Z15)

fold:
	FOLD(Z0, Z1, Z2, Z3, Z31, Z28, Z29)
	FOLD(Z4, Z5, Z6, Z7, Z31, Z28, Z29)
	FOLD(Z8, Z9, Z10, Z11, Z31, Z28, Z29)
	FOLD(Z12, Z13, Z14, Z15, Z31, Z28, Z29)
	MOVQ    out-8(SP), BX
	MOVQ    tile_out+0(AX), SI
	MOVQ    tile_out+24(AX), DI
	MOVQ    tile_out+48(AX), R8
	MOVQ    tile_out+72(AX), R9
	VMOVUPS X0, (SI)(BX*1)
	VMOVUPS X4, (DI)(BX*1)
	VMOVUPS X8, (R8)(BX*1)
	VMOVUPS X12, (R9)(BX*1)
	LEAQ    (R10)(DX*4), R10
	LEAQ    (R11)(DX*4), R11
	LEAQ    (R12)(DX*4), R12
	LEAQ    (R13)(DX*4), R13
	ADDQ    $16, BX
	MOVQ    BX, out-8(SP)
	MOVQ    tile_tiles(AX), SI
	SHLQ    $4, SI
	CMPQ    BX, SI
	JLT     next
	VZEROUPPER
	RET

// func pairAVX512(t *tile)
//
// Registers as in tileAVX512, but for two rows of x: R8 the end of BX, R9 bytes into the outputs.
TEXT ·pairAVX512(SB), NOSPLIT, $0-8
	MOVQ    t+0(FP), AX
	MOVQ    tile_w(AX), R10
	MOVQ    tile_stride(AX), DX
	SHLQ    $1, DX
	LEAQ    (R10)(DX*1), R11
	LEAQ    (R10)(DX*2), R12
	LEAQ    (R11)(DX*2), R13
	MOVQ    tile_blocks(AX), R8
	SHLQ    $5, R8
	XORQ    R9, R9
	VMOVUPS ·quarters(SB), X31

next:
	MOVQ   tile_x+0(AX), SI
	MOVQ   tile_x+24(AX), DI
	VXORPS Z0, Z0, Z0
	VXORPS Z1, Z1, Z1
	VXORPS Z2, Z2, Z2
	VXORPS Z3, Z3, Z3
	VXORPS Z4, Z4, Z4
	VXORPS Z5, Z5, Z5
	VXORPS Z6, Z6, Z6
	VXORPS Z7, Z7, Z7
	XORQ   BX, BX
	CMPQ   BX, R8
	JGE    tail

loop:
	LEAQ       (BX)(DX*4), CX
	PREFETCHT1 (R10)(CX*1)
	PREFETCHT1 (R11)(CX*1)
	PREFETCHT1 (R12)(CX*1)
	PREFETCHT1 (R13)(CX*1)
	WEIGHTS(R10, Z16)
	WEIGHTS(R11, Z17)
	WEIGHTS(R12, Z18)
	WEIGHTS(R13, Z19)
	MULTIPLY((SI)(BX*2), Z0, Z1, Z2, Z3)
	MULTIPLY((DI)(BX*2), Z4, Z5, Z6, Z7)
	ADDQ $32, BX
	CMPQ BX, R8
	JLT  loop

tail:
	MOVQ  tile_xTail(AX), SI
	TESTQ SI, SI
	JZ    fold
	MOVQ  tile_wTail(AX), CX
	XORQ  BX, BX
	WEIGHTS(CX, Z16)
	ADDQ $32, BX
	WEIGHTS(CX, Z17)
	ADDQ $32, BX
	WEIGHTS(CX, Z18)
	ADDQ $32, BX
	WEIGHTS(CX, Z19)
	MULTIPLY(0(SI), Z0, Z1, Z2, Z3)
	MULTIPLY(64(SI), Z4, Z5, Z6, Z7)

fold:
	FOLD(Z0, Z1, Z2, Z3, Z31, Z28, Z29)
	FOLD(Z4, Z5, Z6, Z7, Z31, Z28, Z29)
	MOVQ    tile_out+0(AX), SI
	MOVQ    tile_out+24(AX), DI
	VMOVUPS X0, (SI)(R9*1)
	VMOVUPS X4, (DI)(R9*1)
	LEAQ    (R10)(DX*4), R10
	LEAQ    (R11)(DX*4), R11
	LEAQ    (R12)(DX*4), R12
	LEAQ    (R13)(DX*4), R13
	ADDQ    $16, R9
	MOVQ    tile_tiles(AX), SI
	SHLQ    $4, SI
	CMPQ    R9, SI
	JLT     next
	VZEROUPPER
	RET

// ONE adds the products of the row of x in Z20 with 16 weights at ptr+BX+offset to acc.
#define ONE(ptr, offset, acc) \
	VPMOVZXWD   offset(ptr)(BX*1), Z16 \
	VPSLLD      $16, Z16, Z16 \
	VFMADD231PS Z16, Z20, acc

// func rowAVX512(t *tile)
//
// Registers as in tileAVX512; DI bytes into the output, R8 its end, R9 where to prefetch: the next four rows of w.
TEXT ·rowAVX512(SB), NOSPLIT, $0-8
	MOVQ    t+0(FP), AX
	MOVQ    tile_x+0(AX), SI
	MOVQ    tile_w(AX), R10
	MOVQ    tile_stride(AX), DX
	SHLQ    $1, DX
	LEAQ    (R10)(DX*1), R11
	LEAQ    (R10)(DX*2), R12
	LEAQ    (R11)(DX*2), R13
	MOVQ    tile_blocks(AX), CX
	SHLQ    $5, CX
	XORQ    DI, DI
	MOVQ    tile_tiles(AX), R8
	SHLQ    $4, R8
	VMOVUPS ·quarters(SB), X31

next:
	VXORPS Z0, Z0, Z0
	VXORPS Z1, Z1, Z1
	VXORPS Z2, Z2, Z2
	VXORPS Z3, Z3, Z3
	XORQ   BX, BX
	LEAQ   (BX)(DX*4), R9

pair:
	LEAQ       64(BX), R9
	CMPQ       R9, CX
	JGT        single
	LEAQ       -64(R9)(DX*4), R9
	PREFETCHT1 (R10)(R9*1)
	PREFETCHT1 (R11)(R9*1)
	PREFETCHT1 (R12)(R9*1)
	PREFETCHT1 (R13)(R9*1)
	VMOVUPS    (SI)(BX*2), Z20
	ONE(R10, 0, Z0)
	ONE(R11, 0, Z1)
	ONE(R12, 0, Z2)
	ONE(R13, 0, Z3)
	VMOVUPS 64(SI)(BX*2), Z20
	ONE(R10, 32, Z0)
	ONE(R11, 32, Z1)
	ONE(R12, 32, Z2)
	ONE(R13, 32, Z3)
	ADDQ $64, BX
	JMP  pair

single:
	CMPQ    BX, CX
	JGE     tail
	VMOVUPS (SI)(BX*2), Z20
	ONE(R10, 0, Z0)
	ONE(R11, 0, Z1)
	ONE(R12, 0, Z2)
	ONE(R13, 0, Z3)

tail:
	MOVQ    tile_xTail(AX), R9
	TESTQ   R9, R9
	JZ      fold
	VMOVUPS (R9), Z20
	MOVQ    tile_wTail(AX), R9
	XORQ    BX, BX
	ONE(R9, 0, Z0)
	ONE(R9, 32, Z1)
	ONE(R9, 64, Z2)
	ONE(R9, 96, Z3)

fold:
	FOLD(Z0, Z1, Z2, Z3, Z31, Z28, Z29)
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
