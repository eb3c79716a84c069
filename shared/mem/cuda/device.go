// Package cuda is device memory on NVIDIA GPUs, after the rules of shared/mem: an extent is an allocation of its own
// (cuMemCreate) with a descriptor of its own, which one process exports and others import and map, each at the extent's
// place in a reserved range of addresses. It calls the driver (libcuda.so.1) without cgo, launches no kernels, places
// nothing (mem/page does) and knows no protocol. A program that imports it is linked dynamically against libc.
package cuda

import (
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"

	"trireme.dev/shared/mem"
)

// Info describes a GPU.
type Info struct {
	Ordinal int    // among the GPUs that the driver shows this process (CUDA_VISIBLE_DEVICES)
	Name    string // as the vendor calls it
	Bytes   int64  // of memory
	Page    int64  // granularity of extents in bytes
}

// Devices lists the GPUs whose memory can be shared between processes. It wraps mem.ErrNotSupported when there is no
// driver or no such GPU; other errors mean that there is one and it does not work.
func Devices() ([]Info, error) {
	d, err := initialised()
	if err != nil {
		return nil, err
	}
	var n int32
	if err := d.check("cuDeviceGetCount", d.DeviceCount(&n)); err != nil {
		return nil, err
	}
	var infos []Info
	var unfit error
	for i := range int(n) {
		_, info, err := d.describe(i)
		switch {
		case errors.Is(err, mem.ErrNotSupported):
			unfit = errors.Join(unfit, err)
		case err != nil:
			return nil, err
		default:
			infos = append(infos, info)
		}
	}
	if len(infos) == 0 {
		return nil, errors.Join(fmt.Errorf("none of %d GPUs can share memory: %w", n, mem.ErrNotSupported), unfit)
	}
	return infos, nil
}

func initialised() (*driver, error) {
	d, err := load()
	if err != nil {
		return nil, err
	}
	if err := d.check("cuInit", d.Init(0)); err != nil {
		return nil, fmt.Errorf("starting the CUDA driver: %w", err)
	}
	return d, nil
}

// describe looks a GPU up; mem.ErrNotSupported when its memory cannot be shared.
func (d *driver) describe(ordinal int) (device, Info, error) {
	var id device
	if err := d.check("cuDeviceGet", d.DeviceGet(&id, int32(ordinal))); err != nil {
		return 0, Info{}, fmt.Errorf("GPU %d: %w", ordinal, err)
	}
	for _, need := range []struct {
		attribute int32
		what      string
	}{{attributeVMM, "virtual memory management"}, {attributeFD, "memory shared by descriptor"}} {
		var has int32
		if err := d.check("cuDeviceGetAttribute", d.DeviceAttr(&has, need.attribute, id)); err != nil {
			return 0, Info{}, fmt.Errorf("GPU %d: %w", ordinal, err)
		}
		if has == 0 {
			return 0, Info{}, fmt.Errorf("GPU %d has no %s: %w", ordinal, need.what, mem.ErrNotSupported)
		}
	}
	var name [256]byte
	var total, page uint64
	err := errors.Join(
		d.check("cuDeviceGetName", d.DeviceName(&name[0], int32(len(name)), id)),
		d.check("cuDeviceTotalMem", d.DeviceTotalMem(&total, id)),
		d.check("cuMemGetAllocationGranularity", d.MemGranularity(&page, exportable(id), granularityMinimum)),
	)
	if err != nil {
		return 0, Info{}, fmt.Errorf("GPU %d: %w", ordinal, err)
	}
	return id, Info{ordinal, unix.ByteSliceToString(name[:]), int64(total), int64(page)}, nil
}

// Device is a GPU with this process's primary context on it, which takes some hundred MB of its memory. Its methods may
// be called from several goroutines.
type Device struct {
	driver *driver
	id     device
	ctx    context
	info   Info
	tracer Tracer
}

// Tracer is told of every allocation, import, mapping, reservation and pinned buffer that this process makes and gives
// back, so that tests find what was left behind. Its methods may be called from several goroutines.
type Tracer interface {
	Made(what string) // what names the resource; one name may be made several times over
	Gone(what string)
}

// Open takes the primary context of a GPU. mem.ErrNotSupported as in Devices.
func Open(ordinal int) (*Device, error) {
	d, err := initialised()
	if err != nil {
		return nil, err
	}
	id, info, err := d.describe(ordinal)
	if err != nil {
		return nil, err
	}
	dev := &Device{driver: d, id: id, info: info}
	if err := d.check("cuDevicePrimaryCtxRetain", d.CtxRetain(&dev.ctx, id)); err != nil {
		return nil, fmt.Errorf("opening GPU %d: %w", ordinal, err)
	}
	return dev, nil
}

// Traced returns the same device, with its resources from now on reported to t. Only one of the two is to be closed.
func (d *Device) Traced(t Tracer) *Device {
	traced := *d
	traced.tracer = t
	return &traced
}

// Info describes the GPU.
func (d *Device) Info() Info { return d.info }

// Free is the bytes of the GPU's memory that nobody has taken, in this process or another.
func (d *Device) Free() (int64, error) {
	var free, total uint64
	err := d.do("cuMemGetInfo", func() code { return d.driver.MemGetInfo(&free, &total) })
	return int64(free), err
}

// Close gives the context up. Everything made on the device must have been closed.
func (d *Device) Close() error {
	return d.driver.check("cuDevicePrimaryCtxRelease", d.driver.CtxRelease(d.id))
}

// do makes a call with the context current, which it is by thread.
func (d *Device) do(call string, f func() code) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := d.driver.check("cuCtxSetCurrent", d.driver.CtxSetCurrent(d.ctx)); err != nil {
		return err
	}
	return d.driver.check(call, f())
}

func (d *Device) made(what string, id uint64) {
	if d.tracer != nil {
		d.tracer.Made(fmt.Sprintf("%s %#x", what, id))
	}
}

func (d *Device) gone(what string, id uint64) {
	if d.tracer != nil {
		d.tracer.Gone(fmt.Sprintf("%s %#x", what, id))
	}
}
