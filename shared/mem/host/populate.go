package host

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Populate makes mapped memory readable without faults: it brings in what is not in memory yet and fills the page tables of
// this process. The content is not changed. It takes time in proportion to the bytes.
func Populate(p []byte) error {
	if len(p) == 0 {
		return nil
	}
	page := uintptr(os.Getpagesize())
	at := uintptr(unsafe.Pointer(unsafe.SliceData(p)))
	lead := int(at % page)
	whole := unsafe.Slice((*byte)(unsafe.Add(unsafe.Pointer(unsafe.SliceData(p)), -lead)), len(p)+lead)
	for {
		err := unix.Madvise(whole, unix.MADV_POPULATE_READ)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EINVAL): // before Linux 5.14
			touch(p, int(page))
			return nil
		default:
			return fmt.Errorf("populating %d bytes: %w", len(p), err)
		}
	}
}

func touch(p []byte, page int) {
	sum := p[len(p)-1]
	for i := 0; i < len(p); i += page {
		sum += p[i]
	}
	runtime.KeepAlive(sum) // or the reads would be optimised away
}
