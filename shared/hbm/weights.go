package hbm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sync/errgroup"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/mem/host"
)

// WeightSet describes the weights of a model: objects of fixed sizes in a fixed order. Key must name model and layout, so
// that the same key always means the same bytes.
type WeightSet struct {
	Key   Key
	Sizes []int64 // bytes of each object
	Part  int64   // bytes to make at a time, which is what a maker that dies leaves undone; 0: 64 MiB. At least one object
}

// Filler makes a part of a weight set: it writes the content of the objects from number first on. objects have their full
// sizes and zeros or old content of the same set; they are writable until it returns.
type Filler func(ctx context.Context, first int, objects [][]byte) error

// Weights is a weight set that this client holds and has mapped read-only. The HMM owns the memory: every client of the
// memory domain that opens the set maps the very same extents.
type Weights struct {
	Objects [][]byte // content, in order; valid until the set or the client is closed
	Handles []mem.Handle
	Extents []mem.Extent // where the objects lie
	Filled  int          // objects that this client has made; 0: it only attached them
	Bytes   int64        // content of all of them

	FilledBytes int64         // content of those that this client has made
	Attaching   time.Duration // spent asking where final objects lie, and mapping them

	client *Client
	set    uint64
}

const (
	partBytes  = 64 << 20
	weightWait = time.Second // for another one who makes a set, before its progress is told
)

// OpenWeights maps the weight set that set describes in the memory domain of an NPU. The first client of the node that asks
// for it makes it with fill, part by part; others wait, and one of them goes on when the maker fails or dies. What
// another one had made before it died is checked against its checksums and made anew when it is wrong. loading, if not
// nil, is called now and then with the bytes that are there, whoever makes them. mem.ErrExhausted, with the sizes, when
// the domain has no room; mem.ErrInvalid when the key names a set of other sizes.
func (c *Client) OpenWeights(ctx context.Context, npu int, set WeightSet, fill Filler, loading func(done, total int64)) (*Weights, error) {
	w := &Weights{client: c}
	for _, n := range set.Sizes {
		w.Bytes += n
	}
	if loading == nil {
		loading = func(int64, int64) {}
	}
	for {
		opened, err := c.openWeights(ctx, npu, set, w.Bytes, loading)
		if err != nil {
			return nil, fmt.Errorf("opening weights of %d objects, %d bytes: %w", len(set.Sizes), w.Bytes, err)
		}
		w.set = opened.Set
		if err = w.open(ctx, set, opened, fill, loading); err == nil {
			return w, nil
		}
		wrong := errors.Is(err, mem.ErrCorrupt) // what a dead maker left
		if cerr := w.close(wrong); cerr != nil || !wrong {
			return nil, errors.Join(err, cerr)
		}
		*w = Weights{client: c, Bytes: w.Bytes}
	}
}

// openWeights asks until the set is made or this client is to make it.
func (c *Client) openWeights(ctx context.Context, npu int, set WeightSet, bytes int64, loading func(done, total int64)) (protocol.OpenedWeights, error) {
	for {
		var opened protocol.OpenedWeights
		err := c.acquire(ctx, protocol.OpOpenWeights, protocol.OpenWeights{
			Key: set.Key, NPU: npu, Objects: len(set.Sizes), Bytes: bytes, Wait: weightWait,
		}, &opened, func() {
			_ = c.call(context.Background(), protocol.OpCloseWeights, protocol.CloseWeights{Set: opened.Set}, nil)
		})
		if err != nil || opened.Set != 0 {
			return opened, err
		}
		loading(opened.Loaded, bytes)
	}
}

// open makes what is not made of a set that the client holds, and maps the rest.
func (w *Weights) open(ctx context.Context, set WeightSet, opened protocol.OpenedWeights, fill Filler, loading func(done, total int64)) error {
	sizes, most := set.Sizes, cmp.Or(set.Part, partBytes)
	if err := w.attach(ctx, sizes[:opened.Sealed]); err != nil {
		return err
	}
	if !opened.Make {
		if opened.Sealed != len(sizes) {
			return fmt.Errorf("the HMM says that a set of %d weights of %d is made: %w", opened.Sealed, len(sizes), mem.ErrInvalid)
		}
		return nil
	}
	for i, b := range w.Objects {
		if crc := mem.Checksum(b); crc != w.Handles[i].CRC {
			return fmt.Errorf("weight %d of %d bytes has checksum %08x, its maker said %08x: %w", i, len(b), crc, w.Handles[i].CRC, mem.ErrCorrupt)
		}
	}
	done := opened.Loaded
	for len(w.Objects) < len(sizes) {
		loading(done, w.Bytes)
		first, n := len(w.Objects), 0
		for part := int64(0); first+n < len(sizes) && n < protocol.MaxBatch && (n == 0 || part+sizes[first+n] <= most); n++ {
			part += sizes[first+n]
			done += sizes[first+n]
		}
		if err := w.make(ctx, sizes[first:first+n], fill); err != nil {
			return err
		}
	}
	loading(done, w.Bytes)
	return nil
}

