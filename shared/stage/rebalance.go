package stage

import (
	"context"
	"slices"
	"time"

	"trireme.dev/shared/hf"
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
	npus   []NPU // with the weights that they have then
}

// plan implements task.
func (w *rebalance) plan(ctx context.Context, p *wire.ChangePlan) (err error) {
	s := w.stage
	npus := s.NPUs()
	set := setOf(npus)
	p.Before, p.After = numbers(npus), numbers(npus)
	load, rows := s.changes.load()
	present, _ := s.changes.current()
	slots := elastic.Slots(present, set.Len(), w.ask.Spare)
	if w.change, err = placement.Plan(present, load, set, placement.Options{Slots: slots, Slack: w.ask.Slack}); err != nil {
		return err
	}
	p.Rows, p.Was, p.Will = rows, present.Balance(load, set), w.change.Layout.Balance(load, set)
	p.Copies, p.Drops = len(w.change.Copies), len(w.change.Drops)
	p.Moves = p.Copies+p.Drops > 0
	return s.weigh(ctx, p, w.ask, present, w.change, p.After)
}

// weigh notes what a change of the experts costs, from the present layout on, on NPUs of these numbers by slot.
func (s *Stage) weigh(
	ctx context.Context, p *wire.ChangePlan, ask *wire.Change, present placement.Layout, change *placement.Change, next []int,
) error {
	npus := s.NPUs()
	stats, err := s.HBM.Stats(ctx)
	if err != nil {
		return err
	}
	if s.weights.disk.own { // what others have is not used
		stats.Weights = nil
	}
	there, err := s.weights.whole(stats.Weights)
	if err != nil {
		return err
	}
	for _, c := range change.Copies {
		if there.has(s.HBM.Domain(next[c.To]), hf.Text) {
			p.Shared++
			continue
		}
		for slot := range present[c.Layer][c.Expert].All() {
			if s.HBM.Domain(npus[slot].Number) == s.HBM.Domain(next[c.To]) {
				p.Shared++
				break
			}
		}
	}
	if p.Bytes, p.Memory, err = s.weights.costs(there, numbers(npus), present, next, change.Layout); err != nil {
		return err
	}
	p.Expect = s.weights.takes(p.Bytes, ask.Rate)
	return nil
}

// attaching are the options of an operation that copies weights, and tells how far it is.
func attaching(ask *wire.Change, told func(func(*wire.ChangeReport))) AttachOptions {
	return AttachOptions{Rate: ask.Rate, Told: func(done, _ int64) { // with what is only mapped
		told(func(r *wire.ChangeReport) { r.Copied = min(done, r.Plan.Bytes) })
	}}
}

// prepare implements task: what a memory domain has already is only mapped.
func (w *rebalance) prepare(ctx context.Context, told func(func(*wire.ChangeReport))) error {
	w.npus = slices.Clone(w.stage.NPUs())
	copied, err := w.stage.weights.prepare(ctx, w.npus, w.change.Layout, attaching(w.ask, told))
	if err == nil {
		told(func(r *wire.ChangeReport) { r.Copied = copied })
	}
	return err
}

// layout implements task.
func (w *rebalance) layout(l *wire.Layout) { l.Experts = w.change.Layout.Encode() }

// swap implements task.
func (w *rebalance) swap(epoch uint64) (pause time.Duration, err error) {
	tables := make([][][]model.Expert, len(w.npus))
	for slot, n := range w.npus {
		tables[slot] = n.Experts
	}
	if err = w.stage.Runner.SetExperts(tables); err != nil { // which holds no step up
		return 0, err
	}
	w.stage.setNPUs(w.npus)
	w.stage.weights.commit()
	w.stage.changes.enter(w.change.Layout, epoch)
	return pause, nil
}

// drop implements task.
func (w *rebalance) drop() error { return w.stage.weights.keep(w.npus, w.change.Layout) }

// undo implements task.
func (w *rebalance) undo() error {
	present, _ := w.stage.changes.current()
	return w.stage.weights.keep(w.stage.NPUs(), present)
}
