package decoder

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/kv"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/model"
	"trireme.dev/shared/stage"
)

// Sequences of an NPU that is about to leave move to the others while they decode. In one memory domain nothing is copied: the HMM books
// the memory to the other NPU, and the next step computes there. Into another domain it is copied beside the steps, sealed blocks and
// records, in rounds as more come; what is left then, less than two blocks, is copied between two steps, and the sequence waits until the
// HMM has taken note of the new log: as many steps as that takes, however long the sequence is. Until then the old log is the one that a
// successor goes on from, and nothing is written to the new one behind that; from then on it is the other way round.

// movers is how many sequences move at once.
const movers = 2

var errMoved = errors.New("the sequence has changed meanwhile")

// Vacate implements stage.Mover: it begins to move what decodes on the NPUs that are about to leave, and returns at once.
func (d *decoder) Vacate() { d.do(d.moveSome) }

// moveSome moves as many sequences as may move at once.
func (d *decoder) moveSome() {
	for _, s := range d.active {
		if d.moving >= movers {
			return
		}
		if s.moving || d.Takes(s.seat.NPU) {
			continue
		}
		s.moving = true
		d.moving++
		s.errand(func(ctx context.Context) { d.move(ctx, s) })
	}
}

// move moves s to the first NPU that has room for it. It is an errand. One that cannot be moved stays where it is and is tried again.
func (d *decoder) move(ctx context.Context, s *sequence) {
	var from, positions int
	d.between(func() { from, positions = s.seat.Number(), s.kv.View().Positions() })
	err := d.Seat(-1, kv.Slabs(positions), func(to *stage.Seat) error {
		if d.HBM.Far(from, to.Number()) {
			return d.copyTo(ctx, s, to)
		}
		return d.rebook(ctx, s, to)
	})
	if err != nil && ctx.Err() == nil && !errors.Is(err, mem.ErrExhausted) {
		d.Log.Warn("moving a sequence", "request", s.request.ID, "choice", s.choice, "error", err)
	}
	d.do(func() {
		s.moving = false
		d.moving--
		if err == nil {
			d.moveSome()
		}
	})
}

// added gives s the slab that was taken for it at a seat, or the slab back when s is not there any more: false.
func (d *decoder) added(ctx context.Context, s *sequence, seat *stage.Seat, o *hbm.Object) (added bool) {
	s.settling.Lock()
	defer s.settling.Unlock()
	if d.between(func() { added = d.addSlab(s, seat, o) }); !added {
		d.release(ctx, s, o)
	}
	return added
}

// release gives a slab up that was taken for s on an NPU where s is not any more; the request's hold, too. s is not settling.
func (d *decoder) release(ctx context.Context, s *sequence, o *hbm.Object) {
	if log, err := d.log(s); err == nil {
		if err := d.HBM.Inherit(ctx, s.claim, log, nil, []mem.Handle{o.Handle()}); err != nil && ctx.Err() == nil {
			d.Log.Warn("giving a slab up that came too late", "request", s.request.ID, "error", err) // it ends with the request
		}
	}
	d.Free(ctx, o)
}

// between runs f on the loop and waits for that. The loop outlives errands.
func (d *decoder) between(f func()) {
	done := make(chan struct{})
	d.do(func() {
		defer close(done)
		f()
	})
	<-done
}

// view is s as it is between two steps; an error when the loop has let go of it.
func (d *decoder) view(s *sequence) (v *kv.View, err error) {
	d.between(func() { v, err = d.viewed(s) })
	return v, err
}

func (d *decoder) viewed(s *sequence) (*kv.View, error) {
	if d.live[s.key()] != s {
		return nil, mem.ErrEnded
	}
	return s.kv.View(), nil
}

// rebook has the memory of s booked to another NPU of its memory domain, and the next step compute there.
func (d *decoder) rebook(ctx context.Context, s *sequence, to *stage.Seat) error {
	log, err := d.log(s)
	if err != nil {
		return err
	}
	var held []*hbm.Object // once more than s itself has them
	defer func() { d.Free(ctx, held...) }()
	handles := []mem.Handle{log.Handle()}
	for done := 0; ; {
		v, err := d.view(s)
		if err != nil {
			return err
		}
		for _, slab := range v.SlabList()[done:] {
			handles = append(handles, slab.Handle())
		}
		objs, err := d.HBM.Attach(ctx, mem.ReadOnly, to.Number(), handles...)
		if err != nil {
			return fmt.Errorf("booking %d objects to another NPU: %w", len(handles), err)
		}
		held, handles, done = append(held, objs...), nil, len(v.SlabList())
		d.between(func() {
			if v, err = d.viewed(s); err != nil {
				return
			}
			if len(v.SlabList()) > done { // a slab has come meanwhile, for the NPU before
				err = errMoved
				return
			}
			d.reseat(s, to)
		})
		if !errors.Is(err, errMoved) {
			return err
		}
	}
}

// reseat has s compute on another NPU, where its memory is now. It runs on the loop.
func (d *decoder) reseat(s *sequence, to *stage.Seat) {
	d.missed.Observe(float64(s.missed))
	s.missed = 0
	to.Grow(s.seat.Slabs() - to.Slabs())
	s.seat.Leave()
	s.seat = to
}

