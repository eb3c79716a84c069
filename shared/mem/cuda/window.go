package cuda

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"trireme.dev/shared/mem"
)

// Window is a mem.Window on a GPU: the driver maps an allocation at as many addresses as one likes.
type Window struct {
	space *Space
	base  devicePointer

	mu    sync.Mutex
	inUse pages
	live  map[int64]mem.Extent // by place; nil once closed
}

var _ mem.Window = (*Window)(nil)

// Window implements mem.Space.
func (s *Space) Window(bytes int64) (mem.Window, error) {
	if bytes <= 0 || bytes%s.Page() != 0 {
		return nil, fmt.Errorf("a window of %d bytes: not whole pages of %d: %w", bytes, s.Page(), mem.ErrInvalid)
	}
	base, err := s.dev.reserve(bytes)
	if err != nil {
		return nil, fmt.Errorf("a window of %d bytes: reserving addresses: %w", bytes, err)
	}
	return &Window{space: s, base: base, inUse: make(pages, bytes/s.Page()), live: map[int64]mem.Extent{}}, nil
}

func (w *Window) bytes() int64 { return int64(len(w.inUse)) * w.space.Page() }

func (w *Window) address(at int64) devicePointer { return w.base + devicePointer(at) }

// Map implements mem.Window.
func (w *Window) Map(at int64, e mem.Extent) (uintptr, error) {
	place := mem.Extent{Offset: at, Bytes: e.Bytes}
	if err := place.Check(w.space.Page(), w.bytes()); err != nil {
		return 0, fmt.Errorf("mapping %v at %#x of a window of %d bytes: %w", e, at, w.bytes(), err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	in := w.inUse.of(place, w.space.Page())
	if w.live == nil || slices.Contains(in, true) {
		return 0, fmt.Errorf("mapping %v at %#x of a window: closed, or over a live mapping: %w", e, at, mem.ErrInvalid)
	}
	if err := w.space.mapTo(w.address(at), e); err != nil {
		return 0, fmt.Errorf("mapping %v at %#x of a window: %w", e, at, err)
	}
	w.live[at] = e
	in.set(true)
	return uintptr(w.address(at)), nil
}

// mapTo maps an imported extent at an address of a window.
func (s *Space) mapTo(to devicePointer, e mem.Extent) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	i, ok := s.exactly(e)
	if !ok {
		return fmt.Errorf("not exactly an imported extent: %w", mem.ErrInvalid)
	}
	if err := s.dev.mapAt(to, e.Bytes, i.memory); err != nil {
		return err
	}
	if err := s.dev.setAccess(to, e.Bytes, mem.ReadOnly); err != nil {
		return errors.Join(err, s.dev.unmap(to, e.Bytes))
	}
	i.windows++
	return nil
}

// unmapFrom ends a mapping made by mapTo.
func (s *Space) unmapFrom(at devicePointer, e mem.Extent) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.dev.unmap(at, e.Bytes); err != nil {
		return err
	}
	if i, ok := s.exactly(e); ok {
		i.windows--
	}
	return nil
}

// Unmap implements mem.Window.
func (w *Window) Unmap(at int64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	e, ok := w.live[at]
	if !ok {
		return fmt.Errorf("unmapping %#x of a window: nothing was mapped there: %w", at, mem.ErrInvalid)
	}
	if err := w.space.unmapFrom(w.address(at), e); err != nil {
		return fmt.Errorf("unmapping %#x of a window: %w", at, err)
	}
	delete(w.live, at)
	w.inUse.of(mem.Extent{Offset: at, Bytes: e.Bytes}, w.space.Page()).set(false)
	return nil
}

// Bytes implements mem.Window: the CPU cannot address this memory.
func (w *Window) Bytes(int64) []byte { return nil }

// Close implements mem.Window.
func (w *Window) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.live == nil {
		return nil
	}
	var errs []error
	for at, e := range w.live {
		errs = append(errs, w.space.unmapFrom(w.address(at), e))
	}
	w.live = nil
	if err := errors.Join(append(errs, w.space.dev.unreserve(w.base, w.bytes()))...); err != nil {
		return fmt.Errorf("closing a window: %w", err)
	}
	return nil
}
