package act

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/services/scaler/lead"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/wire"
)

// Bounds of asking who starts processes: it asks the HMM in its turn.
const (
	askMost   = 6 * time.Second
	probeMost = time.Second
	askAgain  = 200 * time.Millisecond
)

// up has `trireme up` start and stop processes, on the nodes where it runs.
type up struct {
	cfg    *Config
	beats  *bus.Instances
	advice *advice // where it does not
}

// able implements starter.
func (u *up) able(ctx context.Context, node, roles string, more int) (string, bool) {
	ctx, cancel := context.WithTimeout(ctx, probeMost)
	defer cancel()
	var report wire.ReplicasReport
	err := u.cfg.Bus.Ask(ctx, wire.SubjectReplicas(node), &wire.Replicas{Roles: roles, Start: 1, Check: true}, &report)
	if errors.Is(err, nats.ErrNoResponders) {
		return u.advice.able(ctx, node, roles, more)
	}
	return "", true // if it is slow Do waits for it
}

// ask asks once, however often it takes: the id makes that harmless.
func (u *up) ask(ctx context.Context, term *lead.Term, node string, ask wire.Replicas) (report wire.ReplicasReport, err error) {
	for {
		if err := term.Check(); err != nil {
			return report, err
		}
		ask.Fence = term.Fence()
		report = wire.ReplicasReport{}
		try, cancel := context.WithTimeout(ctx, askMost)
		err := u.cfg.Bus.Ask(try, wire.SubjectReplicas(node), &ask, &report)
		cancel()
		switch {
		case err == nil && report.Fence > ask.Fence: // as of bus.Change
			if err := term.Raise(ctx, report.Fence); err != nil {
				return report, err
			}
			continue
		case err == nil:
			return report, nil
		case errors.Is(err, nats.ErrNoResponders):
			return wire.ReplicasReport{Why: fmt.Sprintf("nobody starts or stops processes on node %s: `trireme up` did", node)}, nil
		}
		u.cfg.Log.Debug("asking who starts processes", "node", node, "error", err)
		select {
		case <-time.After(askAgain):
		case <-ctx.Done():
			return report, fmt.Errorf("asking who starts processes on node %s: %w", node, context.Cause(ctx))
		}
	}
}

// start implements starter.
func (u *up) start(ctx context.Context, term *lead.Term, op *lead.Operation, id string) (Outcome, error) {
	c := &op.Change
	report, err := u.ask(ctx, term, c.Node, wire.Replicas{Roles: c.Roles, Start: max(1, c.Count), NPUs: c.NPUs, ID: id})
	if err != nil || report.Why != "" {
		return Outcome{Why: report.Why}, err
	}
	bounded, cancel := context.WithTimeout(ctx, u.cfg.Ready)
	defer cancel()
	missing := func() []string { return u.lacking(c.Node, report.Started) }
	err = until(bounded, u.beats, func() bool { return len(missing()) == 0 })
	switch {
	case err == nil:
		return Outcome{Done: true, Started: report.Started}, nil
	case ctx.Err() != nil:
		return Outcome{}, err
	}
	why := fmt.Sprintf("%s was not ready within %v", strings.Join(missing(), ", "), u.cfg.Ready)
	ended, err := u.ask(ctx, term, c.Node, wire.Replicas{Roles: c.Roles, Stop: report.Started, ID: id + "u"})
	if ended.Why != "" {
		why += ", and is not stopped: " + ended.Why
	}
	return Outcome{Why: why}, err
}

// lacking are those of some instances that are not ready.
func (u *up) lacking(node string, names []string) []string {
	all := u.beats.All()
	return slices.DeleteFunc(slices.Clone(names), func(name string) bool {
		return slices.ContainsFunc(all, func(i wire.Instance) bool { return i.Node == node && i.Name == name && i.Ready && len(i.NPUs) > 0 })
	})
}

// stop implements starter.
func (u *up) stop(ctx context.Context, term *lead.Term, op *lead.Operation, id string) (Outcome, error) {
	c := &op.Change
	report, err := u.ask(ctx, term, c.Node, wire.Replicas{Roles: c.Roles, Stop: []string{c.Instance}, ID: id})
	if err != nil || report.Why != "" {
		return Outcome{Why: report.Why}, err
	}
	out := Outcome{Done: true, Stopped: report.Stopped}
	bounded, cancel := context.WithTimeout(ctx, u.cfg.Timeout)
	defer cancel()
	err = until(bounded, u.beats, func() bool {
		return !slices.ContainsFunc(u.beats.All(), func(i wire.Instance) bool { return i.Node == c.Node && i.Name == c.Instance })
	})
	if err != nil && ctx.Err() == nil {
		out.Why, err = fmt.Sprintf("%s was told to end and has not within %v", c.Instance, u.cfg.Timeout), nil
	}
	return out, err
}

// until waits for something that heartbeats tell.
func until(ctx context.Context, beats *bus.Instances, ok func() bool) error {
	for {
		changed := beats.Changed()
		if ok() {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
