// Package vpage gives the experts that an NPU has one contiguous range of addresses a layer, in rising order, for kernels that take a
// base and a stride instead of a table of pointers: the vpage-remap of ElasticMoE (arXiv:2510.02613, section 5). Which experts an
// NPU has changes by mapping their extents anew, not by copying them.
//
// A layer has two ranges, for even and odd epochs. Prepare maps the idle one beside the steps that read the other; Commit makes it
// the one that counts, between two steps; Release unmaps what no step reads any more. InPlace is the form without a second range,
// for comparison: no step may run while it works.
package vpage

import (
	"errors"
	"fmt"

	"trireme.dev/shared/mem"
)

// Ranges are the ranges of all layers of one NPU. They are used by one goroutine at a time, but for Base and Bytes, which steps may
// call beside Prepare and Release.
type Ranges struct {
	stride int64
	layers []layer
	now    int // the range of this epoch: 0, 1
	calls  Calls
}

type layer struct {
	windows [2]mem.Window
	mapped  [2][]mem.Extent // in order of their places
	base    [2]uintptr      // address of place 0, once anything was mapped there
}

// Calls counts what was asked of the memory so far.
type Calls struct{ Maps, Unmaps int }

// Add is the sum of both.
func (c Calls) Add(d Calls) Calls { return Calls{c.Maps + d.Maps, c.Unmaps + d.Unmaps} }

// New reserves addresses for so many places of stride bytes, whole pages, in each layer, twice, by means of window, which is a
// mem.Space's. It takes no memory. The space must outlive the ranges.
func New(window func(bytes int64) (mem.Window, error), layers, places int, stride int64) (_ *Ranges, err error) {
	r := &Ranges{stride: stride, layers: make([]layer, layers)}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("ranges of %d places of %d bytes: %w", places, stride, err), r.Close())
		}
	}()
	for l := range r.layers {
		for i := range r.layers[l].windows {
			if r.layers[l].windows[i], err = window(int64(places) * stride); err != nil {
				return nil, err
			}
		}
	}
	return r, nil
}

// Prepare maps the extents of the next epoch, [layers][experts], at most stride bytes each, into the idle ranges, while steps go on
// in the others. With an error nothing is mapped there.
func (r *Ranges) Prepare(next [][]mem.Extent) error {
	if err := r.check(next); err != nil {
		return err
	}
	for l := range r.layers {
		y := &r.layers[l]
		if len(y.mapped[1-r.now]) > 0 {
			return fmt.Errorf("preparing experts of layer %d: the last epoch is not released: %w", l, mem.ErrInvalid)
		}
		for i, e := range next[l] {
			if err := r.mapAt(y, 1-r.now, i, e); err != nil {
				return errors.Join(fmt.Errorf("preparing expert %d of layer %d: %w", i, l, err), r.Release())
			}
		}
	}
	return nil
}

// Commit makes what was prepared the present epoch. It maps nothing: it costs as much as the caller's own switch.
func (r *Ranges) Commit() { r.now = 1 - r.now }

// Release unmaps the idle ranges: behind Commit those of the last epoch, which no step may read any more, before it those of a
// Prepare that is not wanted.
func (r *Ranges) Release() error {
	var errs []error
	for l := range r.layers {
		y := &r.layers[l]
		for i := len(y.mapped[1-r.now]) - 1; i >= 0; i-- {
			errs = append(errs, r.unmapAt(y, 1-r.now, i))
		}
		y.mapped[1-r.now] = y.mapped[1-r.now][:0]
	}
	return errors.Join(errs...)
}

// InPlace changes the present ranges to other extents. Nobody may read any of them meanwhile; with an error what is mapped is
// neither the old nor the new. A place whose extent stays keeps its mapping.
func (r *Ranges) InPlace(next [][]mem.Extent) error {
	if err := r.check(next); err != nil {
		return err
	}
	for l := range r.layers {
		y, old := &r.layers[l], r.layers[l].mapped[r.now]
		stays := func(i int) bool { return i < len(old) && i < len(next[l]) && old[i] == next[l][i] }
		for i := range old {
			if !stays(i) {
				if err := r.unmapAt(y, r.now, i); err != nil {
					return fmt.Errorf("changing layer %d in place: %w", l, err)
				}
			}
		}
		y.mapped[r.now] = nil
		for i, e := range next[l] {
			if stays(i) {
				y.mapped[r.now] = append(y.mapped[r.now], e)
			} else if err := r.mapAt(y, r.now, i, e); err != nil {
				return fmt.Errorf("changing layer %d in place: %w", l, err)
			}
		}
	}
	return nil
}

// Base is the address of the first expert of a layer in the present epoch; the others follow at multiples of the stride. 0: the
// layer has none here.
func (r *Ranges) Base(l int) uintptr {
	if len(r.layers[l].mapped[r.now]) == 0 {
		return 0
	}
	return r.layers[l].base[r.now]
}

// Bytes is the memory of an expert of the present epoch, by its place; nil where the CPU cannot address it.
func (r *Ranges) Bytes(l, place int) []byte {
	return r.layers[l].windows[r.now].Bytes(int64(place) * r.stride)
}

// Next is the memory of an expert of what Prepare has mapped, before Commit; nil where the CPU cannot address it.
func (r *Ranges) Next(l, place int) []byte {
	return r.layers[l].windows[1-r.now].Bytes(int64(place) * r.stride)
}

// Calls is what was asked of the memory so far.
func (r *Ranges) Calls() Calls { return r.calls }

// Close unmaps everything and gives the addresses back.
func (r *Ranges) Close() error {
	var errs []error
	for l := range r.layers {
		for i, w := range r.layers[l].windows {
			if w != nil {
				errs = append(errs, w.Close())
			}
			r.layers[l].mapped[i] = nil
		}
	}
	return errors.Join(errs...)
}

func (r *Ranges) check(next [][]mem.Extent) error {
	if len(next) != len(r.layers) {
		return fmt.Errorf("experts of %d layers for ranges of %d: %w", len(next), len(r.layers), mem.ErrInvalid)
	}
	for l, es := range next {
		for i, e := range es {
			if e.Bytes > r.stride {
				return fmt.Errorf("expert %d of layer %d has %d bytes, a place has %d: %w", i, l, e.Bytes, r.stride, mem.ErrInvalid)
			}
		}
	}
	return nil
}

func (r *Ranges) mapAt(y *layer, which, place int, e mem.Extent) error {
	at, err := y.windows[which].Map(int64(place)*r.stride, e)
	if err != nil {
		return err
	}
	y.base[which] = at - uintptr(int64(place)*r.stride)
	y.mapped[which] = append(y.mapped[which], e)
	r.calls.Maps++
	return nil
}

func (r *Ranges) unmapAt(y *layer, which, place int) error {
	r.calls.Unmaps++
	return y.windows[which].Unmap(int64(place) * r.stride)
}
