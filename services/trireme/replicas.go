package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/services/trireme/supervise"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/conf"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/wire"
)

// replicas are the stage processes of `trireme up`, whose number operators change while it runs.
type replicas struct {
	make  func(g conf.Group, name string) supervise.Child
	must  []byte // roles that one instance has to have at least
	sole  soles  // services of which there can be one instance
	model string // folder; "": nothing is said of weights

	mu         sync.Mutex
	supervisor *supervise.Supervisor
	groups     []replicaGroup
	named      map[string]int // instances so far, by service: a name is not used twice
	fence      wire.Fence
	done       []doneReplicas // the latest ones
	out        io.Writer
	stopping   sync.WaitGroup
}

// replicaGroup is alike instances.
type replicaGroup struct {
	conf.Group
	running []string // names, in the order in which they were started
}

// doneReplicas is what was done under an id.
type doneReplicas struct {
	id     string
	report wire.ReplicasReport
}

// doneMost is how many of them are known.
const doneMost = 64

// start starts an instance of a group. r.mu is held.
func (r *replicas) start(g *replicaGroup) string {
	service := bus.ServiceOf(g.Roles)
	name := fmt.Sprintf("%s-%d", service, r.named[service])
	r.named[service]++
	g.running = append(g.running, name)
	r.supervisor.Start(r.make(g.Group, name))
	return name
}

// begin starts the instances of a topology.
func (r *replicas) begin(t conf.Topology) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, g := range t.Groups {
		r.groups = append(r.groups, replicaGroup{Group: g})
		for range g.Count {
			r.start(&r.groups[len(r.groups)-1])
		}
	}
}

// names are all that run.
func (r *replicas) names() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []string
	for _, g := range r.groups {
		all = append(all, g.running...)
	}
	return all
}

// runBy are the instances of a service. r.mu is held.
func (r *replicas) runBy(service string) (names []string) {
	for _, g := range r.groups {
		if bus.ServiceOf(g.Roles) == service {
			names = append(names, g.running...)
		}
	}
	return names
}

// grants are who has the NPUs of the node.
type grants struct {
	spare   []int              // numbers of those that nobody has
	kept    int                // of those that are kept for a while for whoever had them
	named   map[string]bool    // instances that have any, or for which some are kept
	perNPU  bool               // each is a memory domain
	weights []hbm.WeightsStats // that the domains have
}

// set does what is asked for, once. granted asks who has the NPUs of the node.
func (r *replicas) set(ask wire.Replicas, granted func() (grants, error)) wire.ReplicasReport {
	r.mu.Lock()
	defer r.mu.Unlock()
	late := r.fence.Refuses(ask.Fence)
	if i := slices.IndexFunc(r.done, func(d doneReplicas) bool { return ask.ID != "" && d.id == ask.ID }); i >= 0 {
		report := r.done[i].report
		report.Again = true
		return report
	}
	if late {
		return wire.ReplicasReport{
			Why:   fmt.Sprintf("the scaler that asks has fence %d, and one with %d has asked since", ask.Fence, r.fence),
			Fence: uint64(r.fence),
		}
	}
	report := r.apply(ask, granted)
	if ask.ID != "" && !ask.Check && report.Why == "" {
		if r.done = append(r.done, doneReplicas{ask.ID, report}); len(r.done) > doneMost {
			r.done = slices.Delete(r.done, 0, 1)
		}
	}
	return report
}

