package mem

import (
	"fmt"
	"os"
)

// HostPage is the page of host memory and of host NPUs: 64 KiB, a multiple of every Linux page size.
const HostPage = 64 << 10

// Extent is a run of pages of one space: allocated, mapped and freed together. Its offset fixes its address: an extent
// is always mapped at the base of the space's reservation plus Offset, in one process always the same.
type Extent struct {
	Space  int   // index of the space among those of the node: 0 is host memory, then one a memory domain
	Offset int64 // bytes from the start of the space, a multiple of its page
	Bytes  int64 // a positive multiple of the space's page
}

// String returns the extent as errors print it.
func (e Extent) String() string {
	return fmt.Sprintf("extent %d+%#x of %d bytes", e.Space, e.Offset, e.Bytes)
}

// Check reports with ErrInvalid an extent that is not whole pages inside a space of size bytes.
func (e Extent) Check(page, size int64) error {
	if e.Bytes <= 0 || e.Offset < 0 || e.Bytes%page != 0 || e.Offset%page != 0 || e.Offset > size-e.Bytes {
		return fmt.Errorf("%v: not whole pages of %d bytes in a space of %d: %w", e, page, size, ErrInvalid)
	}
	return nil
}

// Padded rounds n bytes up to whole pages.
func Padded(n, page int64) int64 { return (n + page - 1) / page * page }

// Store is the owner's side of a space: it gives memory to extents and takes it back. Only the HMM has one. It does not
// place extents (mem/page does) and maps nothing. Methods may be called from several goroutines, for disjoint extents.
type Store interface {
	// Page is the granularity of the space in bytes.
	Page() int64
	// Back gives memory to e; it then reads as zeros. On error, which wraps ErrExhausted when there is no memory left, e
	// has none.
	Back(e Extent) error
	// Drop takes the memory of e back; the content is lost. The caller knows that nobody uses it any more. ErrInvalid when
	// a part of e has memory but e is not exactly a backed extent; nil when none has.
	Drop(e Extent) error
	// Cached is the bytes that Drop took back but the store keeps to make the next Back cheap.
	Cached() int64
	// Close gives everything back. Spaces opened on the store stay usable until they are closed themselves. It is
	// idempotent.
	Close() error
}

// Exporter is a Store that has a descriptor for each extent, as accelerators do. A Store that is none has one descriptor
// for all of its memory, with which a Space is opened.
type Exporter interface {
	Store
	// Export returns a new descriptor for the memory of e, for Importer.Import in this or another process; the caller
	// closes it. While it or what was imported from it exists, so does the memory, even after Drop. ErrInvalid when e is
	// not exactly a backed extent.
	Export(e Extent) (*os.File, error)
}

// Space is the user's side: a reserved range of addresses into which extents are mapped. The rules are those of real
// accelerators: whole extents only, no access until mapped, a live mapping is never overwritten, and the caller unmaps
// only when nobody uses the range. Methods may be called from several goroutines.
type Space interface {
	// Page is the granularity of the space in bytes.
	Page() int64
	// Map makes e accessible and returns its address, the same at each call for the same extent. ErrInvalid when e is not
	// whole pages or overlaps a live mapping.
	Map(e Extent, a Access) (uintptr, error)
	// Protect changes the access of a mapped extent; ErrInvalid when e is not exactly one.
	Protect(e Extent, a Access) error
	// Unmap ends the mapping made by Map of this very extent; ErrInvalid when there is none.
	Unmap(e Extent) error
	// Bytes is the memory of a mapped extent, valid until Unmap; nil where the CPU cannot address it.
	Bytes(e Extent) []byte
	// Window reserves another range of so many bytes, whole pages. It is closed before the space is.
	Window(bytes int64) (Window, error)
	// Close unmaps everything and gives the reservation back. Later calls return ErrInvalid; Close itself is idempotent.
	Close() error
}

// Window is a second range of addresses of a Space, in which extents are mapped in an order of the caller's choice, whether or not
// they are mapped in the space: the same memory at several addresses. What is behind a place changes only by Unmap and Map. Methods
// may be called from several goroutines.
type Window interface {
	// Map makes e readable so many bytes from the start of the window, fills the page tables, and returns the address. ErrInvalid when
	// e is not whole pages, not imported into an Importer, not within the window, or over a live mapping.
	Map(at int64, e Extent) (uintptr, error)
	// Unmap ends the mapping that was made at that place; ErrInvalid when there is none. The caller knows that nobody reads it.
	Unmap(at int64) error
	// Bytes is the memory of the extent that is mapped at a place, valid until Unmap; nil where the CPU cannot address it.
	Bytes(at int64) []byte
	// Close unmaps everything and gives the reservation back. It is idempotent.
	Close() error
}

// Importer is a Space on the memory of an Exporter: Map works for imported extents only, otherwise it is ErrInvalid.
type Importer interface {
	Space
	// Import takes over the memory of e from the descriptor that Exporter.Export made for this very extent, and always
	// closes f. ErrInvalid when f is no such descriptor, or e is not whole pages or overlaps an imported extent.
	Import(e Extent, f *os.File) error
	// Forget ends the import, so that the pages may be imported anew with other memory behind them; ErrInvalid while e is
	// mapped, in a window too, or when it is not exactly an imported extent. Unmap alone keeps the import: mapping again is then cheap.
	Forget(e Extent) error
}
