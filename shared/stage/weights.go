package stage

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/hf"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/model"
	"trireme.dev/shared/sched/placement"
)

// weights are what a stage has of its model: objects in the HMM's memory, where the first stage of the node that wanted them has
// loaded them, and the mapped files.
type weights struct {
	source
	stage *Stage
	told  func(done, total int64) // Config.Loading
	disk  diskRate
	less  Without

	mu      sync.Mutex
	domains map[int]map[object]*held // by memory domain: what is mapped of it
	past    []past                   // to be dropped behind the switch: see Without
	renewed uint64                   // how often something was copied again
	speed   float64                  // bytes a second that copies did which no rate held back, lately; 0: there were none
	ranges  *ranges                  // nil: kernels find experts by a table of pointers to their objects

	stop      context.CancelFunc // of the populating
	populated chan struct{}      // closed when it has ended
	faults    int64              // of this process when it was ready
}

// held is an object that is mapped.
type held struct {
	set   *hbm.Weights // it came with
	at    int          // place in that
	users map[int]bool // NPUs of this stage that have it, by number

	before *held // in the epoch that is in force, of which this is a copy for the next one: see Without
}

// loadWeights loads or attaches what the roles need, and begins to populate it in the background.
func (s *Stage) loadWeights(ctx context.Context, cfg *Config) (err error) {
	w := &weights{
		source: newSource(s.folder, s.Role), stage: s, told: cfg.Loading, populated: make(chan struct{}), domains: map[int]map[object]*held{},
		disk: diskRate{own: cfg.OwnWeights, rate: cfg.DiskRate}, less: cfg.Without,
	}
	switch cfg.Indirection {
	case "", IndirectionTable:
	case IndirectionRanges:
		w.ranges = newRanges(s.HBM.Window)
	default:
		return fmt.Errorf("no indirection %q: want %s or %s", cfg.Indirection, IndirectionTable, IndirectionRanges)
	}
	npus := s.NPUs()
	layout, _ := s.changes.current()
	if _, err := w.load(ctx, npus, layout, AttachOptions{Told: w.loading()}); err != nil {
		return err
	}
	w.commit()
	ctx, w.stop = context.WithCancel(context.WithoutCancel(ctx))
	s.weights = w
	s.Metrics.tell = w.firstStep
	go w.populate(ctx, w.sets())
	return nil
}

// load gives each NPU its weights, and the experts that the layout says. NPUs of one memory domain share theirs: the same memory is
// mapped once, with the experts that any of them has. What is mapped already stays so until keep. It returns what was not. o.Told
// is told of one domain after the other, together.
func (w *weights) load(ctx context.Context, npus []NPU, layout placement.Layout, o AttachOptions) (fresh []*hbm.Weights, err error) {
	told := o.Told
	o.pace = hbm.NewPacer(o.Rate)
	var there int64 // in the domains before
	for _, g := range groups(numbers(npus), w.stage.HBM.Domain) {
		if told != nil {
			o.Told = func(done, total int64) { told(there+done, there+total) }
		}
		a, err := w.attach(ctx, g.numbers, wanted(numbers(npus), layout, g.slots), o)
		if err != nil {
			return nil, err
		}
		there += a.Bytes
		fresh = append(fresh, a.fresh...)
		for slot := range g.slots.All() {
			npus[slot].Weights = a.Weights
			if npus[slot].Experts, err = w.reach(npus[slot].Number, expertsOf(a.Weights, layout, slot)); err != nil {
				return nil, err
			}
		}
	}
	return fresh, nil
}

// reach is the table of an NPU's experts, [layers][experts], as kernels are to find them in the next epoch.
func (w *weights) reach(npu int, table [][]model.Expert) ([][]model.Expert, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ranges == nil {
		return table, nil
	}
	has := map[*byte]mem.Extent{}
	for _, h := range w.domains[w.stage.HBM.Domain(npu)] {
		has[unsafe.SliceData(h.set.Objects[h.at])] = h.set.Extents[h.at]
	}
	return w.ranges.prepare(npu, table, has)
}

// commit has what was loaded last be the present epoch's.
func (w *weights) commit() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.renew()
	if w.ranges != nil {
		w.ranges.commit()
	}
}

// mapped is what was asked of the memory so far in order that kernels find the experts.
func (w *weights) mapped() Mapped {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ranges == nil {
		return Mapped{}
	}
	return w.ranges.mapped()
}

