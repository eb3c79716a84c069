package cuda

import (
	"fmt"
	"reflect"
	"unsafe"

	"github.com/ebitengine/purego"

	"trireme.dev/shared/mem"
)

// Types of the driver API, named after cuda.h of CUDA 12 and 13, whose layouts they have on every 64-bit Linux.
// https://docs.nvidia.com/cuda/cuda-driver-api
type (
	device        int32   // CUdevice
	devicePointer uint64  // CUdeviceptr
	context       uintptr // CUcontext
	allocation    uint64  // CUmemGenericAllocationHandle

	// location is CUmemLocation.
	location struct {
		kind int32 // locationDevice
		id   int32 // the device
	}

	// allocationProp is CUmemAllocationProp.
	allocationProp struct {
		kind            int32 // allocationPinned, the only one
		requestedHandle int32 // handleFD
		location        location
		_               uintptr // win32HandleMetaData
		_               [8]byte // allocFlags: no compression, no RDMA
	}

	// accessDesc is CUmemAccessDesc.
	accessDesc struct {
		location location
		flags    int32 // accessRead or accessReadWrite
	}
)

// The sizes that C gives them.
var (
	_ [32]byte = [unsafe.Sizeof(allocationProp{})]byte{}
	_ [12]byte = [unsafe.Sizeof(accessDesc{})]byte{}
)

const (
	allocationPinned   = 1
	locationDevice     = 1
	handleFD           = 1 // CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
	accessRead         = 1
	accessReadWrite    = 3
	granularityMinimum = 0

	attributeVMM = 102 // CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
	attributeFD  = 103 // CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED
)

// driver is the functions of libcuda that this package calls, with the C types of cuda.h. Nothing checks that these are
// right but the tests on a GPU. All pointers are used during the call only.
type driver struct {
	Init           func(flags uint32) code                                                 `cuda:"cuInit"`
	DriverVersion  func(version *int32) code                                               `cuda:"cuDriverGetVersion"`
	ErrorString    func(c code, text **byte) code                                          `cuda:"cuGetErrorString"`
	DeviceCount    func(n *int32) code                                                     `cuda:"cuDeviceGetCount"`
	DeviceGet      func(d *device, ordinal int32) code                                     `cuda:"cuDeviceGet"`
	DeviceName     func(name *byte, room int32, d device) code                             `cuda:"cuDeviceGetName"`
	DeviceTotalMem func(bytes *uint64, d device) code                                      `cuda:"cuDeviceTotalMem_v2"`
	DeviceAttr     func(value *int32, attribute int32, d device) code                      `cuda:"cuDeviceGetAttribute"`
	CtxRetain      func(c *context, d device) code                                         `cuda:"cuDevicePrimaryCtxRetain"`
	CtxRelease     func(d device) code                                                     `cuda:"cuDevicePrimaryCtxRelease_v2"`
	CtxSetCurrent  func(c context) code                                                    `cuda:"cuCtxSetCurrent"`
	CtxSynchronize func() code                                                             `cuda:"cuCtxSynchronize"`
	MemGetInfo     func(free, total *uint64) code                                          `cuda:"cuMemGetInfo_v2"`
	MemAllocHost   func(p *unsafe.Pointer, bytes uint64) code                              `cuda:"cuMemAllocHost_v2"`
	MemFreeHost    func(p unsafe.Pointer) code                                             `cuda:"cuMemFreeHost"`
	MemcpyHtoD     func(to devicePointer, from *byte, bytes uint64) code                   `cuda:"cuMemcpyHtoD_v2"`
	MemcpyDtoH     func(to *byte, from devicePointer, bytes uint64) code                   `cuda:"cuMemcpyDtoH_v2"`
	MemcpyDtoD     func(to, from devicePointer, bytes uint64) code                         `cuda:"cuMemcpyDtoD_v2"`
	MemsetD8       func(at devicePointer, value uint8, bytes uint64) code                  `cuda:"cuMemsetD8_v2"`
	MemGranularity func(bytes *uint64, p *allocationProp, option int32) code               `cuda:"cuMemGetAllocationGranularity"`
	MemCreate      func(a *allocation, bytes uint64, p *allocationProp, flags uint64) code `cuda:"cuMemCreate"`
	MemRelease     func(a allocation) code                                                 `cuda:"cuMemRelease"`
	MemExport      func(fd *int32, a allocation, handle int32, flags uint64) code          `cuda:"cuMemExportToShareableHandle"`
	// MemImport takes a descriptor as the value of a void*.
	MemImport         func(a *allocation, fd uintptr, handle int32) code                                      `cuda:"cuMemImportFromShareableHandle"`
	MemAddressReserve func(at *devicePointer, bytes, alignment uint64, want devicePointer, flags uint64) code `cuda:"cuMemAddressReserve"`
	MemAddressFree    func(at devicePointer, bytes uint64) code                                               `cuda:"cuMemAddressFree"`
	MemMap            func(at devicePointer, bytes, offset uint64, a allocation, flags uint64) code           `cuda:"cuMemMap"`
	MemUnmap          func(at devicePointer, bytes uint64) code                                               `cuda:"cuMemUnmap"`
	MemSetAccess      func(at devicePointer, bytes uint64, desc *accessDesc, n uint64) code                   `cuda:"cuMemSetAccess"`
}

// library is the driver's user half. It comes with the kernel driver, not with the CUDA toolkit.
const library = "libcuda.so.1"

// load binds the driver's functions; mem.ErrNotSupported when there is no driver, or one that lacks a function. The
// library stays loaded for good: unloading it is not safe.
func load() (*driver, error) {
	handle, err := purego.Dlopen(library, purego.RTLD_NOW|purego.RTLD_LOCAL)
	if err != nil {
		return nil, fmt.Errorf("loading the CUDA driver: %w: %w", mem.ErrNotSupported, err)
	}
	d := &driver{}
	fields := reflect.ValueOf(d).Elem()
	for i := range fields.NumField() {
		name := fields.Type().Field(i).Tag.Get("cuda")
		symbol, err := purego.Dlsym(handle, name) // RegisterLibFunc would panic
		if err != nil {
			return nil, fmt.Errorf("the CUDA driver has no %s: %w: %w", name, mem.ErrNotSupported, err)
		}
		purego.RegisterFunc(fields.Field(i).Addr().Interface(), symbol)
	}
	return d, nil
}

// exportable is the properties of memory whose descriptor can be handed to another process.
func exportable(d device) *allocationProp {
	return &allocationProp{kind: allocationPinned, requestedHandle: handleFD, location: location{locationDevice, int32(d)}}
}
