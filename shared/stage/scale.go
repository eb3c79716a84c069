package stage

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"trireme.dev/shared/mem"
	"trireme.dev/shared/sched/elastic"
	"trireme.dev/shared/sched/placement"
	"trireme.dev/shared/wire"
)

// scale is the task of an operation that gives the instance another number of NPUs.
type scale struct {
	stage *Stage
	ask   *wire.Change

	numbers     []int // of the new layout, by slot; -1: a hole
	join, leave placement.Set
	change      *placement.Change
	taken       []int  // NPUs that have joined
	next        *Epoch // until it is switched to
	present     *Epoch // from then on
	before      []int  // as numbers
	shut        bool   // all work is handed over, and none is taken
}

// plan implements task.
func (w *scale) plan(ctx context.Context, p *wire.ChangePlan) error {
	s := w.stage
	npus := s.NPUs()
	set := setOf(npus)
	w.numbers = numbers(npus)
	w.before = slices.Clone(w.numbers)
	p.Before = w.before
	more, err := w.more(set.Len())
	if err != nil {
		return err
	}
	switch {
	case len(w.ask.Join)+len(w.ask.Leave) > 0:
		if err := w.named(ctx); err != nil {
			return err
		}
	case more > 0:
		spare, err := w.spare(ctx)
		if err != nil {
			return err
		}
		if len(spare) < more {
			return fmt.Errorf("%s wanted, and node %s has %d spare: have another instance give some up, or start the node with "+
				"more (trireme up --topology …+%d)", moreNPUs(more), s.HBM.Node(), len(spare), more)
		}
		for _, number := range spare[:more] {
			w.enter(number)
		}
	case more < 0:
		for _, slot := range w.emptiest(set)[:-more] {
			w.leave = w.leave.With(slot)
			w.numbers[slot] = -1
		}
	}
	p.After = slices.Clone(w.numbers) // it is told while numbers are filled in
	if p.Moves = w.join|w.leave != 0; !p.Moves {
		return nil
	}
	slots := (set | w.join) &^ w.leave
	if slots == 0 {
		if err := s.survivors(ctx); err != nil {
			return err
		}
	}
	return w.place(ctx, p, slots)
}

// more is how many NPUs more than so many the instance is to have.
func (w *scale) more(has int) (int, error) {
	more := w.ask.NPUs - has
	if w.ask.NPUs == wire.ByNPUs {
		more = w.ask.By
	}
	if then := has + more; then < 0 || then > placement.MaxNPUs {
		return 0, fmt.Errorf("the instance has %d NPUs and cannot have %d: 0 (a standby) to %d", has, then, placement.MaxNPUs)
	}
	return more, nil
}

// named plans for the NPUs that are named. A dry run does not ask whether those that are to join can be had: they may be another
// instance's, which is to give them up first.
func (w *scale) named(ctx context.Context) error {
	s := w.stage
	spare, err := w.spare(ctx)
	if err != nil {
		return err
	}
	for _, n := range w.ask.Join { // first: none gets the slot of one that is there until the switch
		if slices.Contains(w.numbers, n) || s.HBM.Domain(n) < 0 || !slices.Contains(spare, n) && !w.ask.DryRun {
			return fmt.Errorf("NPU %d of node %s is to join, and %v are spare", n, s.HBM.Node(), spare)
		}
		w.enter(n)
	}
	for _, n := range w.ask.Leave {
		slot := slices.Index(w.before, n)
		if n < 0 || slot < 0 || w.leave.Has(slot) {
			return fmt.Errorf("NPU %d is to leave, and the instance has %v", n, w.before)
		}
		w.leave, w.numbers[slot] = w.leave.With(slot), -1
	}
	return nil
}

// ends reports whether the instance has no NPUs then.
func (w *scale) ends() bool { return wire.NPUCount(w.numbers) == 0 }

// place decides where the experts are to be, on the NPUs in these slots.
func (w *scale) place(ctx context.Context, p *wire.ChangePlan, slots placement.Set) (err error) {
	s := w.stage
	load, rows := s.changes.load()
	present, _ := s.changes.current()
	before := setOf(s.NPUs())
	if !hasText(s.Role) || slots == 0 { // nobody computes with experts
		w.change = &placement.Change{Layout: Layout(&s.Model.Text, slots)}
		return s.weigh(ctx, p, w.ask, present, w.change, w.numbers)
	}
	o := placement.Options{Slots: elastic.Slots(present, slots.Len(), w.ask.Spare), Slack: w.ask.Slack}
	if w.change, err = placement.Plan(present, load, slots, o); err != nil {
		return err
	}
	p.Rows, p.Will = rows, w.change.Layout.Balance(load, slots)
	if before != 0 {
		p.Was = present.Balance(load, before)
	}
	p.Copies, p.Drops = len(w.change.Copies), len(w.change.Drops)
	return s.weigh(ctx, p, w.ask, present, w.change, w.numbers)
}

// enter gives an NPU that joins the lowest free slot.
func (w *scale) enter(number int) {
	slot := slices.Index(w.numbers, -1)
	if slot < 0 {
		slot = len(w.numbers)
		w.numbers = append(w.numbers, -1)
	}
	w.numbers[slot], w.join = number, w.join.With(slot)
}

