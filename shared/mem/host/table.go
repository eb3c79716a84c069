package host

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Table is an array of 64-bit words in shared memory with one writing process and any number of readers: the HMM's
// claim generations, which a worker checks with one load before each append and publish.
type Table struct {
	file  *os.File
	words []atomic.Uint64
}

// NewTable makes a table of n words, all zero. Only the returned one can write: other maps, of this file or of a copy
// of its descriptor, are refused write access by the kernel.
func NewTable(name string, n int) (*Table, error) {
	f, err := memfd(name, int64(n)*8)
	if err != nil {
		return nil, err
	}
	p, err := unix.MmapPtr(int(f.Fd()), 0, nil, uintptr(n)*8, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("mapping %s: %w", name, err), f.Close())
	}
	t := &Table{f, unsafe.Slice((*atomic.Uint64)(p), n)}
	if err := seal(f, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_FUTURE_WRITE); err != nil {
		return nil, errors.Join(err, t.Close())
	}
	return t, nil
}

// File is the memfd, owned by the table: what another process needs for OpenTable.
func (t *Table) File() *os.File { return t.file }

// Len is the number of words.
func (t *Table) Len() int { return len(t.words) }

// Store sets word i.
func (t *Table) Store(i int, v uint64) { t.words[i].Store(v) }

// Close unmaps the table; Store must not be called again.
func (t *Table) Close() error {
	err := t.file.Close()
	if uerr := unix.MunmapPtr(unsafe.Pointer(unsafe.SliceData(t.words)), uintptr(len(t.words))*8); uerr != nil {
		err = errors.Join(err, fmt.Errorf("unmapping: %w", uerr))
	}
	t.words = nil
	return err
}

// View reads a Table, usually another process's. It is unmapped when the garbage collector finds it unused, so that a
// Load never meets a map that is gone.
type View struct {
	words []atomic.Uint64
}

// OpenView maps the first n words of a table's file and closes the file.
func OpenView(f *os.File, n int) (*View, error) {
	v, err := openView(f, n)
	if cerr := f.Close(); err == nil && cerr != nil {
		err = fmt.Errorf("closing the table's file: %w", cerr)
	}
	return v, err
}

func openView(f *os.File, n int) (*View, error) {
	if n <= 0 {
		return nil, fmt.Errorf("a table of %d words", n)
	}
	if err := sized(f, int64(n)*8); err != nil {
		return nil, err
	}
	v := &View{}
	var err error
	v.words, err = mapWords(v, f, n, unix.PROT_READ)
	return v, err
}

// mapWords maps the first n words of a file until the garbage collector finds owner unused.
func mapWords[T any](owner *T, f *os.File, n, access int) ([]atomic.Uint64, error) {
	p, err := unix.MmapPtr(int(f.Fd()), 0, nil, uintptr(n)*8, access, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mapping a table of %d words: %w", n, err)
	}
	runtime.AddCleanup(owner, func(p unsafe.Pointer) {
		if err := unix.MunmapPtr(p, uintptr(n)*8); err != nil {
			panic(fmt.Sprintf("BUG: unmapping a table: %v", err))
		}
	}, p)
	return unsafe.Slice((*atomic.Uint64)(p), n), nil
}

// Len is the number of words.
func (v *View) Len() int { return len(v.words) }

// Load reads word i.
func (v *View) Load(i int) uint64 {
	n := v.words[i].Load()
	runtime.KeepAlive(v)
	return n
}
