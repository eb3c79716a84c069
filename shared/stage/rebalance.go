package stage

import (
	"context"
	"errors"
	"slices"
	"time"

	"trireme.dev/shared/model"
	"trireme.dev/shared/sched/elastic"
	"trireme.dev/shared/sched/placement"
	"trireme.dev/shared/wire"
)

// rebalance is the task of an operation that places the experts anew on the NPUs that there are.
type rebalance struct {
	stage *Stage
	ask   *wire.Change

	change *placement.Change
	tables [][][]model.Expert // by slot
}

// errFar is why experts cannot go to other NPUs.
var errFar = errors.New("each of the NPUs is a memory domain, between which experts cannot be copied yet: start the HMM with --domains node")

// plan implements task.
func (w *rebalance) plan(_ context.Context, p *wire.ChangePlan) (err error) {
	s := w.stage
	npus := s.NPUs()
	set := setOf(npus)
	p.Before, p.After = numbers(npus), numbers(npus)
	load, rows := s.changes.sample()
	present, _ := s.changes.current()
	slots := elastic.Slots(present, set.Len(), w.ask.Spare)
	if w.change, err = placement.Plan(present, load, set, placement.Options{Slots: slots, Slack: w.ask.Slack}); err != nil {
		return err
	}
	p.Rows, p.Was, p.Will = rows, present.Balance(load, set), w.change.Layout.Balance(load, set)
	p.Copies, p.Drops = len(w.change.Copies), len(w.change.Drops)
	p.Moves = p.Copies+p.Drops > 0
	return s.weighCopies(p, w.change.Copies, p.After)
}

// weighCopies notes what copies of experts cost, to NPUs of these numbers by slot: in one memory domain they are there already.
func (s *Stage) weighCopies(p *wire.ChangePlan, copies []placement.Copy, numbers []int) error {
	for _, a := range numbers {
		for _, b := range numbers {
			if a >= 0 && b >= 0 && s.HBM.Far(a, b) {
				return errFar
			}
		}
	}
	p.Shared = len(copies)
	return nil
}

// prepare implements task: in one memory domain all experts are there, and every NPU finds those that it gets by its table.
func (w *rebalance) prepare(context.Context, func(func(*wire.ChangeReport))) error {
	npus := w.stage.NPUs()
	w.tables = make([][][]model.Expert, len(npus))
	for slot := range setOf(npus).All() {
		w.tables[slot] = expertsOf(npus[slot].Weights, w.change.Layout, slot)
	}
	return nil
}

// layout implements task.
func (w *rebalance) layout(l *wire.Layout) { l.Experts = w.change.Layout.Encode() }

// swap implements task.
func (w *rebalance) swap(epoch uint64) (pause time.Duration, err error) {
	if err = w.stage.Runner.SetExperts(w.tables); err != nil { // which holds no step up
		return 0, err
	}
	npus := slices.Clone(w.stage.NPUs())
	for slot := range setOf(npus).All() {
		npus[slot].Experts = w.tables[slot]
	}
	w.stage.setNPUs(npus)
	w.stage.changes.enter(w.change.Layout, epoch)
	return pause, nil
}

// drop implements task.
func (w *rebalance) drop() error { return nil }

// undo implements task.
func (w *rebalance) undo() error { return nil }