// spare are the NPUs that the instance would be given, in that order.
func (w *scale) spare(ctx context.Context) ([]int, error) {
	s := w.stage
	stats, err := s.HBM.Stats(ctx)
	if err != nil {
		return nil, err
	}
	var own, others []int
	for _, m := range stats.Memory {
		switch {
		case m.NPU < 0 || m.Instance != "":
		case m.Reserved == "":
			others = append(others, m.NPU)
		case m.Reserved == s.Name:
			own = append(own, m.NPU)
		}
	}
	return append(own, others...), nil
}

// emptiest are the slots with the least to move first.
func (w *scale) emptiest(set placement.Set) []int {
	slots := slices.Collect(set.All())
	slices.SortStableFunc(slots, func(a, b int) int {
		x, y := w.stage.Held(a), w.stage.Held(b)
		return cmp.Or(x.Slabs-y.Slabs, x.Seqs-y.Seqs, b-a)
	})
	return slots
}

// prepare implements task.
func (w *scale) prepare(ctx context.Context, told func(func(*wire.ChangeReport))) (err error) {
	s := w.stage
	if w.ends() { // once more, now that the record says it
		if err := s.survivors(ctx); err != nil {
			return err
		}
	}
	if n := w.join.Len(); n > 0 {
		if len(w.ask.Join) > 0 {
			w.taken, err = slices.Clone(w.ask.Join), s.HBM.Join(ctx, w.ask.Join...)
		} else {
			w.taken, err = s.HBM.JoinAny(ctx, n)
		}
		if err != nil {
			w.taken = nil
			return err
		}
		i := 0
		for slot := range w.join.All() {
			w.numbers[slot] = w.taken[i]
			i++
		}
		told(func(r *wire.ChangeReport) { r.Plan.After = slices.Clone(w.numbers) })
	}
	if !w.ends() { // else there is nobody for it to go to before all of it goes
		w.vacate()
	}
	if w.next, err = s.Prepare(ctx, w.numbers, w.change.Layout, attaching(w.ask, told)); err != nil {
		return err
	}
	told(func(r *wire.ChangeReport) { r.Warming, r.Copied = w.next.Warm, w.next.Copied })
	if w.ends() {
		err := s.handOver(ctx)
		w.shut = err == nil
		w.vacate()
		return err
	}
	for slot := range w.leave.All() { // once all is ready to go on without them
		if err := s.Vacate(ctx, slot); err != nil {
			return err
		}
	}
	return nil
}

// vacate has no new work come to the NPUs that leave.
func (w *scale) vacate() {
	for slot := range w.leave.All() {
		w.stage.Leave(slot)
	}
}

// busyWait is the time between two looks whether an NPU that is to leave is free.
const busyWait = 5 * time.Millisecond

// layout implements task.
func (w *scale) layout(l *wire.Layout) { l.NPUs, l.Experts = w.numbers, w.change.Layout.Encode() }

// swap implements task.
func (w *scale) swap(epoch uint64) (pause time.Duration, err error) {
	for {
		pause, err = w.next.Switch()
		if !errors.Is(err, ErrBusy) {
			break
		}
		time.Sleep(busyWait) // it is committed: what has come meanwhile is waited for
	}
	if err != nil {
		return 0, err
	}
	w.next, w.present = nil, w.next
	w.stage.changes.enter(w.change.Layout, epoch)
	if w.shut {
		w.stage.takeAgain() // when there are NPUs again
	}
	if was := wire.NPUCount(w.before); was == 0 || w.ends() {
		w.stage.tellReady()
	}
	return pause, nil
}

// partWait is how long the last memory of NPUs that leave may take to be given back.
const partWait = 30 * time.Second

// drop implements task.
func (w *scale) drop() error {
	err := w.present.Release()
	kept := w.numbers // those that an operation before could not give back go, too
	leaving := slices.DeleteFunc(w.stage.HBM.NPUs(), func(n int) bool { return slices.Contains(kept, n) })
	if len(leaving) == 0 {
		return err
	}
	return errors.Join(err, w.part(leaving, w.ask.For)) // weights are not booked to NPUs
}

// part gives NPUs back to the HMM, to be kept for a while for an instance of a name; "": for nobody.
func (w *scale) part(npus []int, name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), partWait)
	defer cancel()
	for {
		err := w.stage.HBM.PartFor(ctx, name, npus...)
		if !errors.Is(err, mem.ErrInvalid) || ctx.Err() != nil {
			return err
		}
		select { // what was freed there is told the HMM by others
		case <-time.After(busyWait):
		case <-ctx.Done():
			return err
		}
	}
}

// undo implements task.
func (w *scale) undo() error {
	if w.next != nil {
		w.next.Close()
		w.next = nil
	}
	for slot := range w.leave.All() {
		w.stage.Stay(slot)
	}
	if w.shut {
		w.stage.takeAgain()
	}
	if len(w.taken) == 0 {
		return nil
	}
	return w.part(w.taken, "")
}

// moreNPUs is "2 more NPUs are", as a sentence has it.
func moreNPUs(n int) string {
	if n == 1 {
		return "1 more NPU is"
	}
	return fmt.Sprintf("%d more NPUs are", n)
}
