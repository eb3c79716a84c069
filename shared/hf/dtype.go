package hf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"unsafe"

	"trireme.dev/shared/model"
)

// ErrDType is returned when a tensor's dtype, or one of its values, cannot be used where it stands.
var ErrDType = errors.New("unusable dtype")

// Float32s returns the elements of a BF16, F16 or F32 tensor, widened exactly, in fresh memory. It returns an ErrDType
// for other dtypes.
func (t Tensor) Float32s() ([]float32, error) {
	out := make([]float32, t.Len())
	switch t.DType {
	case "F32":
		for i := range out {
			out[i] = math.Float32frombits(binary.LittleEndian.Uint32(t.Data[4*i:]))
		}
	case "BF16":
		for i := range out {
			out[i] = math.Float32frombits(uint32(binary.LittleEndian.Uint16(t.Data[2*i:])) << 16)
		}
	case "F16":
		for i := range out {
			out[i] = halfToFloat32(binary.LittleEndian.Uint16(t.Data[2*i:]))
		}
	default:
		return nil, fmt.Errorf("%s, want BF16, F16 or F32: %w", t.DType, ErrDType)
	}
	return out, nil
}

// Ints returns the elements of an I64 or I32 tensor in fresh memory. It returns an ErrDType for other dtypes.
func (t Tensor) Ints() ([]int, error) {
	out := make([]int, t.Len())
	switch t.DType {
	case "I64":
		for i := range out {
			out[i] = int(binary.LittleEndian.Uint64(t.Data[8*i:]))
		}
	case "I32":
		for i := range out {
			out[i] = int(int32(binary.LittleEndian.Uint32(t.Data[4*i:])))
		}
	default:
		return nil, fmt.Errorf("%s, want I64 or I32: %w", t.DType, ErrDType)
	}
	return out, nil
}

// viewBF16 returns the elements of a BF16 tensor without a copy, or false where the data is not aligned for that.
// Tensors are little-endian, as are amd64 and arm64, the machines that Trireme is built for.
func viewBF16(t Tensor) ([]model.BF16, bool) {
	if len(t.Data) == 0 {
		return nil, true
	}
	p := unsafe.Pointer(unsafe.SliceData(t.Data))
	if uintptr(p)%unsafe.Alignof(model.BF16(0)) != 0 {
		return nil, false
	}
	return unsafe.Slice((*model.BF16)(p), len(t.Data)/2), true
}

// narrow writes the elements of a BF16, F16 or F32 tensor to dst, which has room for them. It returns an ErrDType for
// other dtypes and for a value that bfloat16 does not have.
func narrow(dst []model.BF16, t Tensor) error {
	var bits func(i int) uint32
	switch t.DType {
	case "BF16":
		bits = func(i int) uint32 { return uint32(binary.LittleEndian.Uint16(t.Data[2*i:])) << 16 }
	case "F32":
		bits = func(i int) uint32 { return binary.LittleEndian.Uint32(t.Data[4*i:]) }
	case "F16":
		bits = func(i int) uint32 {
			return math.Float32bits(halfToFloat32(binary.LittleEndian.Uint16(t.Data[2*i:])))
		}
	default:
		return fmt.Errorf("%s, want BF16, or F16 or F32 with values that BF16 has too: %w", t.DType, ErrDType)
	}
	for i := range dst {
		b := bits(i)
		if b&0xffff != 0 {
			return fmt.Errorf("%s, and %g is no BF16 value (the matrices must be BF16 or fit it exactly): %w",
				t.DType, math.Float32frombits(b), ErrDType)
		}
		dst[i] = model.BF16(b >> 16)
	}
	return nil
}

// halfToFloat32 widens an IEEE 754 binary16.
func halfToFloat32(h uint16) float32 {
	sign := uint32(h>>15) << 31
	exp, frac := uint32(h>>10&0x1f), uint32(h&0x3ff)
	switch exp {
	case 0: // zero or subnormal: frac * 2^-24, exact in float32
		v := math.Float32bits(float32(frac) / (1 << 24))
		return math.Float32frombits(sign | v)
	case 0x1f: // infinity or not a number
		return math.Float32frombits(sign | 0xff<<23 | frac<<13)
	}
	return math.Float32frombits(sign | (exp+112)<<23 | frac<<13)
}

// offset is the position of part in whole, of which it is a slice.
func offset(whole, part []byte) int {
	return int(uintptr(unsafe.Pointer(unsafe.SliceData(part))) - uintptr(unsafe.Pointer(unsafe.SliceData(whole))))
}
