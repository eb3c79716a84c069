package cpu

import "golang.org/x/sys/cpu"

// choose returns the implementation of an instruction set, if this machine and its operating system have it.
func choose(isa ISA) (vector, error) {
	has2 := cpu.X86.HasAVX2 && cpu.X86.HasFMA
	has512 := has2 && cpu.X86.HasBMI2 &&
		cpu.X86.HasAVX512F && cpu.X86.HasAVX512BW && cpu.X86.HasAVX512DQ && cpu.X86.HasAVX512VL
	switch {
	case isa == AVX512 && has512, isa == Auto && has512:
		return avx512{}, nil
	case isa == AVX2 && has2, isa == Auto && has2:
		return avx2{}, nil
	case isa == Portable, isa == Auto:
		return portable{}, nil
	}
	return nil, ErrNotSupported
}
