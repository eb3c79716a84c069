package host

import (
	"fmt"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"trireme.dev/shared/mem"
)

// Window is a mem.Window over a store's memfd.
type Window struct {
	space *Space
	bytes int64

	mu    sync.Mutex
	base  unsafe.Pointer  // of the reservation; nil once closed
	live  map[int64]int64 // place -> bytes
	pages pageSet         // mapped
}

var _ mem.Window = (*Window)(nil)

// Window implements mem.Space.
func (s *Space) Window(bytes int64) (mem.Window, error) {
	if bytes <= 0 || bytes%mem.HostPage != 0 {
		return nil, fmt.Errorf("a window of %d bytes: not whole pages of %d: %w", bytes, mem.HostPage, mem.ErrInvalid)
	}
	base, err := reserve(bytes)
	if err != nil {
		return nil, fmt.Errorf("a window of %d bytes: %w", bytes, err)
	}
	return &Window{space: s, bytes: bytes, base: base, live: map[int64]int64{}, pages: newPageSet(bytes)}, nil
}

// Map implements mem.Window.
func (w *Window) Map(at int64, e mem.Extent) (uintptr, error) {
	if err := e.Check(mem.HostPage, w.space.bytes); err != nil {
		return 0, fmt.Errorf("mapping into a window: %w", err)
	}
	if err := (mem.Extent{Offset: at, Bytes: e.Bytes}).Check(mem.HostPage, w.bytes); err != nil {
		return 0, fmt.Errorf("mapping %v at %#x of a window of %d bytes: %w", e, at, w.bytes, err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.base == nil || w.pages.any(at, e.Bytes) {
		return 0, fmt.Errorf("mapping %v at %#x of a window: closed, or over a live mapping: %w", e, at, mem.ErrInvalid)
	}
	to := unsafe.Add(w.base, at)
	if err := w.space.mapTo(to, e); err != nil {
		return 0, fmt.Errorf("mapping %v at %#x of a window: %w", e, at, err)
	}
	w.live[at] = e.Bytes
	w.pages.mark(at, e.Bytes, true)
	return uintptr(to), nil
}

// mapTo maps an extent at an address of a window and fills the page tables.
func (s *Space) mapTo(to unsafe.Pointer, e mem.Extent) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.file == nil {
		return fmt.Errorf("the space is closed: %w", mem.ErrInvalid)
	}
	_, err := unix.MmapPtr(int(s.file.Fd()), e.Offset, to, uintptr(e.Bytes), unix.PROT_READ,
		unix.MAP_SHARED|unix.MAP_FIXED|unix.MAP_POPULATE)
	return err
}

// Unmap implements mem.Window.
func (w *Window) Unmap(at int64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	bytes, ok := w.live[at]
	if !ok {
		return fmt.Errorf("unmapping %#x of a window: nothing was mapped there: %w", at, mem.ErrInvalid)
	}
	if err := unmap(unsafe.Add(w.base, at), bytes); err != nil {
		return fmt.Errorf("unmapping %#x of a window: %w", at, err)
	}
	delete(w.live, at)
	w.pages.mark(at, bytes, false)
	return nil
}

// Bytes implements mem.Window.
func (w *Window) Bytes(at int64) []byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	bytes, ok := w.live[at]
	if !ok {
		return nil
	}
	return unsafe.Slice((*byte)(unsafe.Add(w.base, at)), bytes)
}

// Close implements mem.Window.
func (w *Window) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.base == nil {
		return nil
	}
	if err := unix.MunmapPtr(w.base, uintptr(w.bytes)); err != nil {
		return fmt.Errorf("closing a window: giving the reservation back: %w", err)
	}
	w.base = nil
	clear(w.live)
	return nil
}