// attach maps the next objects, which are final.
func (w *Weights) attach(ctx context.Context, sizes []int64) error {
	began := time.Now()
	defer func() { w.Attaching += time.Since(began) }()
	for len(sizes) > 0 {
		n := min(len(sizes), protocol.MaxBatch)
		grants, err := w.place(ctx, sizes[:n])
		if err != nil {
			return err
		}
		for _, g := range grants {
			if !g.Handle.Sealed {
				return fmt.Errorf("weight %d is not final: %w", len(w.Objects), mem.ErrInvalid)
			}
			b, err := w.client.maps.acquire(g.Extent, mem.ReadOnly)
			if err != nil {
				return err
			}
			w.Objects = append(w.Objects, b[:g.Handle.Bytes:g.Handle.Bytes])
			w.Handles = append(w.Handles, g.Handle)
			w.Extents = append(w.Extents, g.Extent)
		}
		sizes = sizes[n:]
	}
	return nil
}

// make has the next objects filled and makes them final.
func (w *Weights) make(ctx context.Context, sizes []int64, fill Filler) (err error) {
	first := len(w.Objects)
	grants, err := w.place(ctx, sizes)
	if err != nil {
		return err
	}
	writable := 0
	defer func() { // what stays mapped is read-only
		for _, g := range grants[:writable] {
			err = errors.Join(err, w.client.maps.release(g.Extent, mem.ReadWrite))
		}
	}()
	objects := make([][]byte, len(grants))
	for i, g := range grants {
		b, err := w.client.maps.acquire(g.Extent, mem.ReadWrite)
		if err != nil {
			return err
		}
		writable++
		objects[i] = b[:g.Handle.Bytes:g.Handle.Bytes]
	}
	if err := fill(ctx, first, objects); err != nil {
		return err
	}
	if err := w.client.call(ctx, protocol.OpSealWeights, protocol.SealWeights{
		Set: w.set, First: first, CRCs: checksums(objects),
	}, nil); err != nil {
		return err
	}
	w.Filled += len(objects)
	for _, n := range sizes {
		w.FilledBytes += n
	}
	return w.attach(ctx, sizes)
}

// checksums computes the CRC-32C of each object, on all processors.
func checksums(objects [][]byte) []uint32 {
	crcs := make([]uint32, len(objects))
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	for i, b := range objects {
		g.Go(func() error {
			crcs[i] = mem.Checksum(b)
			return nil
		})
	}
	_ = g.Wait() // none fails
	return crcs
}

// place asks where the next objects lie.
func (w *Weights) place(ctx context.Context, sizes []int64) ([]protocol.Grant, error) {
	var grants []protocol.Grant
	err := w.client.call(ctx, protocol.OpPlaceWeights, protocol.PlaceWeights{Set: w.set, First: len(w.Objects), Sizes: sizes}, &grants)
	if err == nil && len(grants) != len(sizes) {
		err = fmt.Errorf("the HMM placed %d weights of %d: %w", len(grants), len(sizes), mem.ErrInvalid)
	}
	for i := range grants {
		if g := &grants[i]; err == nil && (g.Handle.Bytes != sizes[i] || g.Extent.Bytes < sizes[i]) {
			err = fmt.Errorf("weight %d of %d bytes is %d bytes in %v: %w",
				len(w.Objects)+i, sizes[i], g.Handle.Bytes, g.Extent, mem.ErrInvalid)
		}
	}
	return grants, err
}

// Close unmaps the objects and gives up the hold. Objects must not be in use any more.
func (w *Weights) Close() error { return w.close(false) }

// close is Close, after which nobody can open the set if it is wrong. The hold is dropped even when the caller's context
// has ended.
func (w *Weights) close(wrong bool) error {
	var errs []error
	for _, e := range w.Extents {
		errs = append(errs, w.client.maps.release(e, mem.ReadOnly))
	}
	w.Objects, w.Extents, w.Handles = nil, nil, nil
	if err := errors.Join(errs...); err != nil {
		return err // something may still be mapped: the hold has to stay
	}
	return w.client.call(context.Background(), protocol.OpCloseWeights, protocol.CloseWeights{Set: w.set, Wrong: wrong}, nil)
}

// Populate fills this process's page tables for all objects, so that first reads do not fault; the content is not looked
// at. It stops when ctx ends.
func (w *Weights) Populate(ctx context.Context) error {
	for run := range w.runs() {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := host.Populate(run); err != nil {
			return err
		}
	}
	return nil
}

// runs yields the memory of the objects, neighbours together.
func (w *Weights) runs() iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		for i := 0; i < len(w.Extents); {
			first, bytes := i, int64(0)
			for ; i < len(w.Extents) && w.Extents[i].Space == w.Extents[first].Space &&
				w.Extents[i].Offset == w.Extents[first].Offset+bytes && bytes < partBytes; i++ {
				bytes += w.Extents[i].Bytes
			}
			// Neighbours in a space are neighbours in its reservation.
			if !yield(unsafe.Slice(unsafe.SliceData(w.Objects[first]), bytes)) {
				return
			}
		}
	}
}
