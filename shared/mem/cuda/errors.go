package cuda

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"trireme.dev/shared/mem"
)

// ErrFault is returned by every call once a copy or a kernel of this process has touched memory that it had no access to,
// or failed in another way that the driver does not survive: the process cannot use the device any more. Memory of other
// processes and what they share with this one is not harmed.
var ErrFault = errors.New("the process has lost the device after a fault")

// code is CUresult.
type code int32

// sentinels is all that the package knows of the driver's codes (cuda.h, cudaError_enum).
var sentinels = map[code]error{
	1:   mem.ErrInvalid,      // INVALID_VALUE
	2:   mem.ErrExhausted,    // OUT_OF_MEMORY
	34:  mem.ErrNotSupported, // STUB_LIBRARY
	36:  mem.ErrNotSupported, // CALL_REQUIRES_NEWER_DRIVER
	100: mem.ErrNotSupported, // NO_DEVICE
	101: mem.ErrInvalid,      // INVALID_DEVICE
	208: mem.ErrInvalid,      // ALREADY_MAPPED
	211: mem.ErrInvalid,      // NOT_MAPPED
	214: ErrFault,            // ECC_UNCORRECTABLE
	400: mem.ErrInvalid,      // INVALID_HANDLE
	700: ErrFault,            // ILLEGAL_ADDRESS
	702: ErrFault,            // LAUNCH_TIMEOUT
	715: ErrFault,            // ILLEGAL_INSTRUCTION
	716: ErrFault,            // MISALIGNED_ADDRESS
	717: ErrFault,            // INVALID_ADDRESS_SPACE
	718: ErrFault,            // INVALID_PC
	719: ErrFault,            // LAUNCH_FAILED
	801: mem.ErrNotSupported, // NOT_SUPPORTED
	803: mem.ErrNotSupported, // SYSTEM_DRIVER_MISMATCH
	804: mem.ErrNotSupported, // COMPAT_NOT_SUPPORTED_ON_DEVICE
}

// telling is codes that say more, or another thing, in one call (seen on driver 580).
var telling = map[string]map[code]error{
	"cuMemImportFromShareableHandle": {999: mem.ErrInvalid}, // UNKNOWN: the descriptor is none of the driver's
	"cuMemMap":                       {801: mem.ErrInvalid}, // NOT_SUPPORTED: more or less than the whole allocation
}

// Error is a failed call of the driver. It wraps the sentinel that its code stands for in this call, if there is one.
type Error struct {
	Call string // as in cuda.h, without the version
	Code int    // CUresult
	Text string // the driver's
}

// Error implements error.
func (e *Error) Error() string { return fmt.Sprintf("%s: %s (CUDA error %d)", e.Call, e.Text, e.Code) }

// Unwrap returns the sentinel for the code, or nil.
func (e *Error) Unwrap() error {
	if err, ok := telling[e.Call][code(e.Code)]; ok {
		return err
	}
	return sentinels[code(e.Code)]
}

// check makes an error of a call's code; nil for success.
func (d *driver) check(call string, c code) error {
	if c == 0 {
		return nil
	}
	text := "unknown error"
	var p *byte
	if d.ErrorString(c, &p) == 0 && p != nil {
		text = unix.BytePtrToString(p)
	}
	return &Error{call, int(c), text}
}
