package hbmbench

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"trireme.dev/shared/mem"
	"trireme.dev/shared/mem/host"
)

// Page is the size of the extents of Map and Remap.
const Page = mem.HostPage

// Map maps n neighbouring extents of a page, which are there already, one by one. The pages are not touched.
func Map(n int) (Case, error) {
	s, err := newSpace(n)
	if err != nil {
		return Case{}, err
	}
	return Case{Extents: n, Bytes: int64(n) * Page, Close: s.close, Do: func() (time.Duration, error) {
		d, err := timed(func() error { return s.each(s.mapOne) })
		if err != nil {
			return 0, err
		}
		return d, s.each(s.space.Unmap)
	}}, nil
}

// Remap takes n mapped extents of a page out of their places and puts them back, one by one.
func Remap(n int) (Case, error) {
	s, err := newSpace(n)
	if err != nil {
		return Case{}, err
	}
	if err := s.each(s.mapOne); err != nil {
		return Case{}, errors.Join(err, s.close())
	}
	return Case{Extents: n, Bytes: int64(n) * Page, Close: s.close, Do: func() (time.Duration, error) {
		return timed(func() error {
			return s.each(func(e mem.Extent) error {
				if err := s.space.Unmap(e); err != nil {
					return err
				}
				return s.mapOne(e)
			})
		})
	}}, nil
}

// spaceOf is a store full of extents of a page, and a space on it.
type spaceOf struct {
	n     int
	store *host.Store
	space *host.Space
}

func newSpace(n int) (*spaceOf, error) {
	store, space, err := newStore(int64(n)*Page, 0)
	if err != nil {
		return nil, err
	}
	s := &spaceOf{n: n, store: store, space: space}
	if err := s.each(store.Back); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

func (s *spaceOf) each(do func(mem.Extent) error) error {
	for i := range int64(s.n) {
		if err := do(mem.Extent{Offset: i * Page, Bytes: Page}); err != nil {
			return err
		}
	}
	return nil
}

func (s *spaceOf) mapOne(e mem.Extent) error {
	_, err := s.space.Map(e, mem.ReadOnly)
	return err
}

func (s *spaceOf) close() error { return errors.Join(s.space.Close(), s.store.Close()) }

// Memory is where a store has what it gives.
type Memory int

// The kinds of memory.
const (
	Fresh   Memory = iota // the system gives it when it is wanted
	Reused                // the store kept it when it was dropped before
	Readied               // the store had Ready take it from the system
)

// Back has a store give memory to an extent of so many bytes, zeroed, and touches it as somebody does who is about to write it.
func Back(bytes int64, memory Memory) (Case, error) {
	keep := int64(0)
	if memory == Reused {
		keep = bytes
	}
	store, space, err := newStore(bytes, keep)
	if err != nil {
		return Case{}, err
	}
	e := mem.Extent{Bytes: bytes}
	undo := func() error {
		err := errors.Join(space.Unmap(e), store.Drop(e))
		for more := memory == Readied; more && err == nil; {
			more, err = store.Ready(bytes)
		}
		return err
	}
	closed := func() error { return errors.Join(space.Close(), store.Close()) }
	do := func() (time.Duration, error) {
		d, err := timed(func() error {
			if err := store.Back(e); err != nil {
				return err
			}
			if _, err := space.Map(e, mem.ReadWrite); err != nil {
				return err
			}
			host.Prefault(space.Bytes(e))
			return nil
		})
		if err != nil {
			return 0, err
		}
		return d, undo()
	}
	if memory != Fresh { // the first time it has none
		if _, err := do(); err != nil {
			return Case{}, errors.Join(err, closed())
		}
	}
	return Case{Bytes: bytes, Close: closed, Do: do}, nil
}

// newStore is a store of so many bytes that keeps others, and a space on it.
func newStore(bytes, keep int64) (*host.Store, *host.Space, error) {
	store, err := host.NewStore("bench", bytes, bytes, keep)
	if err != nil {
		return nil, nil, err
	}
	fd, err := unix.FcntlInt(store.File().Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, nil, errors.Join(err, store.Close())
	}
	space, err := host.OpenSpace(os.NewFile(uintptr(fd), "bench"), bytes)
	if err != nil {
		return nil, nil, errors.Join(err, store.Close())
	}
	return store, space, nil
}

// Memcpy copies between two private memories of this process, which both have been touched: what a copy costs when nobody
// shares anything.
func Memcpy(bytes int64) (Case, error) {
	from, err := private(bytes)
	if err != nil {
		return Case{}, err
	}
	to, err := private(bytes)
	if err != nil {
		return Case{}, errors.Join(err, unix.Munmap(from))
	}
	c := Copy(to, from)
	c.Close = func() error { return errors.Join(unix.Munmap(from), unix.Munmap(to)) }
	return c, nil
}

func private(bytes int64) ([]byte, error) {
	p, err := unix.Mmap(-1, 0, int(bytes), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("%d bytes of private memory: %w", bytes, err)
	}
	Fill(p)
	return p, nil
}

// Fill writes all of p: memory that was only read may be one and the same page of zeros.
func Fill(p []byte) {
	n := min(len(p), 4096)
	for i := range n {
		p[i] = byte(i)
	}
	for ; n > 0 && n < len(p); n *= 2 {
		copy(p[n:], p[:n])
	}
}

// Copy copies from to to, both of the same length, which the caller keeps until the case is closed.
func Copy(to, from []byte) Case {
	return Case{Bytes: int64(len(from)), Close: nothing, Do: func() (time.Duration, error) {
		return timed(func() error { copy(to, from); return nil })
	}}
}

// Checksum is the checksum of p, which the caller keeps until the case is closed.
func Checksum(p []byte) Case {
	return Case{Bytes: int64(len(p)), Close: nothing, Do: func() (time.Duration, error) {
		return timed(func() error { mem.Checksum(p); return nil })
	}}
}
