package hf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// mapping is memory from mmap; nil when there is none.
type mapping []byte

// mapFile maps a whole file read-only and shared, so that all processes that map it share the page cache's copy. The file
// stays open, unless it fails.
func mapFile(path string) (mapping, *os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	m, err := mapOpen(f)
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	return m, f, nil
}

func mapOpen(f *os.File) (mapping, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: not a regular file: %w", f.Name(), ErrDamaged)
	}
	if info.Size() == 0 {
		return nil, nil
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, &fs.PathError{Op: "map", Path: f.Name(), Err: err}
	}
	return b, nil
}

// mapZeroed maps size bytes of fresh, zeroed, private memory; in huge pages where the system gives them.
func mapZeroed(size int) (mapping, error) {
	if size == 0 {
		return nil, nil
	}
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return nil, fmt.Errorf("mapping %d bytes of memory: %w", size, err)
	}
	_ = unix.Madvise(b, unix.MADV_HUGEPAGE) // only a hint; kernels without huge pages refuse it
	return b, nil
}

// release tells the system that data, part of a file's mapping, will hardly be read again. The pages stay readable.
func (m mapping) release(data []byte) {
	if len(data) == 0 {
		return
	}
	page := os.Getpagesize()
	from := offset(m, data)
	to := (from + len(data)) / page * page
	from = (from + page - 1) / page * page
	if from < to {
		_ = unix.Madvise(m[from:to], unix.MADV_DONTNEED) // only a hint
	}
}

// random tells the system that the next reads of m are scattered, or, with false, that they are not.
func (m mapping) random(on bool) {
	if m == nil {
		return
	}
	advice := unix.MADV_NORMAL
	if on {
		advice = unix.MADV_RANDOM
	}
	_ = unix.Madvise(m, advice) // only a hint
}

// close unmaps m. It may be nil.
func (m mapping) close() error {
	if m == nil {
		return nil
	}
	if err := unix.Munmap(m); err != nil {
		return fmt.Errorf("unmapping %d bytes: %w", len(m), err)
	}
	return nil
}
