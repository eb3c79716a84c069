// Package act carries out what the scaler has decided: changes of instances over NATS (bus.Change), of the number of processes by
// whoever starts them on a node (`trireme up`, wire.Replicas), or by Kubernetes. Which of these, Config says, and New chooses.
//
// Whatever is asked for has ids that are made from the operation's, so that a scaler that comes after one that was killed asks again and
// only finds out how it ended. It also has the fence of the term (lead.Term), which whoever carries it out compares with the newest
// that it has seen (wire.Fence).
package act

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"trireme.dev/services/scaler/lead"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/wire"
)

// Actuator makes changes. It is safe for concurrent use.
type Actuator interface {
	// Able says whether the change can be made here; if not, advice is the command for a person to run. It may ask who starts processes,
	// for a second at the most.
	Able(ctx context.Context, c autoscale.Change) (advice string, ok bool)
	// Do makes the change that op is about, which the caller has noted in the record (lead.Term.Note) and clears from there behind it. A
	// successor calls it again with the operation that it has found. Do notes by itself how far a change in several halves is, in op too.
	// An error says that it is not known how the operation ended, or that it goes on: it stays in the record, and Do is to be called
	// again, by this leader or the next. What was refused or given up is an Outcome.
	Do(ctx context.Context, term *lead.Term, op *lead.Operation) (Outcome, error)
}

// Outcome is how an operation has ended.
type Outcome struct {
	Done  bool          `json:"done"`            // the change is in force; false: everything is as it was, but for what Why says
	Why   string        `json:"why,omitempty"`   // it is not done, or what went wrong behind its commit
	Took  time.Duration `json:"took_ns"`         // of this call of Do
	Bytes int64         `json:"bytes,omitempty"` // that were copied, of Reports
	// Reports are of the operations on instances, in their order: of a move who gives, then who takes.
	Reports []*wire.ChangeReport `json:"reports,omitempty"`
	Started []string             `json:"started,omitempty"` // names of instances; none where nobody says which
	Stopped []string             `json:"stopped,omitempty"` // "
}

// Processes says who changes the number of processes.
type Processes string

// The ways.
const (
	Auto       Processes = "auto"       // Kubernetes in a pod of it; else `trireme up` on nodes where it runs, elsewhere advice
	Up         Processes = "up"         // `trireme up`
	Kubernetes Processes = "kubernetes" // the scale subresource of what has the pods
	Advise     Processes = "advise"     // nobody: the command is told, as under docker compose
)

// Anywhere reports whether the number of processes can be changed on any node, by somebody: then all instances are replicas
// (autoscale.Instance.Replica), not only those of nodes where `trireme up` answers.
func (p Processes) Anywhere() bool { return p == Advise || p == Kubernetes || p == Auto && inPod() }

// Config says how changes are made. What is 0 or empty is as said.
type Config struct {
	Bus       *bus.Bus      // its owner is the caller
	Processes Processes     // Auto
	Timeout   time.Duration // an operation on an instance is given up if it has not come to its commit by then; 1 minute
	Wait      time.Duration // an instance that shows no sign of life is waited for so long, an operation so much longer than Timeout; 1 minute
	Ready     time.Duration // a process that was started is stopped again if it is not ready by then; 5 minutes
	Rate      int64         // most bytes that an operation copies in a second; 0: as fast as it goes
	Spare     *float64      // see wire.Change; nil: wire.DefaultSpare
	Slack     *float64      // "; nil: wire.DefaultSlack
	Cluster   Cluster       // for Kubernetes; of Advise the targets only
	Log       *slog.Logger  // nil: none
}

// starter changes the number of processes.
type starter interface {
	// able is Actuator.Able for processes with certain roles on a node: so many more, or fewer.
	able(ctx context.Context, node, roles string, more int) (advice string, ok bool)
	// start starts processes, once under id, and waits until they are ready, or until it is clear that they will not be, and they are
	// gone again. Errors and outcomes are as Actuator.Do's.
	start(ctx context.Context, term *lead.Term, op *lead.Operation, id string) (Outcome, error)
	// stop ends an instance, once under id, and waits until it has gone.
	stop(ctx context.Context, term *lead.Term, op *lead.Operation, id string) (Outcome, error)
}

// actuator is the Actuator of New.
type actuator struct {
	cfg     Config
	beats   *bus.Instances
	starter starter
}

