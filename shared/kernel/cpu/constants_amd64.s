#include "textflag.h"

// The lanes that begin the quarters of sixteen.
DATA ·quarters+0(SB)/4, $0
DATA ·quarters+4(SB)/4, $4
DATA ·quarters+8(SB)/4, $8
DATA ·quarters+12(SB)/4, $12
GLOBL ·quarters(SB), RODATA|NOPTR, $16

// Sixteen lanes in use, then sixteen that are not: the first n of sixteen lanes are at masks+4*(16-n).
DATA ·masks+0(SB)/8, $-1
DATA ·masks+8(SB)/8, $-1
DATA ·masks+16(SB)/8, $-1
DATA ·masks+24(SB)/8, $-1
DATA ·masks+32(SB)/8, $-1
DATA ·masks+40(SB)/8, $-1
DATA ·masks+48(SB)/8, $-1
DATA ·masks+56(SB)/8, $-1
GLOBL ·masks(SB), RODATA|NOPTR, $128
