#include "go_asm.h"
#include "textflag.h"
#include "constants_amd64.h"
#include "avx512_amd64.h"

// KEYS multiplies the query in Z16 with four keys from base on.
#define KEYS(base, a, b, c, d) \
	VFMADD231PS (base), Z16, a         \
	VFMADD231PS (base)(DX*1), Z16, b   \
	VFMADD231PS (base)(DX*2), Z16, c   \
	VFMADD231PS (base)(BX*1), Z16, d   \
	ADDQ        $64, base

#define KEYS_REST(base, a, b, c, d) \
	VFMADD231PS (base), Z16, K1, a       \
	VFMADD231PS (base)(DX*1), Z16, K1, b \
	VFMADD231PS (base)(DX*2), Z16, K1, c \
	VFMADD231PS (base)(BX*1), Z16, K1, d

// FOURTHS begins to add up the 16 lanes of four registers into a: lane i and i+8, then i+4. Each quarter of
// a is left with the four lanes of one of them.
#define FOURTHS(a, b, c, d) \
	VSHUFF32X4 $0x44, b, a, Z17 \
	VSHUFF32X4 $0xee, b, a, Z18 \
	VADDPS     Z18, Z17, a      \
	VSHUFF32X4 $0x44, d, c, Z19 \
	VSHUFF32X4 $0xee, d, c, Z20 \
	VADDPS     Z20, Z19, c      \
	VSHUFF32X4 $0x88, c, a, Z17 \
	VSHUFF32X4 $0xdd, c, a, Z18 \
	VADDPS     Z18, Z17, a

// func scoresWholeAVX512(queries *query, count int, k *float32, stride, dim int, scale float32)
//
// Registers: DI the query, R9 those left, SI q; R10 to R13 keys 0, 4, 8 and 12; DX bytes from one key to the next, BX
// three times as many; CX sixteens of elements, K1 the lanes of the rest, AX their number. Key j is summed in Zj.
TEXT ·scoresWholeAVX512(SB), NOSPLIT, $0-44
	MOVQ  queries+0(FP), DI
	MOVQ  count+8(FP), R9
	MOVQ  stride+24(FP), DX
	SHLQ  $2, DX
	LEAQ  (DX)(DX*2), BX
	MOVQ  dim+32(FP), AX
	ANDQ  $15, AX
	MOVL  $0xffff, CX
	BZHIL AX, CX, CX
	KMOVW CX, K1

next:
	MOVQ   query_q(DI), SI
	MOVQ   k+16(FP), R10
	LEAQ   (R10)(DX*4), R11
	LEAQ   (R11)(DX*4), R12
	LEAQ   (R12)(DX*4), R13
	MOVQ   dim+32(FP), CX
	SHRQ   $4, CX
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
	TESTQ  CX, CX
	JZ     rest

loop:
	VMOVUPS (SI), Z16
	ADDQ    $64, SI
	KEYS(R10, Z0, Z1, Z2, Z3)
	KEYS(R11, Z4, Z5, Z6, Z7)
	KEYS(R12, Z8, Z9, Z10, Z11)
	KEYS(R13, Z12, Z13, Z14, Z15)
	DECQ CX
	JNZ  loop

rest:
	TESTQ     AX, AX
	JZ        fold
	VMOVUPS.Z (SI), K1, Z16
	KEYS_REST(R10, Z0, Z1, Z2, Z3)
	KEYS_REST(R11, Z4, Z5, Z6, Z7)
	KEYS_REST(R12, Z8, Z9, Z10, Z11)
	KEYS_REST(R13, Z12, Z13, Z14, Z15)

fold:
	// Quarter i of Z0 gets key 4i, of Z1 key 4i+1, and so on; then lane i and i+2, i+1.
	FOURTHS(Z0, Z4, Z8, Z12)
	FOURTHS(Z1, Z5, Z9, Z13)
	FOURTHS(Z2, Z6, Z10, Z14)
	FOURTHS(Z3, Z7, Z11, Z15)
	VUNPCKLPD   Z1, Z0, Z17
	VUNPCKHPD   Z1, Z0, Z18
	VADDPS      Z18, Z17, Z0
	VUNPCKLPD   Z3, Z2, Z19
	VUNPCKHPD   Z3, Z2, Z20
	VADDPS      Z20, Z19, Z2
	VSHUFPS     $0x88, Z2, Z0, Z17
	VSHUFPS     $0xdd, Z2, Z0, Z18
	VADDPS      Z18, Z17, Z4
	VMULPS.BCST scale+40(FP), Z4, Z4
	VMOVUPS     Z4, query_s(DI)
	ADDQ        $query__size, DI
	DECQ        R9
	JNZ         next
	VZEROUPPER
	RET

