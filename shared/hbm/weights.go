package hbm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"runtime"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sync/errgroup"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/mem/host"
)

// WeightSet describes what a client wants of the weights of a model, which are objects of fixed sizes by number. Key must name model
// and layout, so that the same key and number always mean the same bytes.
type WeightSet struct {
	Key     Key
	Numbers []int   // of the objects wanted, rising; nil: as many as there are sizes, from 0 on
	Sizes   []int64 // bytes of each of them
	Part    int64   // bytes to make at a time, which is what a maker that dies leaves undone, or twice that; 0: 64 MiB. At least one object
	Pace    *Pacer  // of copies from other memory domains; nil: as fast as it goes
	Instead Filler  // makes what could be copied so; nil: it is copied
}

// Filler makes weights: it writes the content of the objects of these numbers. objects have their full sizes and zeros or old
// content of the same set; they are writable until it returns.
type Filler func(ctx context.Context, numbers []int, objects [][]byte) error

// Weights are objects of a weight set that this client holds and has mapped read-only. The HMM owns the memory: every client of the
// memory domain that wants an object maps the very same extent. Its methods are for one goroutine at a time.
type Weights struct {
	Numbers []int    // of the objects, rising
	Objects [][]byte // content, in order; valid until dropped, or the client is closed
	Handles []mem.Handle
	Extents []mem.Extent // where the objects lie
	Filled  int          // objects that this client has made from what fill gave
	Copied  int          // and from other memory domains
	Bytes   int64        // content of all of them

	FilledBytes, CopiedBytes int64         // content of those that this client has made so
	Attaching                time.Duration // spent mapping final objects
	Copying                  time.Duration // spent copying, with the pauses that the rate asks for

	client  *Client
	npu     int
	set     WeightSet
	written []bool // by this process, which has the page tables since
	told    func(done, total int64)
	done    int64 // bytes that are there
}

const (
	partBytes  = 64 << 20
	pacedPart  = 16 << 20    // most of a part of copies at a rate: the first of them begin the sooner
	weightWait = time.Second // for another one who makes objects, before progress is told again
)

// OpenWeights maps the objects that set describes in the memory domain of an NPU, all or none. Those that the domain has not are made,
// part by part, each by one client while others wait, and by another one when that fails or dies: by a copy of the same object of another
// memory domain, checked, or else with fill. What a maker had made that then failed is checked against its checksums and made anew when
// it is wrong. loading, if not nil, is called now and then, by one goroutine at a time, with the bytes that are there. mem.ErrExhausted,
// with the sizes, when the domain has no room; mem.ErrInvalid when the key names a set with other sizes. What was made before an error
// or the end of ctx stays with the HMM as what nobody holds, until its room is needed.
func (c *Client) OpenWeights(ctx context.Context, npu int, set WeightSet, fill Filler, loading func(done, total int64)) (*Weights, error) {
	if set.Numbers == nil {
		for i := range set.Sizes {
			set.Numbers = append(set.Numbers, i)
		}
	}
	n := len(set.Sizes)
	w := &Weights{
		Numbers: slices.Clone(set.Numbers), Objects: make([][]byte, n), Handles: make([]mem.Handle, n), Extents: make([]mem.Extent, n),
		client: c, npu: npu, set: set, written: make([]bool, n), told: loading,
	}
	for _, n := range set.Sizes {
		w.Bytes += n
	}
	if w.told == nil {
		w.told = func(int64, int64) {}
	}
	err := w.open(ctx, fill)
	if err == nil {
		return w, nil
	}
	return nil, errors.Join(fmt.Errorf("opening weights of %d objects, %d bytes: %w", n, w.Bytes, err), w.Close())
}

// answer is one to a question for the objects at some places of the set.
type answer struct {
	places []int
	placed []protocol.Placed
	err    error
}

