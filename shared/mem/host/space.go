package host

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"trireme.dev/shared/mem"
)

// Space is a mem.Space over the memfd of a Store, in this or another process: a reservation as large as the file, in
// which every extent has its fixed place. The reservation has no access and costs no memory.
type Space struct {
	bytes int64

	mu    sync.Mutex
	file  *os.File       // nil once closed
	base  unsafe.Pointer // of the reservation
	live  map[int64]mapped
	pages pageSet // mapped
}

type mapped struct {
	bytes  int64
	access mem.Access
}

var _ mem.Space = (*Space)(nil)

// OpenSpace reserves addresses for the first bytes of a store's file. It takes the file over and closes it with the
// space, or at once when it fails.
func OpenSpace(f *os.File, bytes int64) (*Space, error) {
	s, err := openSpace(f, bytes)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening a space of %d bytes: %w", bytes, err), f.Close())
	}
	return s, nil
}

func openSpace(f *os.File, bytes int64) (*Space, error) {
	if bytes <= 0 || bytes%mem.HostPage != 0 {
		return nil, fmt.Errorf("not whole pages of %d: %w", mem.HostPage, mem.ErrInvalid)
	}
	if err := sized(f, bytes); err != nil {
		return nil, err
	}
	base, err := reserve(bytes)
	if err != nil {
		return nil, err
	}
	return &Space{
		bytes: bytes, file: f, base: base, live: map[int64]mapped{}, pages: newPageSet(bytes),
	}, nil
}

const reservation = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_NORESERVE

// reserve takes a range of addresses without access.
func reserve(bytes int64) (unsafe.Pointer, error) {
	base, err := unix.MmapPtr(-1, 0, nil, uintptr(bytes), unix.PROT_NONE, reservation)
	if err != nil {
		return nil, fmt.Errorf("reserving addresses: %w", err)
	}
	return base, nil
}

// unmap makes a mapped range a part of its reservation again.
func unmap(at unsafe.Pointer, bytes int64) error {
	_, err := unix.MmapPtr(-1, 0, at, uintptr(bytes), unix.PROT_NONE, reservation|unix.MAP_FIXED)
	return err
}

// Page implements mem.Space.
func (s *Space) Page() int64 { return mem.HostPage }

// Map implements mem.Space.
func (s *Space) Map(e mem.Extent, a mem.Access) (uintptr, error) {
	if err := e.Check(mem.HostPage, s.bytes); err != nil {
		return 0, fmt.Errorf("mapping: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.file == nil {
		return 0, fmt.Errorf("mapping %v: space is closed: %w", e, mem.ErrInvalid)
	}
	if s.pages.any(e.Offset, e.Bytes) {
		return 0, fmt.Errorf("mapping %v over a live mapping: %w", e, mem.ErrInvalid)
	}
	at := unsafe.Add(s.base, e.Offset)
	if _, err := unix.MmapPtr(int(s.file.Fd()), e.Offset, at, uintptr(e.Bytes), prot(a), unix.MAP_SHARED|unix.MAP_FIXED); err != nil {
		return 0, fmt.Errorf("mapping %v: %w", e, err)
	}
	s.live[e.Offset] = mapped{e.Bytes, a}
	s.pages.mark(e.Offset, e.Bytes, true)
	return uintptr(at), nil
}

// Protect implements mem.Space.
func (s *Space) Protect(e mem.Extent, a mem.Access) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	m, ok := s.live[e.Offset]
	if !ok || m.bytes != e.Bytes {
		return fmt.Errorf("protecting %v: no such mapping: %w", e, mem.ErrInvalid)
	}
	if m.access == a {
		return nil
	}
	if err := unix.Mprotect(s.slice(e), prot(a)); err != nil {
		return fmt.Errorf("protecting %v: %w", e, err)
	}
	s.live[e.Offset] = mapped{e.Bytes, a}
	return nil
}

// Unmap implements mem.Space. The place in the reservation stays, without access.
func (s *Space) Unmap(e mem.Extent) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if m, ok := s.live[e.Offset]; !ok || m.bytes != e.Bytes {
		return fmt.Errorf("unmapping %v: no such mapping: %w", e, mem.ErrInvalid)
	}
	if err := unmap(unsafe.Add(s.base, e.Offset), e.Bytes); err != nil {
		return fmt.Errorf("unmapping %v: %w", e, err)
	}
	delete(s.live, e.Offset)
	s.pages.mark(e.Offset, e.Bytes, false)
	return nil
}

// Bytes implements mem.Space.
func (s *Space) Bytes(e mem.Extent) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	if m, ok := s.live[e.Offset]; !ok || m.bytes != e.Bytes {
		return nil
	}
	return s.slice(e)
}

// Mapped is the number of live mappings.
func (s *Space) Mapped() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.live)
}

// Close implements mem.Space.
func (s *Space) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.file == nil {
		return nil
	}
	err := s.file.Close()
	s.file = nil
	clear(s.live)
	clear(s.pages)
	if uerr := unix.MunmapPtr(s.base, uintptr(s.bytes)); uerr != nil {
		err = errors.Join(err, fmt.Errorf("giving the reservation back: %w", uerr))
	}
	s.base = nil
	return err
}

func (s *Space) slice(e mem.Extent) []byte {
	return unsafe.Slice((*byte)(unsafe.Add(s.base, e.Offset)), e.Bytes)
}

// pageSet has a bit a page.
type pageSet []uint64

func newPageSet(bytes int64) pageSet { return make(pageSet, (bytes/mem.HostPage+63)/64) }

// any reports whether a page of a range of bytes, whole pages, is in the set.
func (s pageSet) any(offset, bytes int64) bool {
	for p := offset / mem.HostPage; p < (offset+bytes)/mem.HostPage; p++ {
		if s[p/64]&(1<<(p%64)) != 0 {
			return true
		}
	}
	return false
}

// mark puts a range into the set, or takes it out.
func (s pageSet) mark(offset, bytes int64, in bool) {
	for p := offset / mem.HostPage; p < (offset+bytes)/mem.HostPage; p++ {
		if in {
			s[p/64] |= 1 << (p % 64)
		} else {
			s[p/64] &^= 1 << (p % 64)
		}
	}
}

func prot(a mem.Access) int {
	if a == mem.ReadWrite {
		return unix.PROT_READ | unix.PROT_WRITE
	}
	return unix.PROT_READ
}
