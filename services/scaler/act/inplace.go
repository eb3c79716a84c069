package act

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"trireme.dev/services/scaler/lead"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/wire"
)

// scale has an instance of the change's node take NPUs, or give some up.
func (a *actuator) scale(ctx context.Context, term *lead.Term, op *lead.Operation, name string, c wire.Change) (Outcome, error) {
	c.Kind = wire.ChangeScale
	return a.change(ctx, term, op, name, c)
}

// change has an instance of the change's node do something, under an id of the half that is next, and waits for the end of that.
func (a *actuator) change(ctx context.Context, term *lead.Term, op *lead.Operation, name string, c wire.Change) (Outcome, error) {
	node := op.Change.Node
	key := wire.LayoutKey(node, name)
	c.ID, c.Left, c.Rate, c.Spare, c.Slack = half(op), a.cfg.Timeout, a.cfg.Rate, wire.DefaultSpare, wire.DefaultSlack
	if a.cfg.Spare != nil {
		c.Spare = *a.cfg.Spare
	}
	if a.cfg.Slack != nil {
		c.Slack = *a.cfg.Slack
	}
	bounded, cancel := context.WithTimeout(ctx, c.Left+a.cfg.Wait)
	defer cancel()
	for {
		i, err := a.await(bounded, node, name)
		if ctx.Err() != nil {
			return Outcome{}, err
		}
		if err != nil { // the record may say how it ended
			out, pending, err := a.gone(ctx, key, name, c.ID)
			if pending && bounded.Err() == nil { // it may only be cut off, and come to its commit yet, until its time is over
				continue
			}
			return out, err
		}
		if err := term.Check(); err != nil {
			return Outcome{}, err
		}
		c.Fence = term.Fence()
		r, err := a.cfg.Bus.Change(bounded, i.ID, key, c, nil)
		out := Outcome{Reports: []*wire.ChangeReport{r}, Why: r.Why}
		switch {
		case err == nil:
			out.Done = true
			return out, nil
		case errors.Is(err, bus.ErrRefused) && r.Fence > c.Fence: // seen before NATS lost its store, or this scaler does not lead any more
			if err := term.Raise(ctx, r.Fence); err != nil {
				return out, err
			}
			continue
		case errors.Is(err, bus.ErrRefused), errors.Is(err, bus.ErrGivenUp):
			out.Why = err.Error()
			return out, nil
		}
		return out, err
	}
}

// await waits for an instance to show a sign of life: it may be started again just now.
func (a *actuator) await(ctx context.Context, node, name string) (*wire.Instance, error) {
	ctx, cancel := context.WithTimeout(ctx, a.cfg.Wait)
	defer cancel()
	var found *wire.Instance
	err := until(ctx, a.beats, func() bool { found = a.find(node, name); return found != nil })
	if err != nil {
		return nil, fmt.Errorf("waiting for %s on node %s: %w", name, node, err)
	}
	return found, nil
}

// gone is how an operation has ended on an instance that shows no sign of life; pending: its record says that it is under way.
func (a *actuator) gone(ctx context.Context, key, name, id string) (out Outcome, pending bool, err error) {
	why := fmt.Sprintf("%s shows no sign of life", name)
	l, _, err := a.cfg.Bus.Layout(ctx, key)
	switch {
	case err == nil && l.Is(id):
		return Outcome{Done: true, Why: why + "; the one in its place starts in the new layout"}, false, nil
	case err == nil && l.Awaits(id):
		pending = true
		why += ", and the operation that it had begun is given up by the one in its place"
	case err == nil && l.Last != nil && l.Last.ID == id:
		why = cmp.Or(l.Last.Why, why)
	case err != nil && !errors.Is(err, bus.ErrNoLayout):
		return Outcome{}, false, err
	}
	return Outcome{Why: why}, pending, nil
}
