package stage

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/sched/elastic"
	"trireme.dev/shared/wire"
)

// task is what an operation does to the instance. Its methods are called one after the other, by one goroutine.
type task interface {
	// plan decides what moves, and says so in p; p.Moves false: the instance is as it should be.
	plan(ctx context.Context, p *wire.ChangePlan) error
	// prepare copies and builds what the new layout needs, beside serving, and notes figures in the report by way of told.
	prepare(ctx context.Context, told func(func(*wire.ChangeReport))) error
	// layout has the record say the new layout.
	layout(*wire.Layout)
	// swap has the next step be computed in the new layout, which is in force from then on as the epoch of that number. It returns when
	// no step uses the old one, with the time for which steps were held up.
	swap(epoch uint64) (pause time.Duration, err error)
	// drop gives back what only the old layout needed, undo what prepare has made.
	drop() error
	undo() error
}

// operation is one that is driven, on a goroutine of its own.
type operation struct {
	elastic.Operation // of that goroutine
	changes           *changes
	ask               wire.Change
	task              task // nil when it has ended: it knows a whole language model
	began             time.Time
	before            *wire.Layout  // the record without the operation
	revision          uint64        // of the record that is to be replaced
	mapped            Mapped        // when it began
	gone              chan struct{} // closed when nothing of it runs any more

	mu     sync.Mutex
	report wire.ChangeReport
	news   chan struct{} // closed when there is another report
	ended  bool
}

func newOperation(c *changes, ask *wire.Change, w task) *operation {
	return &operation{changes: c, ask: *ask, task: w, began: time.Now(), news: make(chan struct{}), gone: make(chan struct{}), report: wire.ChangeReport{
		ID: ask.ID, Kind: ask.Kind, Instance: c.stage.ID, Record: c.key(), State: string(elastic.Plan), Epoch: c.epoch,
	}}
}

// endedOperation is the last one of a record, which a process before this one has driven.
func endedOperation(c *changes, l *wire.Layout) *operation {
	e := l.Last
	report := wire.ChangeReport{
		ID: e.ID, Kind: e.Kind, Instance: c.stage.ID, Record: c.key(), Number: 1, State: string(elastic.Aborted), Why: e.Why, Epoch: l.Epoch,
		Plan: wire.ChangePlan{Moves: true, After: l.NPUs},
	}
	if e.Committed {
		report.State, report.Committed = string(elastic.Done), true
	}
	return &operation{changes: c, ask: wire.Change{ID: e.ID, Kind: e.Kind}, news: make(chan struct{}), ended: true, report: report}
}

// errLate is why an operation is given up that has not come to its commit in time.
var errLate = errors.New("it has not come to its commit in time")

// holds are the steps behind which a test may have an operation wait, by state.
var holds = map[elastic.State]elastic.Step{
	elastic.Plan: elastic.Begin, elastic.Prepare: elastic.Copy, elastic.Commit: elastic.Store, elastic.Release: elastic.Drop,
	elastic.Abort: elastic.Undo,
}

// run drives the operation to its end, or until the process ends.
func (o *operation) run(life context.Context) {
	ctx, cancel := context.WithTimeoutCause(life, o.ask.Left, errLate)
	defer cancel()
	defer func() { o.task = nil }() // which has all of an epoch, while what is told of an operation is kept for long
	for told := elastic.State(""); ; {
		if now := o.State(); now != told {
			told = now
			o.enter(now)
		}
		step := o.Next()
		if step == elastic.End {
			return
		}
		if step == elastic.Restart {
			err := fmt.Errorf("operation %s is committed and cannot be completed: %w", o.ask.ID, o.Why())
			select {
			case o.changes.failed <- err:
			default:
			}
			return
		}
		result, why := o.do(ctx, life, step)
		if step == elastic.Settle && why != nil {
			return // the process ends; its successor settles it
		}
		if o.holdsBehind(step) {
			if o.CanStop() {
				o.hold(ctx)
			} else {
				o.hold(life)
			}
		}
		if step == elastic.Copy && result == elastic.OK && ctx.Err() != nil {
			result, why = elastic.Failed, context.Cause(ctx)
		}
		o.Outcome(result, why)
		if step == elastic.MakePlan && o.ask.DryRun && result == elastic.OK {
			if o.holdsBehind(elastic.Begin) { // there is no other step in this state
				o.hold(ctx)
			}
			o.tell(func(r *wire.ChangeReport) { r.State = string(elastic.Done); o.ended = true })
			return
		}
	}
}

