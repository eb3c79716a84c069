package runner

import (
	"errors"
	"fmt"
	"time"

	"trireme.dev/shared/engine"
	"trireme.dev/shared/model"
	"trireme.dev/shared/sched"
	"trireme.dev/shared/sched/placement"
)

// ErrStopped is returned by Switch when the runner has been stopped.
var ErrStopped = errors.New("the runner has been stopped")

// epoch is what the runner computes with on one set of NPUs.
type epoch struct {
	npus []engine.NPU // by slot
	text *engine.Text // nil when there are no sources or no NPUs
	step Step
}

// reserve makes an epoch that has no weights yet: engine.Text.SetWeights gives them.
func (r *Runner) reserve(npus []engine.NPU) (*epoch, error) {
	set := Slots(npus)
	e := &epoch{npus: npus, step: Step{Step: sched.NewStep(r.limits, set)}}
	if len(r.sources) == 0 || set == 0 {
		return e, nil
	}
	var err error
	if e.text, err = engine.Reserve(r.config, npus, engine.Limits{Rows: r.limits.Rows, Seqs: r.limits.Seqs}); err != nil {
		return nil, err
	}
	e.step.seqs = make([]engine.Seq, 0, set.Len()*r.limits.Seqs)
	return e, nil
}

// load gives the epoch the weights of its NPUs.
func (e *epoch) load(npus []engine.NPU) error {
	e.npus = npus
	if e.text == nil {
		return nil
	}
	return e.text.SetWeights(npus)
}

func (e *epoch) close() {
	if e.text != nil {
		e.text.Close()
	}
}

// Slots are those with an NPU.
func Slots(npus []engine.NPU) placement.Set {
	var set placement.Set
	for slot, n := range npus {
		if n.Compute != nil {
			set = set.With(slot)
		}
	}
	return set
}

// Next is the next epoch: other NPUs, ready to take the place of the present ones once they have their weights.
type Next struct {
	runner *Runner
	epoch  *epoch
	// Warm is how long the NPUs that join took to compute a first row, with every expert that they have.
	Warm time.Duration
}

// Close gives up an epoch that was not switched to.
func (n *Next) Close() { n.epoch.close() }

// Reserve makes the next epoch beside the present one, in which steps go on: the language model on the NPUs that the instance's slots
// shall have, each in its slot of now if it stays, with scratch of its own. Of the NPUs only the Computes are looked at: weights may still be
// on their way, until Load. A Next is loaded and switched to, or closed. Errors are those of engine.Reserve; nothing has changed then.
func (r *Runner) Reserve(npus []engine.NPU) (*Next, error) {
	e, err := r.reserve(npus)
	if err != nil {
		return nil, fmt.Errorf("preparing NPUs {%v}: %w", Slots(npus), err)
	}
	return &Next{runner: r, epoch: e}, nil
}

// Load gives the NPUs of Reserve their weights. Those that join, which compute nothing yet, are warmed up. After an error, which is one of
// engine.Text.SetWeights, or of a Compute without room, the Next can only be closed.
func (n *Next) Load(npus []engine.NPU) error {
	e, r := n.epoch, n.runner
	err := e.load(npus)
	if err == nil && e.text != nil {
		r.mu.Lock()
		present := r.present.npus
		r.mu.Unlock()
		var join []int
		for slot := range Slots(npus).All() {
			if slot >= len(present) || present[slot].Compute != npus[slot].Compute {
				join = append(join, slot)
			}
		}
		n.Warm, err = e.text.Warm(join...)
	}
	if err != nil {
		return fmt.Errorf("preparing NPUs {%v}: %w", Slots(npus), err)
	}
	return nil
}

// Switch makes the next epoch the present one between two steps, and gives up the one before. pause is how long steps waited for it.
// No sequence in work may be on an NPU that leaves: may, if not nil, is asked on the runner's goroutine just before. With its error,
// and when the runner has been stopped, nothing has changed, and the Next can be tried again or closed.
func (r *Runner) Switch(n *Next, may func() error) (pause time.Duration, err error) {
	r.change.Lock()
	defer r.change.Unlock()
	var before *epoch
	err = r.between(func() error {
		start := time.Now()
		if may != nil {
			if err := may(); err != nil {
				return err
			}
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		before, r.present = r.present, n.epoch
		if before.text != nil {
			if r.past == nil {
				r.past = newLoad(&r.config.Text)
			}
			before.text.Load(r.past)
		}
		pause = time.Since(start)
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("switching to NPUs {%v}: %w", Slots(n.epoch.npus), err)
	}
	before.close()
	return pause, nil
}

// between runs f between two steps and waits for that; ErrStopped when it has not run.
func (r *Runner) between(f func() error) error {
	done := make(chan error, 1)
	if !r.Do(func() { done <- f() }) {
		return ErrStopped
	}
	select {
	case err := <-done:
		return err
	case <-r.ended:
	}
	select {
	case err := <-done: // it was the last thing done
		return err
	default:
		return ErrStopped
	}
}

// SetExperts has steps find the experts elsewhere: see engine.Text.SetExperts. When it returns no step is under way that uses the
// tables before. There must be sequences to compute, and NPUs.
func (r *Runner) SetExperts(tables [][][]model.Expert) error {
	r.change.Lock()
	defer r.change.Unlock()
	if err := r.present.text.SetExperts(tables); err != nil {
		return err
	}
	return r.between(func() error { return nil })
}

// Load is how many rows the router has sent to each expert, [layers][experts], since the runner was made, in all epochs; nil when
// none could be computed so far. It may be called at any time after Start by any goroutine.
func (r *Runner) Load() placement.Load {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.present == nil || r.present.text == nil && r.past == nil {
		return nil
	}
	load := newLoad(&r.config.Text)
	for l := range r.past {
		copy(load[l], r.past[l])
	}
	if r.present.text != nil {
		r.present.text.Load(load)
	}
	return load
}

func newLoad(t *model.Text) placement.Load {
	load := make(placement.Load, t.Layers)
	for l := range load {
		if !t.Dense[l] {
			load[l] = make([]uint64, t.Experts)
		}
	}
	return load
}