// apply does what is asked for. r.mu is held.
func (r *replicas) apply(ask wire.Replicas, granted func() (grants, error)) wire.ReplicasReport {
	no := func(format string, args ...any) wire.ReplicasReport {
		return wire.ReplicasReport{Why: fmt.Sprintf(format, args...)}
	}
	if err := conf.CheckRoles(ask.Roles); err != nil {
		return no("%v", err)
	}
	if ask.Count < 0 || ask.Start < 0 || ask.NPUs < 0 {
		return no("%d instances: there can be none at the least", min(ask.Count, ask.Start, ask.NPUs))
	}
	i := slices.IndexFunc(r.groups, func(g replicaGroup) bool {
		return g.Roles == ask.Roles && g.NPUs > 0 && (ask.NPUs == 0 || g.NPUs == ask.NPUs)
	})
	if i < 0 {
		r.groups = append(r.groups, replicaGroup{Group: conf.Group{Roles: ask.Roles, NPUs: max(1, ask.NPUs)}})
		i = len(r.groups) - 1
	}
	running := r.like(ask.Roles)
	report := wire.ReplicasReport{NPUs: r.groups[i].NPUs, Instances: []string{}, Started: []string{}, Stopped: []string{}}
	more := ask.Count - len(running)
	switch {
	case ask.Start > 0:
		more = ask.Start
	case len(ask.Stop) > 0:
		more = -len(ask.Stop)
		for _, name := range ask.Stop {
			if !slices.Contains(running, name) {
				return no("no instance %s with roles %s was started here, but %s", name, ask.Roles, cmp.Or(strings.Join(running, ", "), "none"))
			}
		}
	}
	switch {
	case more > 0:
		if err := r.sole.check(bus.ServiceOf(ask.Roles), len(r.runBy(bus.ServiceOf(ask.Roles)))+more); err != nil {
			return no("%v", err)
		}
		has, err := granted()
		if err != nil {
			return no("asking the HMM for spare NPUs: %v", err)
		}
		if need := more * report.NPUs; len(has.spare) < need {
			if len(has.spare)+has.kept >= need {
				return no("%s spare NPUs, and there are %d; %d are kept for ten seconds for instances that have ended: try again then",
					needs(more, report.NPUs), len(has.spare), has.kept)
			}
			return no("%s spare NPUs, and there are %d: start `trireme up` with spare ones, as in --topology 1E1P1D+%d, or let another "+
				"instance have fewer", needs(more, report.NPUs), len(has.spare), need-len(has.spare))
		}
		if ask.Check {
			if err := r.foresee(&report, &r.groups[i], more, has); err != nil {
				return no("%v", err)
			}
		}
	case more < 0:
		has, err := granted()
		if err != nil {
			return no("asking the HMM which instances have NPUs: %v", err)
		}
		report.Stopped = slices.Clone(running[max(0, len(running)+more):])
		if len(ask.Stop) > 0 {
			report.Stopped = slices.Clone(ask.Stop)
		}
		for _, role := range r.must {
			stays := func(name string) bool { return has.named[name] && !slices.Contains(report.Stopped, name) }
			if strings.IndexByte(ask.Roles, role) >= 0 && !slices.ContainsFunc(r.with(role), stays) {
				return no("no instance with role %c would be left that has NPUs, and nothing would be answered", role)
			}
		}
	}
	if ask.Check {
		report.Instances = slices.DeleteFunc(running, func(n string) bool { return slices.Contains(report.Stopped, n) })
		return report
	}
	for range more {
		report.Started = append(report.Started, r.start(&r.groups[i]))
	}
	if len(report.Stopped) > 0 {
		for i := range r.groups {
			r.groups[i].running = slices.DeleteFunc(r.groups[i].running, func(n string) bool { return slices.Contains(report.Stopped, n) })
		}
		r.stopping.Go(func() {
			if err := r.supervisor.Stop(stopGrace, report.Stopped...); err != nil {
				fmt.Fprintf(r.out, "stopping instances: %v\n", err)
			}
		})
	}
	report.Instances = append(report.Instances, r.like(ask.Roles)...)
	return report
}

// needs is "2 more instances of 4 NPUs each need 8".
func needs(instances, npus int) string {
	if instances == 1 {
		return fmt.Sprintf("1 more instance needs %d", npus)
	}
	if npus == 1 {
		return fmt.Sprintf("%d more instances need %d", instances, instances)
	}
	return fmt.Sprintf("%d more instances of %d NPUs each need %d", instances, npus, instances*npus)
}

// like are the instances with certain roles that were started with NPUs. r.mu is held.
func (r *replicas) like(roles string) (names []string) {
	for _, g := range r.groups {
		if g.Roles == roles && g.NPUs > 0 {
			names = append(names, g.running...)
		}
	}
	return names
}