// do does a step.
func (o *operation) do(ctx, life context.Context, step elastic.Step) (elastic.Result, error) {
	c := o.changes
	fails := func(err error) (elastic.Result, error) {
		if err == nil {
			return elastic.OK, nil
		}
		if cause := context.Cause(ctx); cause != nil && ctx.Err() != nil && !errors.Is(err, cause) {
			err = fmt.Errorf("%w: %w", cause, err)
		}
		return elastic.Failed, err
	}
	switch step {
	case elastic.MakePlan:
		return o.makePlan(ctx, fails)
	case elastic.Begin:
		l := c.record()
		l.Last = o.before.Last
		l.Pending = &wire.Pending{ID: o.ask.ID, Kind: o.ask.Kind, NPUs: wire.NPUCount(o.report.Plan.After), Left: o.ask.Left}
		return o.swapRecord(ctx, l)
	case elastic.Copy:
		began := time.Now()
		o.mapped = c.stage.weights.mapped()
		o.weigh(life, true)
		err := o.task.prepare(ctx, o.tell)
		m := c.stage.weights.mapped()
		o.tell(func(r *wire.ChangeReport) {
			r.Maps, r.Mapping = m.Maps-o.mapped.Maps, m.Mapping-o.mapped.Mapping
			r.Copying = time.Since(began) - r.Warming - r.Mapping
		})
		return fails(err)
	case elastic.Store:
		l := c.record()
		l.Epoch++
		l.Last = &wire.Ended{ID: o.ask.ID, Kind: o.ask.Kind, Committed: true}
		o.task.layout(l)
		began := time.Now()
		result, err := o.swapRecord(ctx, l)
		o.tell(func(r *wire.ChangeReport) { r.Committal = time.Since(began) })
		return result, err
	case elastic.Settle:
		return o.settle(life)
	case elastic.Switch:
		_, epoch := c.current()
		pause, err := o.task.swap(epoch + 1)
		if err == nil {
			o.tell(func(r *wire.ChangeReport) {
				r.Pause, r.Committed, r.Epoch, r.Total = pause, true, epoch+1, time.Since(o.began)
			})
		}
		return fails(err)
	case elastic.Drop:
		began := time.Now()
		err := o.task.drop()
		unmaps := c.stage.weights.mapped().Unmaps - o.mapped.Unmaps
		o.tell(func(r *wire.ChangeReport) { r.Unmaps, r.Releasing = unmaps, time.Since(began) })
		o.weigh(life, false)
		return fails(err)
	case elastic.Undo:
		err := o.task.undo()
		o.weigh(life, false)
		return fails(err)
	}
	panic(fmt.Sprintf("BUG: nobody does %v", step))
}

// weigh notes how much memory is in use, when what is new comes or when what is old has gone.
func (o *operation) weigh(life context.Context, begins bool) {
	now, most, err := o.changes.stage.HBM.Use(life, begins)
	if err != nil { // whoever needs the HMM for more fails
		o.changes.stage.Log.Debug("no figures of memory", "operation", o.ask.ID, "error", err)
		return
	}
	o.tell(func(r *wire.ChangeReport) {
		if begins {
			r.UsedBefore = now
		} else {
			r.Peak, r.UsedAfter = most, now
		}
	})
}

func (o *operation) makePlan(ctx context.Context, fails func(error) (elastic.Result, error)) (elastic.Result, error) {
	c := o.changes
	_, epoch := c.current()
	record, revision, err := c.stage.Bus.Layout(ctx, c.key())
	switch {
	case errors.Is(err, bus.ErrNoLayout):
		record, revision = &wire.Layout{}, 0
	case err != nil:
		return fails(err)
	case record.Epoch != epoch && record.Instance != c.stage.ID:
		return fails(fmt.Errorf("the layout record is of epoch %d and of instance %s, this one is in epoch %d", record.Epoch, record.Instance, epoch))
	}
	o.before, o.revision = record, revision
	var p wire.ChangePlan
	err = o.task.plan(ctx, &p)
	o.tell(func(r *wire.ChangeReport) { r.Plan, r.Planning = p, time.Since(o.began) })
	if err == nil && !p.Moves {
		return elastic.Nothing, nil
	}
	return fails(err)
}

