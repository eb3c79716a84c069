package stage

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"trireme.dev/shared/npu"
	"trireme.dev/shared/sched/placement"
	"trireme.dev/shared/stage/runner"
)

// ErrBusy is wrapped by the error of Epoch.Switch when there is work on an NPU that is to leave.
var ErrBusy = errors.New("an NPU that leaves has work")

// Epoch is the next layout of an instance, made beside the present one: other NPUs, experts elsewhere, or both. It is switched to, or
// closed.
type Epoch struct {
	// Warm is how long the NPUs that join took to compute a first row, with every expert that they have.
	Warm time.Duration
	// Copied is how many bytes of weights had to come to the memory domains of the NPUs.
	Copied int64

	stage       *Stage
	npus        []NPU // by slot
	layout      placement.Layout
	switched    bool
	join, leave placement.Set
	next        *runner.Next
	parts       []WorkerEpoch
	left        []NPU // by the switch
}

// EpochWorker is a Worker that has something of its own on each NPU.
type EpochWorker interface {
	Worker
	// Prepare makes it on the NPUs of the next epoch that are not in the present one.
	Prepare(npus []NPU) (WorkerEpoch, error)
}

// WorkerEpoch is what a worker has prepared.
type WorkerEpoch interface {
	// Switch puts it in the place of what the worker has, on the runner's goroutine between two steps.
	Switch()
	// Close gives up what is not used: before Switch what was prepared, later what is on NPUs that have left.
	Close()
}

// Load is how many rows the router has sent to each expert since the process has started, [layers][experts]; nil in an instance without
// language model.
func (s *Stage) Load() placement.Load { return s.Runner.Load() }

// Prepare makes the next epoch while the instance serves: numbers are its NPUs' on the node, which the HMM has granted, by slot, -1 in empty
// ones; who stays keeps the slot. layout says which of them shall have which experts. Those that join get their arithmetic and weights, and are
// warmed up; that of those that leave is closed only after the switch. Nothing has changed when there is an error. Epochs are prepared
// and switched to one after the other. o is for weights that have to come from other memory domains.
func (s *Stage) Prepare(ctx context.Context, numbers []int, layout placement.Layout, o AttachOptions) (_ *Epoch, err error) {
	present := s.NPUs()
	e := &Epoch{stage: s, npus: make([]NPU, len(numbers)), layout: layout}
	defer func() {
		if err != nil {
			e.Close()
			err = fmt.Errorf("preparing NPUs %v: %w", numbers, err)
		}
	}()
	if len(numbers) > placement.MaxNPUs {
		return nil, fmt.Errorf("an instance has at most %d slots", placement.MaxNPUs)
	}
	var all placement.Set
	for slot, number := range numbers {
		if number < 0 {
			continue
		}
		all = all.With(slot)
		if slot < len(present) && present[slot].Compute != nil {
			if present[slot].Number != number {
				return nil, fmt.Errorf("slot %d has NPU %d: it is empty for an epoch before another one comes there", slot, present[slot].Number)
			}
			e.npus[slot] = present[slot]
			continue
		}
		c, err := npu.Open(s.npuOptions)
		if err != nil {
			return nil, err
		}
		e.npus[slot], e.join = NPU{Number: number}, e.join.With(slot)
		e.npus[slot].Compute = c
	}
	if err := layout.Check(all); err != nil {
		return nil, err
	}
	e.leave = setOf(present) &^ all
	o.again = s.weights.less.Remap
	empty := engines(e.npus) // scratch, while weights come
	if err = beside(ctx, func() (err error) {
		e.next, err = s.Runner.Reserve(empty)
		return err
	}, func(ctx context.Context) (err error) {
		e.Copied, err = s.weights.prepare(ctx, e.npus, layout, o)
		return err
	}); err != nil {
		return nil, err
	}
	for _, w := range s.workers {
		if w, ok := w.(EpochWorker); ok {
			part, err := w.Prepare(e.npus)
			if err != nil {
				return nil, err
			}
			e.parts = append(e.parts, part)
		}
	}
	if err = e.next.Load(engines(e.npus)); err != nil {
		return nil, err
	}
	e.Warm = e.next.Warm
	return e, nil
}

// beside runs a short f and a long g at once, and ends g when f fails, whose error it then returns: what g brings would be given up again.
func beside(ctx context.Context, f func() error, g func(context.Context) error) error {
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	var short sync.WaitGroup
	var failed error
	short.Go(func() {
		if failed = f(); failed != nil {
			end(failed)
		}
	})
	err := g(ctx)
	short.Wait()
	return cmp.Or(failed, err)
}

// Switch makes e the present epoch between two steps: pause is how long they waited for it. NPUs that join take new work from then on.
// ErrBusy, and nothing has changed, while there is still work on an NPU that leaves (Stage.Leave, Held).
func (e *Epoch) Switch() (pause time.Duration, err error) {
	s := e.stage
	pause, err = s.Runner.Switch(e.next, func() error {
		s.seats.mu.Lock()
		defer s.seats.mu.Unlock()
		for slot := range e.leave.All() {
			if n := s.seats.held[slot].Seqs; n > 0 || s.seats.open.Has(slot) {
				return fmt.Errorf("%w: slot %d has %d sequences and pictures, and takes more: %v", ErrBusy, slot, n, s.seats.open.Has(slot))
			}
		}
		for _, p := range e.parts {
			p.Switch()
		}
		e.left = s.setNPUs(e.npus)
		for slot := range e.join.All() {
			s.seats.add(slot)
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	e.switched = true
	s.weights.commit()
	s.makeRoom()
	return pause, nil
}

// Release gives up what only the epoch before has used. It is called once, behind Switch and before the next epoch is prepared.
func (e *Epoch) Release() error {
	for _, p := range e.parts {
		p.Close()
	}
	for _, n := range e.left {
		n.Compute.Close()
	}
	if err := e.stage.weights.keep(e.npus, e.layout); err != nil {
		return fmt.Errorf("dropping weights of the epoch before: %w", err)
	}
	return nil
}

// Close gives up an epoch that was not switched to.
func (e *Epoch) Close() {
	if e.next != nil {
		e.next.Close()
	}
	for _, p := range e.parts {
		p.Close()
	}
	for slot := range e.join.All() {
		e.npus[slot].Compute.Close()
	}
	if present, _ := e.stage.changes.current(); !e.switched {
		if err := e.stage.weights.keep(e.stage.NPUs(), present); err != nil {
			e.stage.Log.Warn("dropping weights of an epoch that is not to be", "error", err)
		}
	}
}
