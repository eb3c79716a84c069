package cuda

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"

	"trireme.dev/shared/mem"
)

// Space is a mem.Importer on a GPU: a reserved range of addresses in which every imported extent has its fixed place.
type Space struct {
	dev  *Device
	base devicePointer

	mu       sync.Mutex
	inUse    pages               // imported
	imported map[int64]*imported // by offset; nil once closed
}

type imported struct {
	bytes   int64
	memory  allocation
	mapped  bool
	access  mem.Access // of the mapping
	windows int        // mappings in windows
}

var _ mem.Importer = (*Space)(nil)

// OpenSpace reserves addresses for a store of so many bytes. The device must outlive the space.
func OpenSpace(d *Device, bytes int64) (*Space, error) {
	if bytes <= 0 || bytes%d.info.Page != 0 {
		return nil, fmt.Errorf("a space of %d bytes: not whole pages of %d: %w", bytes, d.info.Page, mem.ErrInvalid)
	}
	base, err := d.reserve(bytes)
	if err != nil {
		return nil, fmt.Errorf("a space of %d bytes: reserving addresses: %w", bytes, err)
	}
	return &Space{dev: d, base: base, inUse: make(pages, bytes/d.info.Page), imported: map[int64]*imported{}}, nil
}

// Page implements mem.Space.
func (s *Space) Page() int64 { return s.dev.info.Page }

func (s *Space) size() int64 { return int64(len(s.inUse)) * s.Page() }

func (s *Space) at(e mem.Extent) devicePointer { return s.base + devicePointer(e.Offset) }

// Import implements mem.Importer. Whether there is as much memory as e says shows in Map only: the driver does not tell.
func (s *Space) Import(e mem.Extent, f *os.File) error {
	err := s.take(e, f)
	if cerr := f.Close(); err == nil && cerr != nil {
		err = fmt.Errorf("importing %v: closing the descriptor: %w", e, cerr)
	}
	return err
}

func (s *Space) take(e mem.Extent, f *os.File) error {
	if err := e.Check(s.Page(), s.size()); err != nil {
		return fmt.Errorf("importing: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	in := s.inUse.of(e, s.Page())
	if s.imported == nil || slices.Contains(in, true) {
		return fmt.Errorf("importing %v: over an imported extent, or the space is closed: %w", e, mem.ErrInvalid)
	}
	a, err := s.dev.importFD(f)
	if err != nil {
		return fmt.Errorf("importing %v: %w", e, err)
	}
	s.imported[e.Offset] = &imported{bytes: e.Bytes, memory: a}
	in.set(true)
	return nil
}

// Forget implements mem.Importer.
func (s *Space) Forget(e mem.Extent) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	i, ok := s.exactly(e)
	if !ok || i.mapped || i.windows > 0 {
		return fmt.Errorf("forgetting %v: mapped, or not exactly an imported extent: %w", e, mem.ErrInvalid)
	}
	delete(s.imported, e.Offset)
	s.inUse.of(e, s.Page()).set(false)
	if err := s.dev.release(i.memory); err != nil {
		return fmt.Errorf("forgetting %v: %w", e, err)
	}
	return nil
}

// exactly returns the import of e. s.mu is held.
func (s *Space) exactly(e mem.Extent) (*imported, bool) {
	i, ok := s.imported[e.Offset]
	return i, ok && i.bytes == e.Bytes
}

// Map implements mem.Space.
func (s *Space) Map(e mem.Extent, a mem.Access) (uintptr, error) {
	if err := e.Check(s.Page(), s.size()); err != nil {
		return 0, fmt.Errorf("mapping: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	i, ok := s.exactly(e)
	if !ok || i.mapped {
		return 0, fmt.Errorf("mapping %v: mapped already, or not exactly an imported extent: %w", e, mem.ErrInvalid)
	}
	if err := s.dev.mapAt(s.at(e), e.Bytes, i.memory); err != nil {
		return 0, fmt.Errorf("mapping %v: %w", e, err)
	}
	if err := s.dev.setAccess(s.at(e), e.Bytes, a); err != nil {
		return 0, errors.Join(fmt.Errorf("mapping %v: %w", e, err), s.dev.unmap(s.at(e), e.Bytes))
	}
	i.mapped, i.access = true, a
	return uintptr(s.at(e)), nil
}

// Protect implements mem.Space.
func (s *Space) Protect(e mem.Extent, a mem.Access) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	i, ok := s.exactly(e)
	if !ok || !i.mapped {
		return fmt.Errorf("protecting %v: no such mapping: %w", e, mem.ErrInvalid)
	}
	if i.access == a {
		return nil
	}
	if err := s.dev.setAccess(s.at(e), e.Bytes, a); err != nil {
		return fmt.Errorf("protecting %v: %w", e, err)
	}
	i.access = a
	return nil
}

// Unmap implements mem.Space. The import stays.
func (s *Space) Unmap(e mem.Extent) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	i, ok := s.exactly(e)
	if !ok || !i.mapped {
		return fmt.Errorf("unmapping %v: no such mapping: %w", e, mem.ErrInvalid)
	}
	if err := s.dev.unmap(s.at(e), e.Bytes); err != nil {
		return fmt.Errorf("unmapping %v: %w", e, err)
	}
	i.mapped = false
	return nil
}

// Bytes implements mem.Space: the CPU cannot address this memory, so it is nil. Device.Read and Device.Write copy.
func (s *Space) Bytes(mem.Extent) []byte { return nil }

// Close implements mem.Space.
func (s *Space) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.imported == nil {
		return nil
	}
	var errs []error
	for offset, i := range s.imported {
		if i.mapped {
			errs = append(errs, s.dev.unmap(s.base+devicePointer(offset), i.bytes))
		}
		errs = append(errs, s.dev.release(i.memory))
	}
	s.imported = nil
	if err := errors.Join(append(errs, s.dev.unreserve(s.base, s.size()))...); err != nil {
		return fmt.Errorf("closing a space: %w", err)
	}
	return nil
}
