//go:build !race

package cpu

import "golang.org/x/sys/unix"

// touched is how much of an array has its pages at once. Usual batches need no more of most arrays, and the rest comes page by page.
const touched = 1 << 20

// takePages returns zeroed memory of n bytes.
func takePages(n int) ([]byte, error) {
	p, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err == nil {
		_ = unix.Madvise(p[:min(n, touched)], unix.MADV_POPULATE_WRITE) // what is not populated comes as it is touched
	}
	return p, err
}

// givePages gives it back.
func givePages(p []byte) {
	if err := unix.Munmap(p); err != nil {
		panic("BUG: giving pages back: " + err.Error())
	}
}