// swapRecord writes the layout record.
func (o *operation) swapRecord(ctx context.Context, l *wire.Layout) (elastic.Result, error) {
	c := o.changes
	c.mu.Lock()
	c.stored = true // perhaps
	c.mu.Unlock()
	revision, err := c.stage.Bus.SwapLayout(ctx, c.key(), l, o.revision)
	switch {
	case err == nil:
		o.revision = revision
		return elastic.OK, nil
	case errors.Is(err, bus.ErrLayoutChanged):
		return elastic.Lost, err
	case errors.Is(err, bus.ErrUnclear):
		return elastic.Unclear, err
	}
	if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
		err = fmt.Errorf("%w: %w", cause, err)
	}
	return elastic.Failed, err
}

// settle finds out which layout is in force, for as long as the process lives.
func (o *operation) settle(life context.Context) (elastic.Result, error) {
	c := o.changes
	l := c.record()
	l.Last = &wire.Ended{ID: o.ask.ID, Kind: o.ask.Kind, Why: fmt.Sprint(o.Why())}
	now, revision, err := c.stage.Bus.SettleLayout(life, c.key(), l, o.ask.ID, o.revision)
	switch {
	case err != nil:
		return elastic.Lost, err
	case now.Is(o.ask.ID):
		o.revision = revision
		return elastic.Committed, nil
	case now == l:
		o.revision = revision
		return elastic.OK, nil
	}
	return elastic.Lost, nil
}

// holdsBehind reports whether a test wants the operation to wait behind a step.
func (o *operation) holdsBehind(step elastic.Step) bool {
	return slices.ContainsFunc(strings.Split(o.ask.Hold, ","), func(state string) bool { return state != "" && holds[elastic.State(state)] == step })
}

// hold waits for a test, until ctx ends at the latest.
func (o *operation) hold(ctx context.Context) {
	o.tell(func(r *wire.ChangeReport) { r.Held = true })
	select {
	case <-time.After(o.ask.HoldTime):
	case <-ctx.Done():
	}
	o.tell(func(r *wire.ChangeReport) { r.Held = false })
}

// tell has f change the report, and wakes who waits for another one.
func (o *operation) tell(f func(*wire.ChangeReport)) {
	o.mu.Lock()
	defer o.mu.Unlock()
	f(&o.report)
	o.report.Number++
	close(o.news)
	o.news = make(chan struct{})
}

// events are the kinds that tell of states.
var events = map[elastic.State]string{
	elastic.Plan: wire.EventScalePlan, elastic.Prepare: wire.EventScalePrepare, elastic.Commit: wire.EventScaleCommit,
	elastic.Release: wire.EventScaleRelease, elastic.Abort: wire.EventScaleAbort, elastic.Done: wire.EventScaleDone,
	elastic.Aborted: wire.EventScaleDone,
}

// enter tells everybody of a state.
func (o *operation) enter(now elastic.State) {
	o.tell(func(r *wire.ChangeReport) {
		r.State = string(now)
		if why := o.Why(); why != nil {
			r.Why = why.Error()
		}
		o.ended = now.Ended()
	})
	o.mu.Lock()
	report := o.report
	o.mu.Unlock()
	if o.ask.DryRun { // nothing happens
		return
	}
	o.changes.stage.emitChange(events[now], report.Sentence(), &report)
	o.changes.stage.Log.Info("change", "operation", o.ask.ID, "kind", o.ask.Kind, "state", report.State, "what", report.Sentence())
}

// over reports whether the operation has ended.
func (o *operation) over() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.ended
}

// await returns the first report behind one, or after a while the same.
func (o *operation) await(ctx context.Context, seen uint64) *wire.ChangeReport {
	late := time.After(askWait)
	for {
		o.mu.Lock()
		report, news := o.report, o.news
		o.mu.Unlock()
		if report.Number > seen {
			return &report
		}
		select {
		case <-news:
		case <-late:
			return &report
		case <-ctx.Done():
			return &report
		}
	}
}
