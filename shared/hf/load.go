package hf

import (
	"context"
	"crypto/sha256"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"unsafe"

	"golang.org/x/sync/errgroup"

	"trireme.dev/shared/mem/host"
	"trireme.dev/shared/model"
)

// Memory is where Load keeps what is no view of the files: device memory that the processes of a node share, so that it
// is filled once.
type Memory interface {
	// Weights returns the memory of the objects of a set. Content that is there for the key and number is used as it is; what is
	// missing fill writes first, in parts: the objects of these numbers. The memory stays valid as long as the weights are in
	// use, and must not be written any more.
	Weights(ctx context.Context, s Set, fill Filler) ([][]byte, error)
}

// Set names objects of one part of a model: the key is of all that the part has, the number of an object is the same whatever else is
// wanted.
type Set struct {
	Key     [32]byte
	Numbers []int   // rising
	Sizes   []int64 // bytes of each
}

// Filler writes the content of objects of a set, by number.
type Filler func(ctx context.Context, numbers []int, objects [][]byte) error

// Parts are the parts of a model that a stage needs. Each part is a set of objects of its own.
type Parts uint8

// The parts, which can be joined.
const (
	Text   Parts = 1 << iota // the language model
	Vision                   // the vision encoder
	All    = Text | Vision
)

// Experts says whether an expert of a layer is wanted. Nil: all are.
type Experts func(layer, expert int) bool

// layoutVersion is part of the keys of sets; it is raised when what the objects hold changes, or their order.
const layoutVersion = 3

// objectAlign is the alignment of matrices in an object, in elements: one cache line.
const objectAlign = 32

// Load returns the tensors of some parts of the model; the other fields stay empty, and so do experts that are not wanted. Each
// routed expert lies in an object of m of its own: gate, up and down projection. So do other matrices that need a copy, together by
// layer; the rest are views of the files. The weights are read-only, valid until Close and as long as m keeps its objects. Files
// are read on all processors. It returns an ErrDType for a matrix with a value that bf16 does not have, or m's error.
func (f *Folder) Load(ctx context.Context, m Memory, parts Parts, wanted Experts) (*model.Weights, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	w := &model.Weights{}
	if parts&Text != 0 {
		text, err := f.load(ctx, m, Text, true, wanted, nil)
		if err != nil {
			return nil, err
		}
		*w = *text
	}
	if parts&Vision != 0 && f.Config.Vision != nil {
		vision, err := f.load(ctx, m, Vision, true, nil, nil)
		if err != nil {
			return nil, err
		}
		w.Vision = vision.Vision
	}
	return w, nil
}

// load returns the tensors of parts, with copies in one set of m. f.mu is held. progress, if not nil, is told of bytes
// read so far and in all, for each part that m has filled.
func (f *Folder) load(ctx context.Context, m Memory, parts Parts, pack bool, wanted Experts, progress func(done, total int64)) (*model.Weights, error) {
	if f.closed {
		return nil, fmt.Errorf("weights of %s: the folder is closed", f.Dir)
	}
	plan, err := newPlan(f, parts, pack)
	if err != nil {
		return nil, err
	}
	plan.progress = progress
	b := newBuilder(f, parts, pack, wanted)
	b.plan = plan
	b.objects = make([][]byte, len(plan.sizes))
	if s := plan.set(wanted); len(s.Numbers) > 0 {
		objects, err := m.Weights(ctx, s, plan.fill)
		if err != nil {
			return nil, fmt.Errorf("weights of %s: %w", f.Dir, err)
		}
		for i, n := range s.Numbers {
			b.objects[n] = objects[i]
		}
	}
	w := b.build()
	if b.err != nil {
		return nil, b.err
	}
	if f.viewed&parts != parts {
		f.views = append(f.views, b.views...)
		f.viewed |= parts
	}
	return w, nil
}

// Needs names the objects that Load would keep in a Memory for one part of the model.
func (f *Folder) Needs(part Parts, wanted Experts) (Set, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return Set{}, fmt.Errorf("weights of %s: the folder is closed", f.Dir)
	}
	plan, err := newPlan(f, part, true)
	if err != nil {
		return Set{}, err
	}
	return plan.set(wanted), nil
}

// set names the objects of a plan but those of experts that are not wanted.
func (b *builder) set(wanted Experts) Set {
	if b.key == nil {
		key := b.setKey()
		b.key = &key
	}
	s := Set{Key: *b.key}
	for n, size := range b.sizes {
		if of := b.of[n]; wanted == nil || of.expert < 0 || wanted(of.layer, of.expert) {
			s.Numbers, s.Sizes = append(s.Numbers, n), append(s.Sizes, size)
		}
	}
	return s
}

// setKey names the objects of a plan by the model's content and by what each of them holds: a matrix that is a view in one
// folder is a copy in another with the same tensors, if it begins at an odd address there.
func (b *builder) setKey() [32]byte {
	h := sha256.New()
	writeSized(h, []byte("trireme weights"))
	writeNumber(h, layoutVersion)
	writeNumber(h, int(b.parts))
	h.Write(b.folder.Config.Digest[:])
	for _, j := range b.jobs {
		writeSized(h, []byte(j.name))
		writeNumber(h, j.to)
		writeNumber(h, j.expert)
		writeNumber(h, len(j.from.Data))
	}
	return [32]byte(h.Sum(nil))
}