// New makes an Actuator, which watches the heartbeats until ctx ends. It is the one place that knows all ways.
func New(ctx context.Context, cfg Config) (Actuator, error) {
	cfg.Processes = cmp.Or(cfg.Processes, Auto)
	cfg.Timeout, cfg.Wait, cfg.Ready = cmp.Or(cfg.Timeout, time.Minute), cmp.Or(cfg.Wait, time.Minute), cmp.Or(cfg.Ready, 5*time.Minute)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	beats, err := cfg.Bus.Instances(ctx)
	if err != nil {
		return nil, err
	}
	a := &actuator{cfg: cfg, beats: beats}
	person := &advice{beats, cfg.Cluster.Targets}
	switch {
	case cfg.Processes == Advise:
		for roles, service := range cfg.Cluster.Targets {
			if strings.Contains(service, "/") {
				return nil, fmt.Errorf("target %q of instances %s: write a service of docker compose", service, roles)
			}
		}
		a.starter = person
	case cfg.Processes == Kubernetes || cfg.Processes == Auto && inPod():
		if a.starter, err = newPods(&a.cfg, beats); err != nil {
			return nil, fmt.Errorf("changing the number of pods: %w", err)
		}
	case cfg.Processes == Up || cfg.Processes == Auto:
		a.starter = &up{cfg: &a.cfg, beats: beats, advice: person}
	default:
		return nil, fmt.Errorf("nobody called %q changes the number of processes: there are %s, %s, %s and %s", cfg.Processes, Auto, Up, Kubernetes, Advise)
	}
	return a, nil
}

// Able implements Actuator.
func (a *actuator) Able(ctx context.Context, c autoscale.Change) (advice string, ok bool) {
	switch {
	case c.Action == autoscale.Add:
		return a.starter.able(ctx, c.Node, c.Roles, c.Count)
	case c.Action == autoscale.Remove:
		return a.starter.able(ctx, c.Node, c.Roles, -1)
	case c.Action == autoscale.Move && c.Instance == "":
		return a.starter.able(ctx, c.Node, c.Roles, 1)
	}
	return "", true
}

// Do implements Actuator.
func (a *actuator) Do(ctx context.Context, term *lead.Term, op *lead.Operation) (Outcome, error) {
	began := time.Now()
	out, err := a.do(ctx, term, op)
	out.Took = time.Since(began)
	for _, r := range out.Reports {
		out.Bytes += r.Copied
	}
	if err != nil {
		err = fmt.Errorf("operation %s (%s): %w", op.ID, op.Change.Sentence(), err)
	}
	return out, err
}

func (a *actuator) do(ctx context.Context, term *lead.Term, op *lead.Operation) (Outcome, error) {
	c := &op.Change
	switch c.Action {
	case autoscale.Widen, autoscale.Promote:
		return a.scale(ctx, term, op, c.Instance, wire.Change{Join: c.Numbers})
	case autoscale.Narrow:
		return a.scale(ctx, term, op, c.Instance, wire.Change{Leave: c.Numbers})
	case autoscale.Rebalance:
		return a.change(ctx, term, op, c.Instance, wire.Change{Kind: wire.ChangeRebalance})
	case autoscale.Move:
		return a.move(ctx, term, op)
	case autoscale.Add:
		return a.starter.start(ctx, term, op, half(op))
	case autoscale.Remove:
		return a.starter.stop(ctx, term, op, half(op))
	}
	return Outcome{Why: fmt.Sprintf("nobody knows how to %q", c.Action)}, nil
}

// half is the id of the half of an operation that is next.
func half(op *lead.Operation) string { return fmt.Sprintf("%sx%d", op.ID, op.Step) }

// move has NPUs leave one instance, kept for the one that is to have them, and then join that, or has a process started on them. That the
// first half has ended is noted: it is not asked for again, as who has given its last NPU up may be gone.
func (a *actuator) move(ctx context.Context, term *lead.Term, op *lead.Operation) (Outcome, error) {
	c := &op.Change
	var left Outcome
	if op.Step == 0 {
		leave := wire.Change{Leave: c.Numbers}
		if i := a.find(c.Node, c.Instance); i != nil {
			leave.For = i.Name
		}
		var err error
		if left, err = a.scale(ctx, term, op, c.From, leave); err != nil || !left.Done {
			return left, err
		}
		op.Step = 1
		if err := term.Note(ctx, op); err != nil {
			return left, err
		}
	}
	var out Outcome
	var err error
	if c.Instance == "" {
		out, err = a.starter.start(ctx, term, op, half(op))
	} else {
		out, err = a.scale(ctx, term, op, c.Instance, wire.Change{Join: c.Numbers})
	}
	out.Reports = slices.Concat(left.Reports, out.Reports)
	if err == nil && !out.Done {
		out.Why = fmt.Sprintf("%s left %s and joined nobody, so that they are spare: %s", numbers(c), c.From, out.Why)
	}
	return out, err
}

// numbers names the NPUs of a change as trireme status does.
func numbers(c *autoscale.Change) string {
	var all []string
	for _, n := range c.Numbers {
		all = append(all, fmt.Sprintf("%s/%d", c.Node, n))
	}
	return "NPUs " + strings.Join(all, ", ")
}

// find is an instance by the name that changes have for it; nil: it shows no sign of life.
func (a *actuator) find(node, name string) *wire.Instance {
	for _, i := range a.beats.Named() {
		if i.Node == node && cmp.Or(i.Name, i.ID) == name {
			return &i
		}
	}
	return nil
}
