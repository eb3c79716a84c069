package simulate

import (
	"fmt"
	"slices"
	"time"

	"trireme.dev/shared/sched/autoscale"
)

// operation is a change under way. NPUs that join are reserved from the beginning; those that leave serve until the change is prepared,
// and finish what they have.
type operation struct {
	order    Order
	began    time.Duration
	parts    []*instance // that it locks
	reserved []int       // NPUs that are nobody's meanwhile
	leaving  []*npu      // of parts[0]
	drained  func()      // once those are idle
}

// takes is how long a kind of change takes this time.
func (f *Fleet) takes(a autoscale.Action) time.Duration {
	j := f.cfg.Jitter
	return time.Duration(float64(f.cfg.Changes[a]) * (1 + j*(2*f.rand.Float64()-1)))
}

// find is the instance of a name.
func (f *Fleet) find(name string) *instance {
	for _, i := range f.instances {
		if i.name == name {
			return i
		}
	}
	return nil
}

// do begins a change. The error says why it cannot be; then nothing has changed.
func (f *Fleet) do(o Order) error {
	c := &o.Change
	op := &operation{order: o, began: f.now}
	part := func(name string) (*instance, error) {
		i := f.find(name)
		switch {
		case i == nil:
			return nil, fmt.Errorf("there is no instance %q", name)
		case i.op != "" || !i.ready || i.closing:
			return nil, fmt.Errorf("%s is being changed", name)
		}
		return i, nil
	}
	spare := func() error {
		for _, n := range c.Numbers {
			if !slices.Contains(f.spare[c.Node], n) {
				return fmt.Errorf("NPU %s/%d is not spare", c.Node, n)
			}
		}
		return nil
	}
	var err error
	var i, from *instance
	switch c.Action {
	case autoscale.Widen, autoscale.Promote:
		if i, err = part(c.Instance); err == nil {
			err = spare()
		}
		if err == nil && (i.width() == 0) != (c.Action == autoscale.Promote) {
			err = fmt.Errorf("%s has %d NPUs", i.name, i.width())
		}
		if err != nil {
			return err
		}
		f.begin(op, i)
		f.reserve(op, c.Node, c.Numbers)
		f.after(f.takes(c.Action), func() { f.joined(op, i) })
	case autoscale.Narrow:
		if i, err = part(c.Instance); err == nil && !i.hasAll(c.Numbers, len(c.Numbers) < i.width()) {
			err = fmt.Errorf("%s has not %v to give up", i.name, c.Numbers)
		}
		if err != nil {
			return err
		}
		f.begin(op, i)
		f.after(f.takes(c.Action), func() {
			f.leave(op, i, c.Numbers, func() {
				f.release(op, c.Node, op.reserved)
				f.finish(op)
			})
		})
	case autoscale.Move:
		if from, err = part(c.From); err == nil && !from.hasAll(c.Numbers, true) {
			err = fmt.Errorf("%s has not %v to give up", from.name, c.Numbers)
		}
		if err == nil && c.Instance != "" {
			i, err = part(c.Instance)
		}
		if err == nil && len(c.Numbers) == from.width() && !f.without(from) {
			err = fmt.Errorf("%s is the last of its roles", from.name)
		}
		if err != nil {
			return err
		}
		f.begin(op, from)
		from.ending = len(c.Numbers) == from.width()
		half, start := f.takes(c.Action)/2, time.Duration(0)
		if i != nil {
			f.lock(op, i)
		} else {
			start = f.takes(autoscale.Add)
		}
		f.after(half, func() {
			f.leave(op, from, c.Numbers, func() {
				f.after(half+start, func() {
					if i == nil {
						i = f.add(Instance{Name: fmt.Sprintf("%s-%d", c.Roles, f.started), Node: c.Node, Roles: c.Roles, Replica: true}, nil)
					}
					f.joined(op, i)
				})
			})
		})
	case autoscale.Add:
		if err = spare(); err == nil && (c.Count < 1 || c.NPUs < 1 || len(c.Numbers) != c.Count*c.NPUs || stagesOf(c.Roles) == 0) {
			err = fmt.Errorf("%d instances %s of %d NPUs, on %v", c.Count, c.Roles, c.NPUs, c.Numbers)
		}
		if err != nil {
			return err
		}
		f.begin(op)
		f.reserve(op, c.Node, c.Numbers)
		f.after(f.takes(c.Action), func() {
			f.count()
			for k := range c.Count {
				f.add(Instance{Name: fmt.Sprintf("%s-%d", c.Roles, f.started), Node: c.Node, Roles: c.Roles, Replica: true}, c.Numbers[k*c.NPUs:(k+1)*c.NPUs])
			}
			op.reserved = nil
			f.finish(op)
		})
	case autoscale.Remove:
		if i, err = part(c.Instance); err == nil && !f.without(i) {
			err = fmt.Errorf("%s is the last of its roles", i.name)
		}
		if err != nil {
			return err
		}
		i.ending = true
		f.begin(op, i)
		numbers := i.numbers()
		f.leave(op, i, numbers, func() {
			f.after(f.takes(c.Action), func() {
				f.release(op, c.Node, op.reserved)
				f.instances = slices.DeleteFunc(f.instances, func(o *instance) bool { return o == i })
				f.finish(op)
			})
		})
	case autoscale.Rebalance: // experts are not simulated: it takes its time
		if i, err = part(c.Instance); err != nil {
			return err
		}
		f.begin(op, i)
		f.after(f.takes(c.Action), func() { f.finish(op) })
	default:
		return fmt.Errorf("there is no change %q", c.Action)
	}
	return nil
}