// prepare gives the NPUs of the next epoch their weights, as load does, populated, and returns how many bytes were not in their memory domains
// before. The instance is ready.
func (w *weights) prepare(ctx context.Context, npus []NPU, layout placement.Layout, o AttachOptions) (copied int64, err error) {
	select {
	case <-w.populated:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	fresh, err := w.load(ctx, npus, layout, o)
	if err != nil {
		return 0, err
	}
	if w.stage.standsBy() { // the files are mapped only now
		if err := w.stage.folder.Populate(ctx); err != nil {
			return 0, fmt.Errorf("populating weights: %w", err)
		}
	}
	for _, set := range fresh {
		if err := set.Populate(ctx); err != nil {
			return 0, fmt.Errorf("populating weights: %w", err)
		}
		copied += set.CopiedBytes + set.FilledBytes
	}
	return copied, nil
}

// keep unmaps what no NPU of a layout has: that of NPUs that have left, and experts that are elsewhere now. No step may use it any more.
func (w *weights) keep(npus []NPU, layout placement.Layout) error {
	has := numbers(npus)
	groups := groups(has, w.stage.HBM.Domain)
	w.mu.Lock()
	defer w.mu.Unlock()
	var errs []error
	if w.ranges != nil {
		if err := w.ranges.keep(has); err != nil {
			return fmt.Errorf("unmapping ranges of experts: %w", err) // what they map must not be given up
		}
	}
	errs = append(errs, w.dropPast())
	for domain, mapped := range w.domains {
		g := groups[domain]
		var kept map[object]int64
		if len(g.numbers) > 0 {
			var err error
			if kept, err = w.needs(wanted(has, layout, g.slots)); err != nil {
				return err
			}
		}
		for x, h := range mapped {
			for n := range h.users {
				if _, stays := kept[x]; !stays || !slices.Contains(g.numbers, n) {
					delete(h.users, n)
				}
			}
		}
		errs = append(errs, sweep(mapped))
	}
	return errors.Join(errs...)
}

// expertsOf is the table of the experts that NPU n has.
func expertsOf(w *model.Weights, layout placement.Layout, n int) [][]model.Expert {
	table := make([][]model.Expert, len(w.Layers))
	for l := range w.Layers {
		table[l] = make([]model.Expert, len(w.Layers[l].Experts))
		for _, e := range layout.On(l, n) {
			table[l][e] = w.Layers[l].Experts[e]
		}
	}
	return table
}

// sets are all that is mapped.
func (w *weights) sets() []*hbm.Weights {
	seen := map[*hbm.Weights]bool{}
	for _, d := range w.domains {
		for _, h := range d {
			seen[h.set] = true
		}
	}
	return slices.Collect(maps.Keys(seen))
}

// domainMemory is the HMM's memory for weights in the domain of an NPU, while some are attached.
type domainMemory struct {
	*weights
	npu   int
	o     AttachOptions
	has   map[object]*held // of the domain
	asked []object
	got   Attached
}

// Weights implements hf.Memory.
func (m *domainMemory) Weights(ctx context.Context, want hf.Set, fill hf.Filler) ([][]byte, error) {
	missing, kept := hbm.WeightSet{Pace: m.o.pace, Numbers: []int{}}, hbm.WeightSet{}
	for i, n := range want.Numbers {
		m.asked = append(m.asked, object{want.Key, n})
		if m.has[object{want.Key, n}] == nil {
			missing.Numbers, missing.Sizes = append(missing.Numbers, n), append(missing.Sizes, want.Sizes[i])
		} else {
			kept.Numbers, kept.Sizes = append(kept.Numbers, n), append(kept.Sizes, want.Sizes[i])
		}
	}
	if m.o.again && len(kept.Numbers) > 0 {
		if err := m.again(ctx, want.Key, kept); err != nil {
			return nil, err
		}
	}
	if len(missing.Numbers) > 0 {
		if err := m.open(ctx, want.Key, missing, fill); err != nil {
			return nil, err
		}
	}
	objects := make([][]byte, len(want.Numbers))
	for i, n := range want.Numbers {
		h := m.has[object{want.Key, n}]
		objects[i] = h.set.Objects[h.at]
	}
	return objects, nil
}

// open maps what the domain's part of this process has not.
func (m *domainMemory) open(ctx context.Context, key [32]byte, missing hbm.WeightSet, fill hf.Filler) error {
	s := m.stage
	if missing.Key = key; m.disk.own {
		missing.Key = sha256.Sum256(append(key[:], s.ID...))
	}
	began := time.Now()
	var filling time.Duration // of it, in fill
	from := func(d diskRate) hbm.Filler {
		return func(ctx context.Context, numbers []int, objects [][]byte) error {
			start := time.Now()
			defer func() { filling += time.Since(start) }()
			return d.pace(ctx, start, objects, func() error { return fill(ctx, numbers, objects) })
		}
	}
	if m.less.Copies {
		missing.Instead = from(m.disk)
	}
	disk := m.disk
	if !disk.own { // what nobody has the disk itself says
		disk.rate = 0
	}
	set, err := s.HBM.OpenWeights(ctx, m.npu, missing, from(disk), m.o.Told)
	if errors.Is(err, mem.ErrExhausted) {
		return fmt.Errorf("%w (weights lie beside the NPUs' own memory: give the HMM more of it with --weights-memory, "+
			"or use a smaller model)", err)
	}
	if err != nil {
		return err
	}
	for i, n := range set.Numbers {
		m.has[object{key, n}] = &held{set: set, at: i, users: map[int]bool{}}
	}
	if set.CopiedBytes > 0 && set.Copying > 0 && m.o.Rate == 0 {
		m.speed = float64(set.CopiedBytes) / set.Copying.Seconds()
	}
	m.got.fresh = append(m.got.fresh, set)
	m.got.Bytes += set.Bytes
	m.got.Copied += set.CopiedBytes
	m.got.Read += set.FilledBytes
	took := time.Since(began) - set.Attaching
	s.Metrics.weights("attach", set.Attaching)
	log := s.Log.With("npu", m.npu, "objects", len(set.Objects), "bytes", set.Bytes, "attach", set.Attaching.Round(time.Microsecond))
	switch {
	case set.Filled > 0:
		s.Metrics.weights("load", took)
		log.Info("weights loaded", "made", set.Filled, "copied", set.Copied, "seconds", took.Seconds(), "reading", filling.Seconds(),
			"GB/s", float64(set.FilledBytes+set.CopiedBytes)/1e9/took.Seconds())
	case set.Copied > 0:
		s.Metrics.weights("copy", took)
		log.Info("weights copied", "copied", set.Copied, "seconds", took.Seconds(), "GB/s", float64(set.CopiedBytes)/1e9/took.Seconds())
	default:
		s.Metrics.weights("wait", took)
		log.Info("weights attached", "waited", took.Round(time.Microsecond))
	}
	return nil
}

// firstSpeed is what copies of weights are taken to do before the first one, in bytes a second.
const firstSpeed = 1 << 30

// takes is how long it takes to copy so many bytes of weights, at most so many a second; 0: as fast as it goes.
func (w *weights) takes(bytes, rate int64) time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	speed := cmp.Or(float64(rate), w.speed, firstSpeed)
	return time.Duration(float64(bytes) / speed * float64(time.Second))
}

