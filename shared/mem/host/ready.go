package host

import (
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"trireme.dev/shared/mem"
)

// readyChunk is the most bytes of one Ready: whoever ends the one who calls it again and again does not wait for long.
const readyChunk = 4 << 20

// Ready takes memory of the system before anybody wants it, a few MiB at most, lowest addresses first, as they are given out,
// and touches it: the first touch is what costs on a machine whose own memory comes late, as that of a virtual one. It
// reports whether there was anything to do, which there is until bytes are kept, with what Drop has left, or the store has
// as much as it may take. Whoever wants such memory does not wait for a Ready that is under way, and what nobody has
// used goes back when the store or the system runs short. ErrExhausted when the system has none left.
func (s *Store) Ready(bytes int64) (bool, error) {
	s.readying.Lock()
	defer s.readying.Unlock()
	e, ok := s.wanted(bytes)
	if !ok {
		return false, nil
	}
	err := s.take(e)
	return true, errors.Join(err, s.taken(e, err == nil))
}

// take takes the memory of e from the system, page by page: fallocate would hold the file's lock, and who calls Ready may have to wait long
// for a processor then, with everybody behind it who backs or drops.
func (s *Store) take(e mem.Extent) error {
	err := s.touch(e)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOMEM) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EFAULT):
		return fmt.Errorf("readying %v: the system has no memory left: %w: %w", e, mem.ErrExhausted, err)
	}
	return fmt.Errorf("readying %v: %w", e, err)
}

// taken says that what is still coming of e is ready, or a hole again where it could not be taken.
func (s *Store) taken(e mem.Extent, ok bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	pages := s.pages(e)
	for i, st := range pages {
		switch {
		case st == coming && ok:
			s.set(pages[i:i+1], ready)
		case st == coming:
			s.set(pages[i:i+1], hole)
		}
	}
	// A page that was given out meanwhile is its user's. One that is a hole, because it was dropped after that, or trimmed, may have got
	// memory again.
	return eachRun(pages, e.Offset, func(st state, offset, bytes int64) error {
		if st != hole {
			return nil
		}
		return s.punch(offset, bytes)
	})
}

// Unready is how much Ready has still to take from the system for so many bytes to be kept, with what it is about to.
func (s *Store) Unready(bytes int64) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.unready(bytes)
}

func (s *Store) unready(bytes int64) int64 {
	return max(0, min(bytes-s.kept(), s.limit-s.bytes[live]-s.kept())/mem.HostPage*mem.HostPage)
}

// wanted are the next pages to be readied, which are said to be coming; false when there are enough.
func (s *Store) wanted(bytes int64) (mem.Extent, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := min(s.unready(bytes), readyChunk) / mem.HostPage
	first := slices.Index(s.state, hole)
	if n <= 0 || first < 0 {
		return mem.Extent{}, false
	}
	after := first + 1
	for after < len(s.state) && after-first < int(n) && s.state[after] == hole {
		after++
	}
	s.set(s.state[first:after], coming)
	return mem.Extent{Offset: int64(first) * mem.HostPage, Bytes: int64(after-first) * mem.HostPage}, true
}

// touch has the system bring in the pages of e, as a write does. It changes no content: they may be in use already. EFAULT where they have no
// memory, and the system has none.
func (s *Store) touch(e mem.Extent) error {
	p, err := unix.Mmap(int(s.file.Fd()), e.Offset, int(e.Bytes), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("mapping it: %w", err)
	}
	for {
		if err = unix.Madvise(p, unix.MADV_POPULATE_WRITE); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if errors.Is(err, unix.EINVAL) { // before Linux 5.14
		err = touchEach(p)
	}
	return errors.Join(err, unix.Munmap(p))
}

// touchEach is touch where the system cannot do it in one call.
func touchEach(p []byte) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		switch fault := recover().(type) {
		case nil:
		case interface{ Addr() uintptr }: // of the runtime: SIGBUS
			err = unix.EFAULT
		default:
			panic(fault)
		}
	}()
	for i := 0; i < len(p); i += unix.Getpagesize() {
		atomic.OrUint32((*uint32)(unsafe.Pointer(&p[i])), 0)
	}
	return nil
}
