package host

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"trireme.dev/shared/mem"
)

// Store is a mem.Store over a memfd. Memory is given by fallocate, so that running out of it is an error here and not a
// SIGBUS in whoever touches the page first. Dropped pages are kept up to a mark and zeroed when they are used again:
// zeroing costs a fraction of what fresh memory does (4 s a GiB on some virtual machines); above the mark they are
// punched out of the file. Ready takes memory ahead of those who will want it.
type Store struct {
	file  *os.File
	limit int64 // most bytes of all pages with memory, unless the live ones alone are more
	keep  int64 // most bytes of pages that are not live for Drop to keep more

	readying sync.Mutex // one Ready at a time

	mu      sync.Mutex
	state   []state         // by page
	extents map[int64]int64 // offset -> bytes of those that Back has, or is about to have, given memory
	bytes   [states]int64   // of the pages in each state
}

var _ mem.Store = (*Store)(nil)

type state uint8

const (
	hole   state = iota // no memory behind it, reads as zeros
	live                // part of an extent
	cached              // memory with old content
	coming              // Ready is giving it memory, reads as zeros
	ready               // memory that nobody has used, reads as zeros
	states
)

// chunk is the most bytes of one fallocate or write: such a call starts over when a signal comes, so it is kept short.
const chunk = 16 << 20

// NewStore returns a store of an address room of bytes (whole pages; sparse, so it may exceed the memory of the
// machine). Freed memory is cached up to keep bytes, with what is ready, as long as limit, the memory that the space may
// really take, has room for it.
func NewStore(name string, bytes, limit, keep int64) (*Store, error) {
	if bytes <= 0 || bytes%mem.HostPage != 0 {
		return nil, fmt.Errorf("store %s of %d bytes: not whole pages of %d: %w", name, bytes, mem.HostPage, mem.ErrInvalid)
	}
	f, err := memfd(name, bytes)
	if err != nil {
		return nil, err
	}
	if err := seal(f, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	s := &Store{file: f, limit: limit, keep: keep, state: make([]state, bytes/mem.HostPage), extents: map[int64]int64{}}
	s.bytes[hole] = bytes
	return s, nil
}

// File is the memfd, owned by the store: what another process needs to open a Space.
func (s *Store) File() *os.File { return s.file }

// Page implements mem.Store.
func (s *Store) Page() int64 { return mem.HostPage }

// Bytes is the address room of the store.
func (s *Store) Bytes() int64 { return int64(len(s.state)) * mem.HostPage }

// Cached implements mem.Store.
func (s *Store) Cached() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.kept()
}

// kept is the bytes with memory that nobody uses, idle these and what is coming, held all bytes that have memory or are to get it. s.mu is
// held.
func (s *Store) kept() int64 { return s.bytes[cached] + s.bytes[ready] }
func (s *Store) idle() int64 { return s.kept() + s.bytes[coming] }
func (s *Store) held() int64 { return s.bytes[live] + s.idle() }

// Resident is the memory that the store takes, by the books of the system: live extents and what is cached, once no Back,
// Drop or Ready is under way. ErrInvalid when the store is closed.
func (s *Store) Resident() (int64, error) {
	var st unix.Stat_t
	raw, err := s.file.SyscallConn()
	if err == nil {
		cerr := raw.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &st) })
		if cerr != nil {
			return 0, fmt.Errorf("looking at a closed store: %w: %w", mem.ErrInvalid, cerr)
		}
	}
	if err != nil {
		return 0, fmt.Errorf("looking at %s: %w", s.file.Name(), err)
	}
	return st.Blocks * 512, nil // stat(2)'s unit
}

// Back implements mem.Store.
func (s *Store) Back(e mem.Extent) error {
	if err := e.Check(mem.HostPage, s.Bytes()); err != nil {
		return err
	}
	s.mu.Lock()
	pages := s.pages(e)
	if slices.Contains(pages, live) {
		s.mu.Unlock()
		return fmt.Errorf("backing %v: part of it is in use: %w", e, mem.ErrInvalid)
	}
	old := slices.Clone(pages)
	s.set(pages, live)
	s.extents[e.Offset] = e.Bytes
	s.trim(s.held() - s.limit)
	s.mu.Unlock()

	err := s.fill(e, old)
	if errors.Is(err, unix.ENOMEM) || errors.Is(err, unix.ENOSPC) {
		s.mu.Lock()
		s.trim(s.idle()) // what is kept elsewhere may be what is missing
		s.mu.Unlock()
		err = s.fill(e, old)
	}
	if err == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.set(pages, hole)
	delete(s.extents, e.Offset)
	if perr := s.punch(e.Offset, e.Bytes); perr != nil {
		err = errors.Join(err, perr)
	}
	if errors.Is(err, unix.ENOMEM) || errors.Is(err, unix.ENOSPC) {
		return fmt.Errorf("backing %v: the system has no memory left: %w: %w", e, mem.ErrExhausted, err)
	}
	return fmt.Errorf("backing %v: %w", e, err)
}

