package stage

import (
	"errors"
	"fmt"
	"slices"
	"time"
	"unsafe"

	"trireme.dev/shared/mem"
	"trireme.dev/shared/mem/vpage"
	"trireme.dev/shared/model"
)

// The forms in which the kernels find the experts of an NPU (Config.Indirection).
const (
	IndirectionTable  = "table"  // a table of pointers to where the memory domain has them
	IndirectionRanges = "ranges" // a range of addresses a layer in which they are mapped one behind the other (mem/vpage)
)

// ranges has the experts of each NPU in ranges of addresses, for even and odd epochs. The engine's tables point into them, so that its
// kernels read what kernels that take a base and a stride would. It is used by one goroutine at a time.
type ranges struct {
	window func(space int, bytes int64) (mem.Window, error)
	byNPU  map[int]*vpage.Ranges // by number on the node
	next   map[int]bool          // those that are prepared for the next epoch
	done   Mapped                // by those that are closed
}

// Mapped counts what was asked of the memory for ranges, and the time that maps took.
type Mapped struct {
	vpage.Calls
	Mapping time.Duration
}

func newRanges(window func(int, int64) (mem.Window, error)) *ranges {
	return &ranges{window: window, byNPU: map[int]*vpage.Ranges{}, next: map[int]bool{}}
}

// prepare maps the experts of an NPU for the next epoch and returns the table of them, [layers][experts]. table is of the same ones
// where has says that the memory domain has them, by the address of their first byte.
func (r *ranges) prepare(npu int, table [][]model.Expert, has map[*byte]mem.Extent) ([][]model.Expert, error) {
	began := time.Now()
	defer func() { r.done.Mapping += time.Since(began) }()
	extents := make([][]mem.Extent, len(table))
	var stride int64
	space, places := -1, 0
	for l, experts := range table {
		places = max(places, len(experts))
		for e, x := range experts {
			if x.Gate.Data == nil {
				continue
			}
			at, ok := has[first(x)]
			if !ok {
				return nil, fmt.Errorf("BUG: expert %d of layer %d is no object of the memory domain", e, l)
			}
			extents[l] = append(extents[l], at)
			stride, space = max(stride, at.Bytes), at.Space
		}
	}
	of := r.byNPU[npu]
	if of == nil && space < 0 { // a model without experts, or an NPU that has none
		return table, nil
	}
	if of == nil {
		var err error // all experts of a model are of one size
		of, err = vpage.New(func(bytes int64) (mem.Window, error) { return r.window(space, bytes) }, len(table), places, stride)
		if err != nil {
			return nil, err
		}
		r.byNPU[npu] = of
	}
	if err := of.Prepare(extents); err != nil {
		return nil, fmt.Errorf("%w (a range takes a mapping for each expert: see the kernel's vm.max_map_count, or use the table of pointers)", err)
	}
	r.next[npu] = true
	mapped := make([][]model.Expert, len(table))
	for l, experts := range table {
		mapped[l] = slices.Clone(experts)
		place := 0
		for e, x := range experts {
			if x.Gate.Data != nil {
				mapped[l][e] = moved(x, of.Next(l, place))
				place++
			}
		}
	}
	return mapped, nil
}

// first is the first byte of an expert: that of its gate projection.
func first(x model.Expert) *byte { return (*byte)(unsafe.Pointer(unsafe.SliceData(x.Gate.Data))) }

// moved is an expert at another address of the same memory.
func moved(x model.Expert, to []byte) model.Expert {
	from := uintptr(unsafe.Pointer(first(x)))
	at := func(m model.Matrix) model.Matrix {
		offset := uintptr(unsafe.Pointer(unsafe.SliceData(m.Data))) - from
		m.Data = unsafe.Slice((*model.BF16)(unsafe.Pointer(&to[offset])), len(m.Data))
		return m
	}
	return model.Expert{Gate: at(x.Gate), Up: at(x.Up), Down: at(x.Down)}
}

// commit makes what is prepared the present epoch.
func (r *ranges) commit() {
	for npu := range r.next {
		r.byNPU[npu].Commit()
	}
	clear(r.next)
}

// keep unmaps what the present epoch does not have, and all of NPUs that are not among these. No step reads it any more.
func (r *ranges) keep(npus []int) error {
	clear(r.next)
	var errs []error
	for npu, of := range r.byNPU {
		if slices.Contains(npus, npu) {
			errs = append(errs, of.Release())
			continue
		}
		errs = append(errs, of.Release(), of.Close())
		r.done.Calls = r.done.Add(of.Calls())
		delete(r.byNPU, npu)
	}
	return errors.Join(errs...)
}

// mapped is what was asked of the memory so far.
func (r *ranges) mapped() Mapped {
	all := r.done
	for _, of := range r.byNPU {
		all.Calls = all.Add(of.Calls())
	}
	return all
}