// log is the object of the log that s writes.
func (d *decoder) log(s *sequence) (log *hbm.Object, err error) {
	d.between(func() {
		if _, err = d.viewed(s); err != nil {
			return
		}
		for _, o := range slices.Backward(s.objects) { // the last one: those before it are of writers before
			if o.Handle().Kind == mem.KindLog {
				log = o
				return
			}
		}
		panic("BUG: a sequence without log")
	})
	return log, err
}

// copyTo copies s to an NPU of another memory domain, and has it go on there.
func (d *decoder) copyTo(ctx context.Context, s *sequence, to *stage.Seat) (err error) {
	old, err := d.log(s)
	if err != nil {
		return err
	}
	var objects []*hbm.Object // of the copy
	defer func() {
		if err != nil {
			d.Free(ctx, objects...)
		}
	}()
	v, err := d.view(s)
	if err != nil {
		return err
	}
	keys := d.BlockKeys(s.spec, s.spec.Prompt)
	known, err := d.Known(ctx, to.Number(), s.spec, keys)
	if err != nil {
		return err
	}
	objects = append(objects, known.Slabs...)
	slabBytes := kv.SlabBytes(&d.Model.Text)
	shape := v.Shape()
	shape.MaxSlabs = len(known.Slabs) + kv.Slabs(shape.Prompt+shape.MaxTokens) + 2
	specs := []hbm.Spec{{Kind: mem.KindLog, NPU: to.Number(), Bytes: shape.Bytes()}}
	for range max(0, kv.Slabs(v.Positions()+ahead)-len(known.Slabs)) {
		specs = append(specs, hbm.Spec{Kind: mem.KindKV, NPU: to.Number(), Bytes: slabBytes})
	}
	fresh, err := d.HBM.Alloc(ctx, specs...)
	if err != nil {
		return fmt.Errorf("taking memory to move to: %w", err)
	}
	objects = append(objects, fresh...)
	hbm.Prefault(fresh...)
	log, err := kv.CreateLog(fresh[0].Bytes(), shape, s.claim.Generation())
	if err != nil {
		return err
	}
	next := kv.NewSequence(&d.Model.Text, log)
	for i, k := range known.Blocks {
		if b, err := v.Block(i); err != nil || !b.Sealed || b.CRC != k.CRC {
			return fmt.Errorf("KV block %d is not what is known by its name: %w", i, errors.Join(mem.ErrCorrupt, err))
		}
	}
	if _, err := next.Share(asSlabs(known.Slabs), known.Blocks); err != nil {
		return err
	}
	for _, o := range fresh[1:] {
		if err := next.AddSlab(o); err != nil {
			return err
		}
	}
	for parked := false; !parked; {
		if next.Room() < v.Positions()+ahead/2 { // it has grown while it was copied
			more, err := d.HBM.Alloc(ctx, hbm.Spec{Kind: mem.KindKV, NPU: to.Number(), Bytes: slabBytes})
			if err != nil {
				return fmt.Errorf("taking more memory to move to: %w", err)
			}
			objects = append(objects, more...)
			hbm.Prefault(more...)
			if err := next.AddSlab(more[0]); err != nil {
				return err
			}
			continue
		}
		began, had := time.Now(), len(next.Blocks)
		if err := next.Follow(v, false, hbm.Copier(ctx)); err != nil {
			return err
		}
		if n := len(next.Blocks) - had; n > 0 {
			d.Copied(ctx, stage.Copy{Role: stage.Decode, Bytes: int64(n) * d.BlockBytes(), Tokens: n * model.BlockTokens}, began)
		}
		if had == len(known.Blocks) { // who moves and begins alike need not copy it again
			d.CacheBlocks(ctx, next, keys, had)
		}
		d.between(func() {
			if v, err = d.viewed(s); err != nil || v.Full() > len(next.Blocks)+1 || next.Room() < v.Positions()+1 {
				return
			}
			if err = next.Follow(v, true, hbm.Copier(ctx)); err == nil {
				s.parked, parked = true, true
			}
		})
		if err != nil {
			return err
		}
	}
	return d.settle(ctx, s, to, next, objects, old, v)
}

// settle has the HMM take note of the copy of a parked sequence, and the sequence go on there; or where it was, with an error.
func (d *decoder) settle(
	ctx context.Context, s *sequence, to *stage.Seat, next *kv.Sequence, objects []*hbm.Object, old *hbm.Object, v *kv.View,
) error {
	var log *hbm.Object
	var keep []*hbm.Object
	for _, o := range objects {
		if o.Handle().Kind == mem.KindLog {
			log = o
		} else {
			keep = append(keep, o)
		}
	}
	drop := []mem.Handle{old.Handle()}
	if s.spec.Choices == 1 { // other choices may have blocks in them
		for _, slab := range v.SlabList() {
			drop = append(drop, slab.Handle())
		}
	}
	s.settling.Lock()
	defer s.settling.Unlock()
	err := d.HBM.Inherit(ctx, s.claim, log, keep, drop)
	var before []*hbm.Object
	d.between(func() {
		s.parked = false
		if err != nil {
			s.missed = 0
			return
		}
		before, s.objects = s.objects, objects // also when the loop has let go of s
		s.kv = next
		d.reseat(s, to)
	})
	if err != nil {
		return fmt.Errorf("moving to another NPU: %w", err)
	}
	d.Free(ctx, before...)
	return nil
}