// open asks for what is missing until nothing is. With a pace the next part is asked for while one is copied: the HMM takes a while to find
// the memory, which would come on top of what the rate allows.
func (w *Weights) open(ctx context.Context, fill Filler) error {
	if len(w.Objects) == 0 {
		return fmt.Errorf("no objects: %w", mem.ErrInvalid)
	}
	need := w.Bytes
	var ahead chan answer
	for missing := w.missing(answer{}); len(missing) > 0; missing = w.missing(answer{}) {
		w.told(w.done, w.Bytes)
		var a answer
		if ahead != nil {
			a, ahead = <-ahead, nil
		} else {
			a = w.ask(ctx, missing, need)
		}
		if a.err != nil {
			return a.err
		}
		need = 0
		if rest := w.missing(a); w.set.Pace != nil && len(rest) > 0 {
			next := make(chan answer, 1)
			go func() { next <- w.ask(ctx, rest, 0) }()
			ahead = next
		}
		if err := w.take(ctx, a.places, a.placed, fill); err != nil {
			if ahead != nil {
				err = errors.Join(err, w.client.giveUpPlaced((<-ahead).placed))
			}
			return err
		}
	}
	if ahead != nil {
		panic("BUG: more is asked for when nothing is missing")
	}
	w.told(w.done, w.Bytes)
	return nil
}

// missing are the places of objects that are not there, nor given in an answer.
func (w *Weights) missing(a answer) (places []int) {
	given := map[int]bool{}
	for at, p := range a.placed {
		given[a.places[at]] = p.State != protocol.PlacedNot
	}
	for i, o := range w.Objects {
		if o == nil && !given[i] {
			places = append(places, i)
		}
	}
	return places
}

// ask asks for the objects at some places of the set, as many as can be asked for at once.
func (w *Weights) ask(ctx context.Context, places []int, need int64) answer {
	places = places[:min(len(places), protocol.MaxBatch)]
	placed, err := w.place(ctx, places, need)
	return answer{places, placed, err}
}