// diskRate has weights that others have read as from a slow disk, for comparisons with ways that do not read them.
type diskRate struct {
	own  bool  // whoever else has them
	rate int64 // bytes a second; 0: as they come
}

// pace has objects filled, which takes as long as the rate says from start on.
func (d diskRate) pace(ctx context.Context, start time.Time, objects [][]byte, fill func() error) error {
	if err := fill(); err != nil || d.rate == 0 {
		return err
	}
	var bytes int64
	for _, o := range objects {
		bytes += int64(len(o))
	}
	select {
	case <-time.After(time.Until(start.Add(time.Duration(float64(bytes) / float64(d.rate) * float64(time.Second))))):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// tellEvery is the time between two lines about weights that are being loaded.
const tellEvery = 10 * time.Second

// loading tells how far the loading is, whoever does it.
func (w *weights) loading() func(done, total int64) {
	last := time.Now()
	return func(done, total int64) {
		if w.told != nil {
			w.told(done, total)
		}
		if time.Since(last) >= tellEvery {
			last = time.Now()
			w.stage.Log.Info("loading weights", "bytes", done, "of", total)
		}
	}
}

// populate fills the page tables, so that the first step does not have to.
func (w *weights) populate(ctx context.Context, sets []*hbm.Weights) {
	defer close(w.populated)
	s := w.stage
	began := time.Now()
	err := s.folder.Populate(ctx)
	for _, set := range sets {
		err = errors.Join(err, set.Populate(ctx))
	}
	if err != nil { // pages come as they are touched
		if ctx.Err() == nil {
			s.Log.Warn("populating weights", "error", err)
		}
		return
	}
	took := time.Since(began)
	s.Metrics.weights("populate", took)
	s.Log.Info("weights populated", "seconds", took.Seconds())
}

// wait returns when the weights are populated, or ctx ends.
func (w *weights) wait(ctx context.Context) {
	select {
	case <-w.populated:
	case <-ctx.Done():
	}
	w.faults = pageFaults()
}

// firstStep reports the first step apart: what populating did not do shows there.
func (w *weights) firstStep(seconds float64) {
	w.stage.Metrics.weights("first_step", time.Duration(seconds*float64(time.Second)))
	w.stage.Log.Info("first step", "seconds", seconds, "page_faults", pageFaults()-w.faults)
}

// close ends the populating; the memory goes with the client and the folder, and the ranges before them.
func (w *weights) close() {
	w.stop()
	<-w.populated
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ranges != nil {
		if err := w.ranges.keep(nil); err != nil {
			w.stage.Log.Warn("unmapping ranges of experts", "error", err)
		}
	}
}

// pageFaults is the number of page faults of this process so far that needed no disk.
func pageFaults() int64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return int64(u.Minflt)
}