// with are the instances that have a role, standbys included. r.mu is held.
func (r *replicas) with(role byte) (names []string) {
	for _, g := range r.groups {
		if strings.IndexByte(g.Roles, role) >= 0 {
			names = append(names, g.running...)
		}
	}
	return names
}

// serve answers operators until the returned function is called, which waits for instances that are about to end.
func (r *replicas) serve(ctx context.Context, url, node string) (leave func(), err error) {
	conn, err := bus.Stay(url, "up-"+node)
	if err != nil {
		return nil, err
	}
	granted := func() (grants, error) {
		has := grants{named: map[string]bool{}}
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		all, err := nodes(ctx, conn)
		if err != nil {
			return has, err
		}
		i := slices.IndexFunc(all, func(s hbm.Stats) bool { return s.Node == node })
		if i < 0 {
			return has, errors.New("it does not answer")
		}
		has.perNPU, has.weights = len(all[i].Shared) > 1, all[i].Weights // one NPU is one domain either way
		for _, m := range all[i].Memory {
			switch {
			case m.NPU < 0:
			case m.Instance != "":
				has.named[m.Name] = true
			case m.Reserved == "":
				has.spare = append(has.spare, m.NPU)
			default:
				has.kept++
				has.named[m.Reserved] = true
			}
		}
		return has, nil
	}
	_, err = conn.Subscribe(wire.SubjectReplicas(node), func(m *nats.Msg) {
		var ask wire.Replicas
		report := wire.ReplicasReport{Why: "the question cannot be read"}
		if wire.Unmarshal(m.Data, &ask) == nil {
			report = r.set(ask, granted)
		}
		if data, err := wire.Marshal(&report); err == nil {
			_ = m.Respond(data) // who asked has gone: it sees heartbeats
		}
	})
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("listening for changes of the number of instances: %w", err)
	}
	return func() {
		conn.Close()
		r.stopping.Wait()
	}, nil
}

// runReplicas has `trireme up` start or stop instances.
func (c *scaleCmd) runReplicas(e *env) error {
	roles := bus.RoleLetters(c.Who)
	switch {
	case conf.CheckRoles(roles) != nil:
		return fmt.Errorf("%w--replicas is for a kind of instances: write encoder, prefill or decoder, or letters of a topology such as EPD, instead of %q", errUsage, c.Who)
	case *c.Replicas < 0:
		return fmt.Errorf("%w--replicas %d cannot be negative", errUsage, *c.Replicas)
	}
	ctx, cancel := context.WithTimeout(e.ctx, c.Timeout)
	defer cancel()
	b, err := look(ctx, c.NATSURL, "scale", ackFlag{AckWait: c.AckWait})
	if err != nil {
		return err
	}
	defer b.Close()
	node := c.Node
	if node == "" {
		all, err := nodes(ctx, b.Conn())
		if err != nil {
			return err
		}
		if len(all) != 1 {
			return fmt.Errorf("%w%d nodes answer: say with --node which is meant", errUsage, len(all))
		}
		node = all[0].Node
	}
	ask := wire.Replicas{Roles: roles, Count: *c.Replicas, Check: c.DryRun}
	report, err := b.SetReplicas(ctx, node, ask, func(what string) {
		if !c.JSON {
			fmt.Fprintln(e.err, what)
		}
	})
	if err != nil {
		return err
	}
	if c.JSON {
		return writeJSON(e.out, report)
	}
	for _, x := range []struct {
		what  string
		names []string
	}{{"instances", report.Instances}, {"started", report.Started}, {"stopped", report.Stopped}} {
		if len(x.names) > 0 {
			fmt.Fprintf(e.out, "%-9s %s\n", x.what, strings.Join(x.names, ", "))
		}
	}
	if more := ask.Count - len(report.Instances); c.DryRun && more > 0 {
		fmt.Fprintf(e.out, "to start  %d of %d NPUs\nweights   %v of each; %v at most to be copied or read, and of memory beside what is in use\n",
			more, report.NPUs, conf.Bytes(report.Weights), conf.Bytes(report.Fresh))
	}
	return nil
}
