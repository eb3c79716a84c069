package host

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Board is an array of 64-bit words in shared memory that every process writes which has its file: what workers say about
// their work without a call to the HMM, which reads it when they have died. Nobody may rely on a word being its writer's.
// It is unmapped when the garbage collector finds it unused, so that no Store meets a map that is gone.
type Board struct {
	file  *os.File // nil: another process's
	words []atomic.Uint64
}

// NewBoard makes a board of n words, all zero.
func NewBoard(name string, n int) (*Board, error) {
	f, err := memfd(name, int64(n)*8)
	if err != nil {
		return nil, err
	}
	b := &Board{file: f}
	if b.words, err = mapWords(b, f, n, unix.PROT_READ|unix.PROT_WRITE); err == nil {
		err = seal(f, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return b, nil
}

// OpenBoard maps the first n words of a board's file and closes the file.
func OpenBoard(f *os.File, n int) (*Board, error) {
	defer f.Close() // it was only read
	if n <= 0 {
		return nil, fmt.Errorf("a board of %d words", n)
	}
	if err := sized(f, int64(n)*8); err != nil {
		return nil, err
	}
	b := &Board{}
	var err error
	b.words, err = mapWords(b, f, n, unix.PROT_READ|unix.PROT_WRITE)
	return b, err
}

// File is the memfd, owned by the board of the process that made it: what another process needs for OpenBoard.
func (b *Board) File() *os.File { return b.file }

// Load reads word i.
func (b *Board) Load(i int) uint64 {
	n := b.words[i].Load()
	runtime.KeepAlive(b)
	return n
}

// Store sets word i.
func (b *Board) Store(i int, v uint64) {
	b.words[i].Store(v)
	runtime.KeepAlive(b)
}

// Close closes the file, if this process made the board. The words stay readable.
func (b *Board) Close() error {
	if b.file == nil {
		return nil
	}
	return b.file.Close()
}
