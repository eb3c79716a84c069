package stage

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/sched/elastic"
	"trireme.dev/shared/sched/placement"
	"trireme.dev/shared/wire"
)

// changes are the operations that change the instance while it serves (shared/sched/elastic): at most one at a time, which the
// instance drives itself. Who asks for one only watches. A dry run changes nothing and refuses nobody, but it plans from a layout that has to stay
// while it does: what is asked for meanwhile begins when it has ended, in milliseconds. While something is changed a dry run is refused, as what it
// would plan from is about to go.
type changes struct {
	stage  *Stage
	asked  int        // NPUs that the process was started with; 0: as a standby
	failed chan error // an operation is committed that this process cannot complete

	mu     sync.Mutex
	epoch  uint64           // in force
	layout placement.Layout // "
	stored bool             // there is a record
	recent elastic.Recent
	known  []*operation // the latest ones; only the last may be under way, and dry runs that it waits for
	fence  wire.Fence
	closed bool

	running sync.WaitGroup // operations
}

const (
	sampleEvery = 10 * time.Second // of the load of experts
	askWait     = time.Second      // an answer waits for news so long
	knownMost   = 16
)

// key is the key of the instance's layout record.
func (c *changes) key() string { return wire.LayoutKey(c.stage.HBM.Node(), c.stage.recordName()) }

// recordName is the name that the instance keeps over its processes, if it has one.
func (s *Stage) recordName() string { return cmp.Or(s.Name, s.ID) }

// serve answers those who ask for operations, until ctx ends, and those that are under way have.
func (c *changes) serve(ctx context.Context) error {
	sub, err := c.stage.Bus.Handle(wire.SubjectChange(c.stage.ID), func(data []byte, respond func(any) error) {
		var ask wire.Change
		if err := wire.Unmarshal(data, &ask); err != nil {
			c.stage.Log.Warn("refusing a change that cannot be read", "error", err)
			_ = respond(&wire.ChangeReport{ // who has asked has gone, or asks again
				Instance: c.stage.ID, Record: c.key(), Number: 1, State: string(elastic.Aborted), Refused: true,
				Why: fmt.Sprintf("the instance cannot read what it is asked for, perhaps as it is of another version of Trireme: %v", err),
			})
			return
		}
		go func() {
			if err := respond(c.answer(ctx, &ask)); err != nil {
				c.stage.Log.Debug("answering who asks for a change", "error", err)
			}
		}()
	})
	if err != nil {
		return fmt.Errorf("listening for changes: %w", err)
	}
	defer func() {
		_ = sub.Unsubscribe() // it ends with the connection at the latest
		c.mu.Lock()
		c.closed = true
		c.mu.Unlock()
		c.running.Wait()
	}()
	tick := time.NewTicker(sampleEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			c.sample()
		case <-ctx.Done():
			return nil
		}
	}
}

// sample takes note of the experts' load since the last time.
func (c *changes) sample() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if total := c.stage.Runner.Load(); total != nil { // under the lock: it never falls
		c.recent.Add(total)
	}
}

// load is the experts' load lately, and how many rows it is of. However often somebody asks for plans, older load counts as much.
func (c *changes) load() (placement.Load, uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.recent.Load(c.stage.Runner.Load())
}

// answer begins an operation, or finds it, and tells how far it is.
func (c *changes) answer(ctx context.Context, ask *wire.Change) *wire.ChangeReport {
	o, fence, err := c.begin(ctx, ask)
	if err != nil {
		return &wire.ChangeReport{
			ID: ask.ID, Kind: ask.Kind, Instance: c.stage.ID, Record: c.key(), Number: 1, State: string(elastic.Aborted), Refused: true,
			Why: err.Error(), Fence: uint64(fence),
		}
	}
	return o.await(ctx, ask.Seen)
}

// begin begins an operation, or finds the one that has begun. An error says why it is refused; newer is the newest fence, if it is that.
func (c *changes) begin(ctx context.Context, ask *wire.Change) (_ *operation, newer wire.Fence, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	late := c.fence.Refuses(ask.Fence)
	if i := slices.IndexFunc(c.known, func(o *operation) bool { return o.ask.ID == ask.ID }); i >= 0 {
		return c.known[i], 0, nil
	}
	if late {
		return nil, c.fence, fmt.Errorf("the scaler that asks has fence %d, and one with %d has asked since", ask.Fence, c.fence)
	}
	w, err := c.task(ask)
	if err != nil {
		return nil, 0, err
	}
	o, before := newOperation(c, ask, w), c.last()
	if c.known = append(c.known, o); len(c.known) > knownMost {
		c.known = slices.Delete(c.known, 0, 1)
	}
	c.running.Go(func() {
		defer close(o.gone)
		if before != nil {
			<-before.gone
		}
		o.run(ctx)
	})
	return o, 0, nil
}

