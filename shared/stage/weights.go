package stage

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/hf"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/model"
	"trireme.dev/shared/sched/placement"
	"trireme.dev/shared/wire"
)

// weights is how a stage came by its weights: they lie in the HMM's memory, where the first stage of the node has loaded
// them, and in the mapped files.
type weights struct {
	stage *Stage
	told  func(done, total int64) // Config.Loading
	parts hf.Parts
	sets  []*hbm.Weights
	disk  diskRate

	stop      context.CancelFunc // of the populating
	populated chan struct{}      // closed when it has ended
	faults    int64              // of this process when it was ready
}

// loadWeights loads or attaches what the roles need, and begins to populate it in the background.
func (s *Stage) loadWeights(ctx context.Context, cfg *Config) (err error) {
	var parts hf.Parts
	for _, role := range wire.Roles(s.Role) {
		if role == Encode {
			parts |= hf.Vision
		} else {
			parts |= hf.Text
		}
	}
	w := &weights{stage: s, told: cfg.Loading, parts: parts, populated: make(chan struct{}), disk: diskRate{own: cfg.OwnWeights, rate: cfg.DiskRate}}
	npus := s.NPUs()
	layout, _ := s.changes.current()
	if err := w.load(ctx, npus, layout); err != nil {
		return err
	}
	ctx, w.stop = context.WithCancel(context.WithoutCancel(ctx))
	s.weights = w
	s.Metrics.tell = w.firstStep
	go w.populate(ctx)
	return nil
}

// load gives each NPU its weights, and the experts that the layout says. NPUs of one memory domain share theirs: the same memory is
// mapped once, with the experts that any of them has.
func (w *weights) load(ctx context.Context, npus []NPU, layout placement.Layout) error {
	s := w.stage
	all := setOf(npus)
	var done placement.Set
	for i := range all.All() {
		if done.Has(i) {
			continue
		}
		var domain placement.Set
		var loaded *model.Weights
		for j := range all.All() {
			if !s.HBM.Far(npus[i].Number, npus[j].Number) {
				domain = domain.With(j)
				if npus[j].Weights != nil {
					loaded = npus[j].Weights
				}
			}
		}
		done |= domain
		var wanted hf.Experts
		if domain != all {
			wanted = func(layer, expert int) bool { return layout[layer][expert]&domain != 0 }
		}
		if loaded == nil {
			var err error
			if loaded, err = s.folder.Load(ctx, &domainMemory{w, npus[i].Number}, w.parts, wanted); err != nil {
				return err
			}
		}
		for j := range domain.All() {
			npus[j].Weights = loaded
			npus[j].Experts = expertsOf(loaded, layout, j)
			if err := complete(npus[j].Experts, layout, j); err != nil {
				return err
			}
		}
	}
	return nil
}

// complete returns an error unless NPU n has all that the layout says.
func complete(table [][]model.Expert, layout placement.Layout, n int) error {
	for l := range table {
		for _, e := range layout.On(l, n) {
			if table[l][e].Down.Data == nil {
				return fmt.Errorf("expert %d of layer %d is not in the memory domain of the NPU in slot %d", e, l, n)
			}
		}
	}
	return nil
}

// attach gives the NPUs of the next epoch their weights, as load does, those that join populated. The instance is ready.
func (w *weights) attach(ctx context.Context, npus []NPU, layout placement.Layout) error {
	select {
	case <-w.populated:
	case <-ctx.Done():
		return ctx.Err()
	}
	had := len(w.sets)
	if err := w.load(ctx, npus, layout); err != nil {
		return err
	}
	for _, set := range w.sets[had:] {
		if err := set.Populate(ctx); err != nil {
			return fmt.Errorf("populating weights: %w", err)
		}
	}
	return nil
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

// domainMemory is the HMM's memory for weights in the domain of an NPU.
type domainMemory struct {
	*weights
	npu int
}

// Weights implements hf.Memory.
func (w *domainMemory) Weights(ctx context.Context, key [32]byte, sizes []int64,
	fill func(ctx context.Context, first int, objects [][]byte) error,
) ([][]byte, error) {
	s := w.stage
	if w.disk.own {
		key = sha256.Sum256(append(key[:], s.ID...))
	}
	began := time.Now()
	var filling time.Duration // of it, in fill
	set, err := s.HBM.OpenWeights(ctx, w.npu, hbm.WeightSet{Key: key, Sizes: sizes},
		func(ctx context.Context, first int, objects [][]byte) error {
			start := time.Now()
			defer func() { filling += time.Since(start) }()
			return w.disk.pace(ctx, start, objects, func() error { return fill(ctx, first, objects) })
		}, w.loading())
	if errors.Is(err, mem.ErrExhausted) {
		return nil, fmt.Errorf("%w (weights lie beside the NPUs' own memory: give the HMM more of it with --weights-memory, "+
			"or use a smaller model)", err)
	}
	if err != nil {
		return nil, err
	}
	w.sets = append(w.sets, set)
	took := time.Since(began) - set.Attaching
	s.Metrics.weights("attach", set.Attaching)
	log := s.Log.With("objects", len(set.Objects), "bytes", set.Bytes, "attach", set.Attaching.Round(time.Microsecond))
	switch {
	case set.Filled > 0:
		s.Metrics.weights("load", took)
		log.Info("weights loaded", "made", set.Filled, "seconds", took.Seconds(), "reading", filling.Seconds(),
			"GB/s", float64(set.FilledBytes)/1e9/took.Seconds())
	default:
		s.Metrics.weights("wait", took)
		log.Info("weights attached", "waited", took.Round(time.Microsecond))
	}
	return set.Objects, nil
}

// diskRate has weights read as from a slow disk, for comparisons with ways that do not read them.
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
func (w *weights) populate(ctx context.Context) {
	defer close(w.populated)
	s := w.stage
	began := time.Now()
	err := s.folder.Populate(ctx)
	for _, set := range w.sets {
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

// close ends the populating; the memory goes with the client and the folder.
func (w *weights) close() {
	w.stop()
	<-w.populated
}

// pageFaults is the number of page faults of this process so far that needed no disk.
func pageFaults() int64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return int64(u.Minflt)
}