func (w *Weights) place(ctx context.Context, places []int, need int64) ([]protocol.Placed, error) {
	part := cmp.Or(w.set.Part, partBytes)
	if w.set.Pace != nil {
		part = min(part, pacedPart)
	}
	v := protocol.Weights{Key: w.set.Key, NPU: w.npu, Most: part, Need: need, Wait: weightWait}
	for _, i := range places {
		v.Numbers, v.Sizes = append(v.Numbers, w.set.Numbers[i]), append(v.Sizes, w.set.Sizes[i])
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	// The answer comes after weightWait at the latest: it is awaited even when ctx ends, so that nothing is left when this returns.
	var placed []protocol.Placed
	if err := w.client.call(context.WithoutCancel(ctx), protocol.OpWeights, v, &placed); err != nil {
		return nil, err
	}
	if len(placed) != len(places) {
		return nil, errors.Join(fmt.Errorf("the HMM placed %d weights of %d: %w", len(placed), len(places), mem.ErrInvalid),
			w.client.giveUpPlaced(placed))
	}
	for at, p := range placed {
		if size := v.Sizes[at]; p.Grant != nil && (p.Grant.Handle.Bytes != size || p.Grant.Extent.Bytes < size) ||
			p.Source != nil && (p.Source.Handle.Bytes != size || p.Source.Extent.Bytes < size) ||
			(p.Grant != nil) != (p.State != protocol.PlacedNot) {
			return nil, errors.Join(fmt.Errorf("the HMM placed weight %d of %d bytes as %+v: %w", v.Numbers[at], size, p, mem.ErrInvalid),
				w.client.giveUpPlaced(placed))
		}
	}
	return placed, nil
}

// giveUpPlaced gives the holds up that came with an answer.
func (c *Client) giveUpPlaced(placed []protocol.Placed) error {
	var grants []protocol.Grant
	for _, p := range placed {
		for _, g := range []*protocol.Grant{p.Grant, p.Source} {
			if g != nil {
				grants = append(grants, *g)
			}
		}
	}
	return c.giveUp(grants)
}

// take maps what is final, makes what is to be made, and gives up what it cannot.
func (w *Weights) take(ctx context.Context, places []int, placed []protocol.Placed, fill Filler) (err error) {
	began := time.Now()
	var fresh []*making
	var wrong []protocol.Grant
	left := placed // whose holds are not w's yet
	defer func() {
		for _, m := range fresh { // nothing, unless something went wrong
			err = errors.Join(err, m.abandon(w.client))
		}
		if len(left) > 0 {
			err = errors.Join(err, w.client.giveUpPlaced(left))
		}
		err = errors.Join(err, w.client.disown(wrong))
	}()
	for at, p := range placed {
		switch p.State {
		case protocol.PlacedFinal:
			if !p.Grant.Handle.Sealed {
				return fmt.Errorf("weight %d is not final: %w", w.set.Numbers[places[at]], mem.ErrInvalid)
			}
			b, err := w.client.maps.acquire(p.Grant.Extent, mem.ReadOnly)
			if err != nil {
				return err
			}
			b = b[:p.Grant.Handle.Bytes:p.Grant.Handle.Bytes]
			left = placed[at+1:]
			if p.Check && mem.Checksum(b) != p.Grant.Handle.CRC {
				wrong = append(wrong, *p.Grant)
				break
			}
			w.keep(places[at], b, p.Grant.Handle, p.Grant.Extent)
		case protocol.PlacedMake:
			fresh = append(fresh, &making{place: places[at], to: *p.Grant, from: p.Source})
			left = placed[at+1:]
		default:
			left = placed[at+1:]
		}
	}
	w.Attaching += time.Since(began)
	if len(fresh) == 0 {
		return nil
	}
	err = w.make(ctx, fresh, fill)
	fresh = slices.DeleteFunc(fresh, func(m *making) bool { return m.done })
	return err
}

// keep notes an object that is there and mapped for reading.
func (w *Weights) keep(place int, content []byte, h mem.Handle, e mem.Extent) {
	w.Objects[place], w.Handles[place], w.Extents[place] = content, h, e
	w.done += h.Bytes
}

// disown forgets mapped objects whose content is wrong, so that they are made anew.
func (c *Client) disown(wrong []protocol.Grant) error {
	if len(wrong) == 0 {
		return nil
	}
	var names []protocol.Object
	var errs []error
	for _, g := range wrong {
		names = append(names, nameOf(g.Handle))
		errs = append(errs, c.maps.release(g.Extent, mem.ReadOnly))
	}
	errs = append(errs, c.call(context.Background(), protocol.OpForget, names, nil))
	errs = append(errs, c.call(context.Background(), protocol.OpFree, names, nil))
	return errors.Join(errs...)
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

// Drop unmaps objects, by number, and gives up the holds on them; numbers that are not among w's are passed over. The objects must not be
// in use any more. They rest with the HMM until somebody wants them again or their room is needed.
func (w *Weights) Drop(numbers ...int) error {
	var names []protocol.Object
	var errs []error
	for _, n := range numbers {
		i, ok := slices.BinarySearch(w.Numbers, n)
		if !ok || w.Objects[i] == nil {
			continue
		}
		if err := w.client.maps.release(w.Extents[i], mem.ReadOnly); err != nil {
			errs = append(errs, err) // it may still be mapped: the hold has to stay
			continue
		}
		names = append(names, nameOf(w.Handles[i]))
		w.Objects[i] = nil
	}
	for batch := range slices.Chunk(names, protocol.MaxBatch) {
		if err := w.client.call(context.Background(), protocol.OpFree, batch, nil); err != nil && !errors.Is(err, mem.ErrLost) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Close drops all objects.
func (w *Weights) Close() error { return w.Drop(w.Numbers...) }

// Window reserves addresses in which weights of a space (Extent.Space) can be mapped a second time, as long as they are held. It is closed
// before the client.
func (c *Client) Window(space int, bytes int64) (mem.Window, error) {
	return c.maps.window(space, bytes)
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

// runs yields the memory of the objects that this process has not written, neighbours together.
func (w *Weights) runs() iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		for i := 0; i < len(w.Extents); {
			if w.Objects[i] == nil || w.written[i] {
				i++
				continue
			}
			first, bytes := i, int64(0)
			for ; i < len(w.Extents) && w.Objects[i] != nil && !w.written[i] && w.Extents[i].Space == w.Extents[first].Space &&
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