// Populate brings the parts of the files into memory that weights handed out are views of, and fills this process's page
// tables for them, so that first reads do not fault. It stops when ctx ends.
func (f *Folder) Populate(ctx context.Context) error {
	f.mu.Lock()
	views := slices.Clone(f.views)
	f.mu.Unlock()
	for _, v := range views {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := host.Populate(v); err != nil {
			return fmt.Errorf("weights of %s: %w", f.Dir, err)
		}
	}
	return nil
}

// newPlan returns a builder that has looked everything up: it knows the sizes of the objects and how to fill them.
// A folder has one for each use, as it does not change: f.mu is held, or nobody else has f yet.
func newPlan(f *Folder, parts Parts, pack bool) (*builder, error) {
	use := planOf{parts, pack}
	if b := f.plans[use]; b != nil {
		return b, nil
	}
	b := newBuilder(f, parts, pack, nil)
	b.planning = true
	b.build()
	if b.err == nil && pack {
		f.plans[use] = b
	}
	return b, b.err
}

// planOf is what a plan is for.
type planOf struct {
	parts Parts
	pack  bool
}

// room is a place for elements in an object.
type room struct{ object, at, n int }

// memory finds the elements of a room.
type memory func(room) []model.BF16

// job is a copy that is still to be made.
type job struct {
	name string // of the tensor it reads
	from Tensor // what it reads
	to   int    // the object that it writes
	run  func(memory) error

	expert int // that it is of; -1: of none
}

// object ends an object: what is copied next begins another.
func (b *builder) object() { b.within = false }

// alloc takes room for n elements in the present object.
func (b *builder) alloc(n int) room {
	if !b.within {
		b.sizes = append(b.sizes, 0)
		b.of = append(b.of, owner{b.at, b.number})
		b.within = true
	}
	last := len(b.sizes) - 1
	r := room{last, int(b.sizes[last] / 2), n}
	b.sizes[last] += 2 * int64((n+objectAlign-1)/objectAlign*objectAlign)
	return r
}

// skip passes over the object of an expert that is not wanted, whose tensors the plan has looked up. Only experts that are packed may not be
// wanted.
func (b *builder) skip() {
	if b.err != nil { // nothing is numbered any more
		return
	}
	n := len(b.sizes)
	if b.of = append(b.of, owner{b.at, b.number}); b.plan.of[n] != b.of[n] {
		panic(fmt.Sprintf("BUG: object %d is planned for %+v, and would be skipped for %+v", n, b.plan.of[n], b.of[n]))
	}
	b.sizes = append(b.sizes, b.plan.sizes[n])
}

// data is the memory of a room, or nil while planning.
func (b *builder) data(r room) []model.BF16 {
	if b.planning {
		return nil
	}
	return in(b.objects[r.object], r)
}

// in returns the elements of a room of an object.
func in(object []byte, r room) []model.BF16 {
	all := unsafe.Slice((*model.BF16)(unsafe.Pointer(unsafe.SliceData(object))), len(object)/2)
	return all[r.at : r.at+r.n : r.at+r.n]
}

// bytesOf is the memory of elements.
func bytesOf(e []model.BF16) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(e))), 2*len(e))
}

// later notes a copy out of t, the named tensor or a part of it, into the present object, while planning.
func (b *builder) later(name string, t Tensor, run func(memory) error) {
	b.jobs = append(b.jobs, job{name: name, from: t, to: len(b.sizes) - 1, run: run, expert: b.number})
}

// fill makes the copies of some objects, on all processors. It implements the fill of Memory.
func (b *builder) fill(ctx context.Context, numbers []int, objects [][]byte) error {
	var jobs []job
	memory := map[int][]byte{}
	for i, n := range numbers {
		memory[n] = objects[i]
		from, _ := slices.BinarySearchFunc(b.jobs, n, func(j job, object int) int { return j.to - object })
		for ; from < len(b.jobs) && b.jobs[from].to == n; from++ {
			jobs = append(jobs, b.jobs[from])
		}
	}
	var total, done int64
	for _, j := range jobs {
		total += int64(len(j.from.Data))
	}
	data := func(r room) []model.BF16 { return in(memory[r.object], r) }
	var mu sync.Mutex
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for _, j := range jobs {
		g.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			file := b.folder.index[j.name]
			if err := j.run(data); err != nil {
				return fmt.Errorf("%s: tensor %s: %w", file.Path(), j.name, err)
			}
			file.mapping.release(j.from.Data)
			mu.Lock()
			defer mu.Unlock()
			done += int64(len(j.from.Data))
			if b.progress != nil {
				b.progress(done, total)
			}
			return nil
		})
	}
	return g.Wait()
}

// private is a Memory of this process alone.
type private struct{ mapping mapping }

// Weights implements Memory.
func (p *private) Weights(ctx context.Context, s Set, fill Filler) ([][]byte, error) {
	var total int64
	for _, n := range s.Sizes {
		total += n
	}
	var err error
	if p.mapping, err = mapZeroed(int(total)); err != nil {
		return nil, err
	}
	objects := make([][]byte, len(s.Sizes))
	rest := []byte(p.mapping)
	for i, n := range s.Sizes {
		objects[i], rest = rest[:n:n], rest[n:]
	}
	return objects, fill(ctx, s.Numbers, objects)
}

func (p *private) close() error {
	err := p.mapping.close()
	p.mapping = nil
	return err
}
