package bustest

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// Disk is a small file system that a test can fill.
type Disk struct {
	tb  testing.TB
	Dir string
}

// NewDisk mounts a file system of so many bytes in memory for the length of the test, which is skipped when that is not allowed.
func NewDisk(tb testing.TB, bytes string) *Disk {
	tb.Helper()
	d := &Disk{tb: tb, Dir: tb.TempDir()}
	switch err := syscall.Mount("none", d.Dir, "tmpfs", 0, "size="+bytes); {
	case errors.Is(err, syscall.EPERM), errors.Is(err, syscall.EACCES):
		tb.Skipf("NOT TESTED: what happens when the disk is full; it takes the right to mount a small file system (root): %v", err)
	case err != nil:
		tb.Fatalf("mounting a small file system: %v", err)
	}
	tb.Cleanup(func() {
		if err := syscall.Unmount(d.Dir, 0); err != nil {
			tb.Errorf("unmounting %s: %v", d.Dir, err)
		}
	})
	return d
}

// Fill leaves no room.
func (d *Disk) Fill() {
	d.tb.Helper()
	f, err := os.Create(d.filler())
	if err != nil {
		d.tb.Fatal(err)
	}
	defer f.Close()
	for size := 1 << 16; size > 0; {
		if _, err := f.Write(make([]byte, size)); err != nil {
			size /= 2
		}
	}
}

// Free undoes Fill.
func (d *Disk) Free() {
	d.tb.Helper()
	if err := os.Remove(d.filler()); err != nil {
		d.tb.Fatal(err)
	}
}

func (d *Disk) filler() string { return filepath.Join(d.Dir, "filler") }