// hasAll reports whether it has these NPUs and, unless it may give up all, others.
func (i *instance) hasAll(numbers []int, all bool) bool {
	has := i.numbers()
	for _, n := range numbers {
		if !slices.Contains(has, n) {
			return false
		}
	}
	return len(numbers) > 0 && (all || len(numbers) < len(has))
}

// numbers are its NPUs.
func (i *instance) numbers() (all []int) {
	for _, n := range i.npus {
		if n != nil {
			all = append(all, n.number)
		}
	}
	slices.Sort(all)
	return all
}

// without reports whether every stage has an instance that takes work without i.
func (f *Fleet) without(i *instance) bool {
	var served stages
	for _, o := range f.instances {
		if o != i && o.ready && !o.ending && o.open != 0 {
			served |= o.set
		}
	}
	return i.set&^served == 0
}

func (f *Fleet) begin(op *operation, parts ...*instance) {
	f.ops = append(f.ops, op)
	for _, i := range parts {
		f.lock(op, i)
	}
}

func (f *Fleet) lock(op *operation, i *instance) {
	i.op = string(op.order.Action)
	op.parts = append(op.parts, i)
}

// reserve takes spare NPUs for an operation.
func (f *Fleet) reserve(op *operation, node string, numbers []int) {
	f.count()
	f.spare[node] = slices.DeleteFunc(f.spare[node], func(n int) bool { return slices.Contains(numbers, n) })
	op.reserved = append(op.reserved, numbers...)
}

// release makes NPUs of an operation spare.
func (f *Fleet) release(op *operation, node string, numbers []int) {
	f.count()
	f.spare[node] = append(f.spare[node], numbers...)
	slices.Sort(f.spare[node])
	op.reserved = nil
}

// joined gives an instance the NPUs of an operation, which is complete then.
func (f *Fleet) joined(op *operation, i *instance) {
	f.count()
	for _, n := range op.reserved {
		i.join(n)
	}
	op.reserved = nil
	f.finish(op)
}

// finish ends an operation.
func (f *Fleet) finish(op *operation) {
	for _, i := range op.parts {
		i.op = ""
	}
	f.ops = slices.DeleteFunc(f.ops, func(o *operation) bool { return o == op })
	f.result.Made = append(f.result.Made, Made{op.order, op.began, f.now - op.began})
	f.wake()
}

// wake has everybody look for work: there are other NPUs.
func (f *Fleet) wake() {
	f.line.grant()
	for s := range autoscale.Stages {
		f.dispatch(autoscale.Stage(s))
	}
}

// leave has NPUs of an instance leave: they get nothing new, finish pictures and prompts, and what decodes on them goes on on the others,
// or with other instances. then is called when they are nobody's.
func (f *Fleet) leave(op *operation, i *instance, numbers []int, then func()) {
	for _, n := range i.npus {
		if n != nil && slices.Contains(numbers, n.number) {
			n.leaving = true
			op.leaving = append(op.leaving, n)
		}
	}
	i.closing = len(op.leaving) == i.width()
	i.epoch()
	op.drained = func() {
		f.count()
		for _, n := range op.leaving {
			i.part(n)
			op.reserved = append(op.reserved, n.number)
		}
		op.leaving, op.drained = nil, nil
		if i.width() == 0 {
			i.closing, i.ending = false, false // a standby, unless it is removed
		}
		then()
	}
	f.settle(i)
	f.wake()
}

// settle goes on with an operation that waits for NPUs of an instance, between two steps.
func (f *Fleet) settle(i *instance) {
	for _, op := range f.ops {
		if op.drained == nil || op.parts[0] != i {
			continue
		}
		if i.stepping {
			return
		}
		var over []*request
		for _, r := range slices.Concat(i.seqs, i.arriving) {
			if !r.npu.leaving {
				continue
			}
			if i.open != 0 {
				n := i.seat(r, true)
				r.npu.seqs--
				r.npu.kv -= r.kv()
				r.sit(i, n)
				continue
			}
			over = append(over, r)
		}
		for _, r := range over {
			same := func(o *request) bool { return o == r }
			i.seqs, i.arriving = slices.DeleteFunc(i.seqs, same), slices.DeleteFunc(i.arriving, same)
			i.load.Sequences--
			r.stand()
			r.taken++
		}
		f.queues[autoscale.Decode] = append(over, f.queues[autoscale.Decode]...)
		for _, n := range op.leaving {
			if !n.idle() {
				f.dispatch(autoscale.Decode)
				return
			}
		}
		op.drained()
		f.dispatch(autoscale.Decode)
		return
	}
}
