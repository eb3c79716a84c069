package cuda

import (
	"fmt"
	"unsafe"
)

// The copies below are done when they return, and seen by every process that has the memory mapped. They are for moving
// extents, not for the steps of a model, which run on streams.

// Write copies p to device memory. ErrFault or mem.ErrInvalid when at is not mapped for writing.
func (d *Device) Write(at uintptr, p []byte) error {
	if len(p) == 0 {
		return nil
	}
	return d.copied("cuMemcpyHtoD", func() code {
		return d.driver.MemcpyHtoD(devicePointer(at), unsafe.SliceData(p), uint64(len(p)))
	}, "writing %d bytes at %#x", len(p), at)
}

// Read copies device memory to p. ErrFault or mem.ErrInvalid when at is not mapped.
func (d *Device) Read(p []byte, at uintptr) error {
	if len(p) == 0 {
		return nil
	}
	return d.copied("cuMemcpyDtoH", func() code {
		return d.driver.MemcpyDtoH(unsafe.SliceData(p), devicePointer(at), uint64(len(p)))
	}, "reading %d bytes at %#x", len(p), at)
}

// Copy copies within device memory; the ranges must not overlap.
func (d *Device) Copy(to, from uintptr, bytes int64) error {
	return d.copied("cuMemcpyDtoD", func() code {
		return d.driver.MemcpyDtoD(devicePointer(to), devicePointer(from), uint64(bytes))
	}, "copying %d bytes from %#x to %#x", bytes, from, to)
}

// Fill sets device memory to a byte.
func (d *Device) Fill(at uintptr, value byte, bytes int64) error {
	return d.copied("cuMemsetD8", func() code {
		return d.driver.MemsetD8(devicePointer(at), value, uint64(bytes))
	}, "filling %d bytes at %#x", bytes, at)
}

// copied makes a call and waits until the GPU is done: the calls themselves may return once it is queued or staged.
func (d *Device) copied(call string, f func() code, doing string, args ...any) error {
	err := d.do(call, f)
	if err == nil {
		err = d.do("cuCtxSynchronize", d.driver.CtxSynchronize)
	}
	if err != nil {
		return fmt.Errorf(doing+": %w", append(args, err)...)
	}
	return nil
}

// Pinned is host memory that the GPU copies from and to without a detour.
type Pinned struct {
	dev *Device
	p   []byte
}

// NewPinned returns pinned memory of so many bytes, at least 1. The system cannot page it out: use it sparingly.
func NewPinned(d *Device, bytes int64) (*Pinned, error) {
	var p unsafe.Pointer
	if err := d.do("cuMemAllocHost", func() code { return d.driver.MemAllocHost(&p, uint64(bytes)) }); err != nil {
		return nil, fmt.Errorf("pinning %d bytes: %w", bytes, err)
	}
	d.made("pinned memory at", uint64(uintptr(p)))
	return &Pinned{d, unsafe.Slice((*byte)(p), bytes)}, nil
}

// Bytes is the memory, valid until Close.
func (p *Pinned) Bytes() []byte { return p.p }

// Close frees the memory.
func (p *Pinned) Close() error {
	at := unsafe.Pointer(unsafe.SliceData(p.p))
	if at == nil {
		return nil
	}
	if err := p.dev.do("cuMemFreeHost", func() code { return p.dev.driver.MemFreeHost(at) }); err != nil {
		return fmt.Errorf("freeing pinned memory: %w", err)
	}
	p.dev.gone("pinned memory at", uint64(uintptr(at)))
	p.p = nil
	return nil
}
