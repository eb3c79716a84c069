package cuda

import (
	"errors"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"trireme.dev/shared/mem"
)

// What the driver does with memory, one call each.

func (d *Device) create(bytes int64) (allocation, error) {
	var a allocation
	err := d.do("cuMemCreate", func() code { return d.driver.MemCreate(&a, uint64(bytes), exportable(d.id), 0) })
	if err == nil {
		d.made("allocation", uint64(a))
	}
	return a, err
}

// release ends a handle made by create or importFD. The memory goes back once all handles, maps and descriptors are gone.
func (d *Device) release(a allocation) error {
	err := d.do("cuMemRelease", func() code { return d.driver.MemRelease(a) })
	if err == nil {
		d.gone("allocation", uint64(a))
	}
	return err
}

// export makes a new descriptor, which no child process inherits.
func (d *Device) export(a allocation) (*os.File, error) {
	fd := int32(-1)
	syscall.ForkLock.RLock()
	err := d.do("cuMemExportToShareableHandle", func() code { return d.driver.MemExport(&fd, a, handleFD, 0) })
	if err == nil {
		unix.CloseOnExec(int(fd))
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "memory of a GPU"), nil
}

// importFD makes a handle to the memory that a descriptor stands for, and leaves the descriptor open.
func (d *Device) importFD(f *os.File) (allocation, error) {
	var a allocation
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	cerr := raw.Control(func(fd uintptr) {
		err = d.do("cuMemImportFromShareableHandle", func() code { return d.driver.MemImport(&a, fd, handleFD) })
	})
	if err = errors.Join(cerr, err); err == nil {
		d.made("allocation", uint64(a))
	}
	return a, err
}

// reserve takes a range of addresses that is aligned to pages and can be mapped to.
func (d *Device) reserve(bytes int64) (devicePointer, error) {
	var at devicePointer
	err := d.do("cuMemAddressReserve", func() code {
		return d.driver.MemAddressReserve(&at, uint64(bytes), uint64(d.info.Page), 0, 0)
	})
	if err == nil {
		d.made("reservation at", uint64(at))
	}
	return at, err
}

func (d *Device) unreserve(at devicePointer, bytes int64) error {
	err := d.do("cuMemAddressFree", func() code { return d.driver.MemAddressFree(at, uint64(bytes)) })
	if err == nil {
		d.gone("reservation at", uint64(at))
	}
	return err
}

// mapAt maps a whole allocation; it has no access until setAccess.
func (d *Device) mapAt(at devicePointer, bytes int64, a allocation) error {
	err := d.do("cuMemMap", func() code { return d.driver.MemMap(at, uint64(bytes), 0, a, 0) })
	if err == nil {
		d.made("mapping at", uint64(at))
	}
	return err
}

// unmap waits for nothing: nobody may use the range any more. The driver takes whole mappings only, several neighbours too,
// and does not tell when there is none (seen on driver 580): the books are the caller's.
func (d *Device) unmap(at devicePointer, bytes int64) error {
	err := d.do("cuMemUnmap", func() code { return d.driver.MemUnmap(at, uint64(bytes)) })
	if err == nil {
		d.gone("mapping at", uint64(at))
	}
	return err
}

func (d *Device) setAccess(at devicePointer, bytes int64, a mem.Access) error {
	desc := accessDesc{location{locationDevice, int32(d.id)}, accessRead}
	if a == mem.ReadWrite {
		desc.flags = accessReadWrite
	}
	return d.do("cuMemSetAccess", func() code { return d.driver.MemSetAccess(at, uint64(bytes), &desc, 1) })
}
