// Package host is device memory on the host: a memfd a space, extents as offset ranges of it, mapped by memory sharing
// between processes. One memfd, not one an extent, because an fd and a map each would hit RLIMIT_NOFILE and
// vm.max_map_count; neighbouring extents mapped alike merge into one map. It places nothing (mem/page does), knows no
// protocol (shared/hbm does), and needs Linux 5.1 or later.
package host

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// memfd makes an anonymous file of the given size. Sealable ones must be sealed by the caller.
func memfd(name string, bytes int64) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3
		fd, err = unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if err := unix.Ftruncate(fd, bytes); err != nil {
		return nil, errors.Join(fmt.Errorf("sizing %s to %d bytes: %w", name, bytes, err), f.Close())
	}
	return f, nil
}

// seal forbids the changes to the file named by the F_SEAL_ flags, and further seals.
func seal(f *os.File, flags int) error {
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, flags|unix.F_SEAL_SEAL); err != nil {
		return fmt.Errorf("sealing %s: %w", f.Name(), err)
	}
	return nil
}

// sized checks that a file received from elsewhere is as large as promised: a map past its end would kill its user.
func sized(f *os.File, bytes int64) error {
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("looking at %s: %w", f.Name(), err)
	}
	if info.Size() < bytes {
		return fmt.Errorf("%s has %d bytes, %d were promised", f.Name(), info.Size(), bytes)
	}
	return nil
}