// last is the last operation if it has not ended, else nil. c.mu is held.
func (c *changes) last() *operation {
	if n := len(c.known); n > 0 && !c.known[n-1].over() {
		return c.known[n-1]
	}
	return nil
}

// task is what is asked for, if it can be begun now. c.mu is held.
func (c *changes) task(ask *wire.Change) (w task, err error) {
	switch {
	case ask.ID == "" || ask.Left <= 0 || ask.Spare < 0 || ask.Slack < 0 || ask.Rate < 0:
		return nil, fmt.Errorf("the request is malformed: %+v", *ask)
	case c.closed || !c.stage.Ready():
		return nil, errors.New("the instance does not take work: it starts or stops; try again when it is ready")
	case ask.Kind == wire.ChangeScale && (ask.NPUs == wire.ByNPUs || ask.NPUs >= 0 && ask.NPUs <= placement.MaxNPUs):
		w = &scale{stage: c.stage, ask: ask}
	case ask.Kind == wire.ChangeRebalance && !hasText(c.stage.Role):
		return nil, fmt.Errorf("the instance has no experts: it is an %s instance, which does not run the language model", c.stage.Role)
	case ask.Kind == wire.ChangeRebalance && c.stage.standsBy():
		return nil, errors.New("the instance is a standby, on whose NPUs experts could be placed if it had any: give it some with `trireme scale`")
	case ask.Kind == wire.ChangeRebalance:
		w = &rebalance{stage: c.stage, ask: ask}
	default:
		return nil, fmt.Errorf("the instance knows no %q of %d NPUs", ask.Kind, ask.NPUs)
	}
	if o := c.last(); o != nil && !o.ask.DryRun {
		return nil, fmt.Errorf("operation %s, a %s, is under way: wait until it has ended", o.ask.ID, o.ask.Kind)
	}
	return w, nil
}

// hasText reports whether an instance of a role runs the language model.
func hasText(role string) bool { return wire.HasRole(role, Prefill) || wire.HasRole(role, Decode) }

// restore takes the NPUs that the process starts with, as the record says that the process before it has left, else as many as it was
// asked to, with the experts spread evenly. An operation that the other one had not committed is over with that.
func (c *changes) restore(ctx context.Context) (npus []int, err error) {
	s := c.stage
	c.failed = make(chan error, 1)
	l, revision, err := s.Bus.Layout(ctx, c.key())
	unread := errors.Is(err, wire.ErrMalformed) || errors.Is(err, wire.ErrVersion)
	switch {
	case errors.Is(err, bus.ErrNoLayout):
		return c.start(ctx)
	case unread: // by another version of the program, perhaps
		l = &wire.Layout{}
	case err != nil:
		return nil, err
	}
	c.epoch, c.stored = l.Epoch, true
	if !unread {
		npus, err = c.follow(ctx, l)
	}
	if err != nil {
		s.Log.Warn("the layout record is not followed", "record", c.key(), "why", err)
		if npus, err = c.start(ctx); err != nil {
			return nil, err
		}
		c.epoch++
	}
	mine := &wire.Layout{
		Instance: s.ID, Model: s.Model.Digest, Asked: c.asked, Epoch: c.epoch, NPUs: npus, Experts: c.layout.Encode(), Last: l.Last,
	}
	if p := l.Pending; p != nil {
		why := fmt.Sprintf("instance %s died before the operation came to its commit", l.Instance)
		mine.Last = &wire.Ended{ID: p.ID, Kind: p.Kind, Why: why}
		report := wire.ChangeReport{ID: p.ID, Kind: p.Kind, Instance: l.Instance, Record: c.key(), Why: why, Epoch: l.Epoch}
		for _, state := range []elastic.State{elastic.Abort, elastic.Aborted} { // who follows events sees an end of each operation
			report.State = string(state)
			s.emitChange(events[state], report.Sentence(), &report)
		}
	}
	// The process before this one has lost its connection to the HMM, which has one of each name: nobody else writes.
	if _, err := s.Bus.SwapLayout(ctx, c.key(), mine, revision); err != nil {
		return nil, err
	}
	if mine.Last != nil { // whoever asks for it again, not knowing how it has ended, starts nothing
		c.known = append(c.known, endedOperation(c, mine))
	}
	s.Log.Info("starts where the process before it was", "epoch", c.epoch, "before", l.Instance, "npus", npus)
	return npus, nil
}