// Drop implements mem.Store. An extent that has no memory, after a Back that failed, is passed over.
func (s *Store) Drop(e mem.Extent) error {
	if err := e.Check(mem.HostPage, s.Bytes()); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	pages := s.pages(e)
	if !slices.Contains(pages, live) {
		return nil
	}
	if s.extents[e.Offset] != e.Bytes {
		return fmt.Errorf("dropping %v: not exactly a backed extent: %w", e, mem.ErrInvalid)
	}
	delete(s.extents, e.Offset)
	if s.idle()+e.Bytes <= s.keep && s.held() <= s.limit {
		s.set(pages, cached)
		return nil
	}
	s.set(pages, hole)
	return s.punch(e.Offset, e.Bytes)
}

// Close implements mem.Store: the memory goes back when the last process that has the file open or mapped lets go.
func (s *Store) Close() error {
	if err := s.file.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

func (s *Store) pages(e mem.Extent) []state {
	return s.state[e.Offset/mem.HostPage : (e.Offset+e.Bytes)/mem.HostPage]
}

// set changes the state of pages and keeps the books. s.mu is held.
func (s *Store) set(pages []state, to state) {
	for i, from := range pages {
		s.bytes[from] -= mem.HostPage
		s.bytes[to] += mem.HostPage
		pages[i] = to
	}
}

// trim gives back so much of the memory that nobody uses, or all of it, highest addresses first: the lowest are given out next. s.mu is
// held, so that nobody takes a page meanwhile. What is coming has its memory taken by Ready, which finds that it is not wanted any more.
func (s *Store) trim(bytes int64) {
	for end := int64(len(s.state)); end > 0 && bytes > 0; {
		st, first := s.state[end-1], end-1
		if st == hole || st == live {
			end--
			continue
		}
		for first > 0 && s.state[first-1] == st && (end-first)*mem.HostPage < bytes {
			first--
		}
		n := (end - first) * mem.HostPage
		if st == coming || s.punch(first*mem.HostPage, n) == nil {
			s.set(s.state[first:end], hole)
			bytes -= n
		}
		end = first
	}
}

// fill makes e, whose pages were in the states old, memory that reads as zeros.
func (s *Store) fill(e mem.Extent, old []state) error {
	return eachRun(old, e.Offset, func(st state, offset, bytes int64) error {
		if st == ready {
			return nil
		}
		for bytes > 0 {
			n := min(bytes, chunk)
			var err error
			if st == cached {
				n, err = s.zero(offset, n)
			} else {
				err = s.fallocate(unix.FALLOC_FL_KEEP_SIZE, offset, n)
			}
			if err != nil {
				return err
			}
			offset += n
			bytes -= n
		}
		return nil
	})
}

var zeros [1 << 20]byte // never written

func (s *Store) zero(offset, bytes int64) (int64, error) {
	n, err := s.file.WriteAt(zeros[:min(bytes, int64(len(zeros)))], offset)
	return int64(n), err
}

func (s *Store) punch(offset, bytes int64) error {
	return s.fallocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, offset, bytes)
}

func (s *Store) fallocate(mode uint32, offset, bytes int64) error {
	for {
		err := unix.Fallocate(int(s.file.Fd()), mode, offset, bytes)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// eachRun calls f for each run of pages of one state, with offsets counted from base.
func eachRun(pages []state, base int64, f func(st state, offset, bytes int64) error) error {
	for i := 0; i < len(pages); {
		j := i + 1
		for j < len(pages) && pages[j] == pages[i] {
			j++
		}
		if err := f(pages[i], base+int64(i)*mem.HostPage, int64(j-i)*mem.HostPage); err != nil {
			return err
		}
		i = j
	}
	return nil
}
