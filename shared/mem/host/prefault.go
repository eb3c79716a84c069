package host

import "golang.org/x/sys/unix"

// Prefault readies mapped memory, from a page's start on, that this process is about to write: one call instead of a fault
// for each page of the machine, which would take as long as the writing. The content does not change. What the system
// cannot do (before Linux 5.14) is left to the faults.
func Prefault(p []byte) {
	if len(p) == 0 {
		return
	}
	_ = unix.Madvise(p, unix.MADV_POPULATE_WRITE) // EINTR and the like leave some faults, no harm
}