// func accumulateWholeAVX512(queries *query, count int, v *float32, stride, dim int)
//
// Registers: DI the query, R8 those left, SI acc; R10 v, R11 its row, DX bytes from one row to the next; R9 the
// elements left, K1 the lanes of the last ones; CX j.
TEXT ·accumulateWholeAVX512(SB), NOSPLIT, $0-40
	MOVQ queries+0(FP), DI
	MOVQ count+8(FP), R8
	MOVQ stride+24(FP), DX
	SHLQ $2, DX

next:
	MOVQ         query_acc(DI), SI
	MOVQ         v+16(FP), R10
	MOVQ         dim+32(FP), R9
	VBROADCASTSS query_decay(DI), Z31
	SUBQ         $64, R9
	JLT          middle

wide:
	VMULPS (SI), Z31, Z0
	VMULPS 64(SI), Z31, Z1
	VMULPS 128(SI), Z31, Z2
	VMULPS 192(SI), Z31, Z3
	MOVQ   R10, R11
	XORQ   CX, CX

wideLoop:
	VBROADCASTSS query_s(DI)(CX*4), Z4
	VFMADD231PS  (R11), Z4, Z0
	VFMADD231PS  64(R11), Z4, Z1
	VFMADD231PS  128(R11), Z4, Z2
	VFMADD231PS  192(R11), Z4, Z3
	ADDQ         DX, R11
	INCQ         CX
	CMPQ         CX, $16
	JLT          wideLoop
	VMOVUPS      Z0, (SI)
	VMOVUPS      Z1, 64(SI)
	VMOVUPS      Z2, 128(SI)
	VMOVUPS      Z3, 192(SI)
	ADDQ         $256, SI
	ADDQ         $256, R10
	SUBQ         $64, R9
	JGE          wide

middle:
	ADDQ   $32, R9
	JLT    narrow
	VMULPS (SI), Z31, Z0
	VMULPS 64(SI), Z31, Z1
	MOVQ   R10, R11
	XORQ   CX, CX

middleLoop:
	VBROADCASTSS query_s(DI)(CX*4), Z4
	VBROADCASTSS query_s+4(DI)(CX*4), Z5
	VFMADD231PS  (R11), Z4, Z0
	VFMADD231PS  64(R11), Z4, Z1
	VFMADD231PS  (R11)(DX*1), Z5, Z0
	VFMADD231PS  64(R11)(DX*1), Z5, Z1
	LEAQ         (R11)(DX*2), R11
	ADDQ         $2, CX
	CMPQ         CX, $16
	JLT          middleLoop
	VMOVUPS      Z0, (SI)
	VMOVUPS      Z1, 64(SI)
	ADDQ         $128, SI
	ADDQ         $128, R10
	SUBQ         $32, R9

narrow:
	ADDQ $32, R9

narrowNext:
	CMPQ      R9, $0
	JLE       done
	MOVQ      $16, AX
	CMPQ      R9, AX
	CMOVQLT   R9, AX
	MOVL      $0xffff, CX
	BZHIL     AX, CX, CX
	KMOVW     CX, K1
	VMOVUPS.Z (SI), K1, Z0
	VMULPS    Z31, Z0, Z0
	MOVQ      R10, R11
	XORQ      CX, CX

narrowLoop:
	VBROADCASTSS query_s(DI)(CX*4), Z4
	VMOVUPS.Z    (R11), K1, Z5
	VFMADD231PS  Z5, Z4, Z0
	ADDQ         DX, R11
	INCQ         CX
	CMPQ         CX, $16
	JLT          narrowLoop
	VMOVUPS      Z0, K1, (SI)
	ADDQ         $64, SI
	ADDQ         $64, R10
	SUBQ         $16, R9
	JMP          narrowNext

done:
	ADDQ $query__size, DI
	DECQ R8
	JNZ  next
	VZEROUPPER
	RET
