package cuda

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"

	"trireme.dev/shared/mem"
)

// Store is a mem.Exporter on a GPU: one allocation an extent. It keeps no freed memory back, as fresh memory is cheap
// here; and since an allocation lives as long as anybody has it imported, memory dropped too early is lost to the GPU for
// that time, but never given to somebody else beneath a map.
type Store struct {
	dev  *Device
	base devicePointer // of a reservation in which fresh memory is mapped for a moment, to be zeroed

	mu    sync.Mutex
	inUse pages            // backed, or about to be
	live  map[int64]backed // by offset
	done  bool             // closed
}

type backed struct {
	bytes  int64
	memory allocation
}

var _ mem.Exporter = (*Store)(nil)

// pages is a mark a page of a space.
type pages []bool

func (p pages) of(e mem.Extent, page int64) pages { return p[e.Offset/page : (e.Offset+e.Bytes)/page] }

func (p pages) set(to bool) {
	for i := range p {
		p[i] = to
	}
}

// NewStore returns a store of an address room of bytes, whole pages, which may exceed the memory of the GPU. The device
// must outlive it.
func NewStore(d *Device, bytes int64) (*Store, error) {
	if bytes <= 0 || bytes%d.info.Page != 0 {
		return nil, fmt.Errorf("a store of %d bytes: not whole pages of %d: %w", bytes, d.info.Page, mem.ErrInvalid)
	}
	base, err := d.reserve(bytes)
	if err != nil {
		return nil, fmt.Errorf("a store of %d bytes: %w", bytes, err)
	}
	return &Store{dev: d, base: base, inUse: make(pages, bytes/d.info.Page), live: map[int64]backed{}}, nil
}

// Page implements mem.Store.
func (s *Store) Page() int64 { return s.dev.info.Page }

// Bytes is the address room of the store.
func (s *Store) Bytes() int64 { return int64(len(s.inUse)) * s.dev.info.Page }

// Cached implements mem.Store: it is always 0.
func (s *Store) Cached() int64 { return 0 }

// Back implements mem.Store.
func (s *Store) Back(e mem.Extent) error {
	if err := e.Check(s.Page(), s.Bytes()); err != nil {
		return err
	}
	s.mu.Lock()
	in := s.inUse.of(e, s.Page())
	if s.done || slices.Contains(in, true) {
		s.mu.Unlock()
		return fmt.Errorf("backing %v: part of it is in use, or the store is closed: %w", e, mem.ErrInvalid)
	}
	in.set(true)
	s.mu.Unlock()

	a, err := s.zeroed(e)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		in.set(false)
		if errors.Is(err, mem.ErrExhausted) {
			free, ferr := s.dev.Free()
			return errors.Join(fmt.Errorf("backing %v: GPU %d has %d of %d bytes free: %w",
				e, s.dev.info.Ordinal, free, s.dev.info.Bytes, err), ferr)
		}
		return fmt.Errorf("backing %v: %w", e, err)
	}
	s.live[e.Offset] = backed{e.Bytes, a}
	return nil
}

// zeroed returns memory for e that reads as zeros for everyone who maps it from now on.
func (s *Store) zeroed(e mem.Extent) (allocation, error) {
	a, err := s.dev.create(e.Bytes)
	if err != nil {
		return 0, err
	}
	if err := s.zero(a, s.base+devicePointer(e.Offset), e.Bytes); err != nil {
		return 0, errors.Join(err, s.dev.release(a))
	}
	return a, nil
}

func (s *Store) zero(a allocation, at devicePointer, bytes int64) error {
	if err := s.dev.mapAt(at, bytes, a); err != nil {
		return err
	}
	err := s.dev.setAccess(at, bytes, mem.ReadWrite)
	if err == nil {
		err = s.dev.Fill(uintptr(at), 0, bytes)
	}
	return errors.Join(err, s.dev.unmap(at, bytes))
}

// Drop implements mem.Store. An extent that has no memory, after a Back that failed, is passed over.
func (s *Store) Drop(e mem.Extent) error {
	if err := e.Check(s.Page(), s.Bytes()); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	b, ok := s.live[e.Offset]
	if !ok && !slices.Contains(s.inUse.of(e, s.Page()), true) {
		return nil
	}
	if !ok || b.bytes != e.Bytes {
		return fmt.Errorf("dropping %v: not exactly a backed extent: %w", e, mem.ErrInvalid)
	}
	delete(s.live, e.Offset)
	s.inUse.of(e, s.Page()).set(false)
	if err := s.dev.release(b.memory); err != nil {
		return fmt.Errorf("dropping %v: %w", e, err)
	}
	return nil
}

// Export implements mem.Exporter.
func (s *Store) Export(e mem.Extent) (*os.File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, ok := s.live[e.Offset]
	if !ok || b.bytes != e.Bytes {
		return nil, fmt.Errorf("exporting %v: not exactly a backed extent: %w", e, mem.ErrInvalid)
	}
	f, err := s.dev.export(b.memory)
	if err != nil {
		return nil, fmt.Errorf("exporting %v: %w", e, err)
	}
	return f, nil
}

// Close implements mem.Store. It must not be called during another call.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done {
		return nil
	}
	s.done = true
	var errs []error
	for _, b := range s.live {
		errs = append(errs, s.dev.release(b.memory))
	}
	clear(s.live)
	clear(s.inUse)
	if err := errors.Join(append(errs, s.dev.unreserve(s.base, s.Bytes()))...); err != nil {
		return fmt.Errorf("closing a store: %w", err)
	}
	return nil
}