// start takes as many NPUs as the process was asked to.
func (c *changes) start(ctx context.Context) ([]int, error) {
	c.layout = Layout(&c.stage.Model.Text, placement.First(c.asked))
	if c.asked == 0 {
		return nil, nil
	}
	return c.stage.HBM.JoinAny(ctx, c.asked)
}

// follow takes the NPUs of a record, or as many others, and its placement, if the process can start so.
func (c *changes) follow(ctx context.Context, l *wire.Layout) ([]int, error) {
	s := c.stage
	if l.Model != s.Model.Digest || l.Asked != c.asked {
		return nil, fmt.Errorf("it is of another model, or made for %d NPUs where %d are asked for", l.Asked, c.asked)
	}
	var slots placement.Set
	var wanted []int
	for slot, number := range l.NPUs {
		if number >= 0 && slot < placement.MaxNPUs {
			slots, wanted = slots.With(slot), append(wanted, number)
		}
	}
	even := Layout(&s.Model.Text, slots)
	if slots == 0 { // the process before was a standby
		c.layout = even
		return slices.Clone(l.NPUs), nil
	}
	experts := make([]int, len(even))
	for i := range experts {
		experts[i] = len(even[i])
	}
	layout, err := placement.Decode(l.Experts, experts)
	if err == nil {
		err = layout.Check(slots)
	}
	if err != nil {
		return nil, err
	}
	if s.HBM.Join(ctx, wanted...) != nil { // an HMM that has started since has given some to others
		if wanted, err = s.HBM.JoinAny(ctx, len(wanted)); err != nil {
			return nil, err
		}
	}
	c.layout = layout
	npus := slices.Clone(l.NPUs)
	for slot := range slots.All() {
		npus[slot], wanted = wanted[0], wanted[1:]
	}
	return npus, nil
}

// record is the record of the layout in force, with nothing pending.
func (c *changes) record() *wire.Layout {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.stage
	return &wire.Layout{
		Instance: s.ID, Model: s.Model.Digest, Asked: c.asked, Epoch: c.epoch, NPUs: numbers(s.NPUs()), Experts: c.layout.Encode(),
	}
}

// current is the layout in force.
func (c *changes) current() (placement.Layout, uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.layout, c.epoch
}

// underWay is the id of the operation that is under way, or "". A dry run is none: it changes nothing.
func (c *changes) underWay() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if o := c.last(); o != nil && !o.ask.DryRun {
		return o.ask.ID
	}
	return ""
}

// enter has another layout be in force.
func (c *changes) enter(layout placement.Layout, epoch uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.layout, c.epoch = layout, epoch
}

// forget removes the record of an instance that was told to stop: who starts it again says with how many NPUs.
func (c *changes) forget(ctx context.Context) {
	c.mu.Lock()
	stored := c.stored
	c.mu.Unlock()
	if !stored {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if err := c.stage.Bus.DeleteLayout(ctx, c.key()); err != nil {
		c.stage.Log.Warn("the layout record stays", "error", err)
	}
}

// numbers are the NPUs' numbers on the node, by slot; -1: a hole.
func numbers(npus []NPU) []int {
	list := make([]int, len(npus))
	for slot, n := range npus {
		list[slot] = -1
		if n.Compute != nil {
			list[slot] = n.Number
		}
	}
	return list
}

// emitChange tells operators how far an operation is.
func (s *Stage) emitChange(kind, text string, report *wire.ChangeReport) {
	data, err := json.Marshal(report)
	if err != nil {
		panic("BUG: a report is no JSON: " + err.Error())
	}
	s.Bus.Emit(wire.Event{Kind: kind, Node: s.HBM.Node(), Instance: s.ID, Role: s.Role, Text: text, Data: data})
}
