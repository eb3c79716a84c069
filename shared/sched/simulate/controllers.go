package simulate

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"time"

	"trireme.dev/shared/sched/autoscale"
)

// Scaler is the project's own Controller: autoscale.State.
type Scaler struct {
	state *autoscale.State
	// Decided are the decisions that changed something.
	Decided []autoscale.Decision
}

// NewScaler decides by a policy.
func NewScaler(p autoscale.Policy) *Scaler { return &Scaler{state: autoscale.New(p)} }

// Name implements Controller.
func (s *Scaler) Name() string { return "trireme" }

// Every implements Controller.
func (s *Scaler) Every() time.Duration { return time.Second }

// Decide implements Controller.
func (s *Scaler) Decide(v *autoscale.View) []Order {
	d := s.state.Decide(v)
	if d.Change.Action == autoscale.None {
		return nil
	}
	s.Decided = append(s.Decided, d)
	return []Order{{d.Change, d.Why}}
}

// waiting is what waits for each stage, the gateway's line included. Where decoders have no KV memory left the line waits for them.
func waiting(v *autoscale.View) (q [autoscale.Stages]int) {
	line, kv, npus := 0, 0.0, 0.0
	for s := range q {
		q[s] = v.Queues[s].Pending
		line += v.Queues[s].Waiting
	}
	for k := range v.Instances {
		if i := &v.Instances[k]; i.Has(autoscale.Decode) {
			kv += i.KV * float64(len(i.NPUs))
			npus += float64(len(i.NPUs))
		}
	}
	if npus > 0 && kv/npus > 0.7 {
		q[autoscale.Decode] += line
		return q
	}
	for s := range q {
		q[s] += v.Queues[s].Waiting
	}
	return q
}

// alone are the instances that have a stage's role and no other, the widest first.
func alone(v *autoscale.View, s autoscale.Stage) (all []*autoscale.Instance, npus int) {
	for k := range v.Instances {
		if i := &v.Instances[k]; i.Ready && i.Roles == s.Letter() {
			all = append(all, i)
			npus += len(i.NPUs)
		}
	}
	slices.SortStableFunc(all, func(a, b *autoscale.Instance) int { return cmp.Compare(len(b.NPUs), len(a.NPUs)) })
	return all, npus
}

// move moves an NPU from one stage to another, as a Controller that has no better idea does.
func move(v *autoscale.View, from, to autoscale.Stage, why string) []Order {
	givers, _ := alone(v, from)
	takers, _ := alone(v, to)
	if len(givers) == 0 || len(givers[0].NPUs) == 0 {
		return nil
	}
	g := givers[0]
	n := len(g.NPUs)
	c := autoscale.Change{
		Action: autoscale.Move, Stage: to, From: g.Name, Node: g.Node, Roles: to.Letter(), Numbers: []int{g.NPUs[n-1]}, NPUs: 1, FromNPUs: n - 1,
	}
	if len(takers) > 0 {
		c.Instance, c.NPUs = takers[0].Name, len(takers[0].NPUs)+1
	}
	return []Order{{c, why}}
}

// Switching is the rule by which the EPD paper's system switches roles (arXiv:2501.05460; ResourceAllocatorRuntime in vbdi/epdserve): every
// 5 s the stage with the longest waiting queue gets an instance of the stage with most to spare, unless all queues are at least half as long.
type Switching struct{}

// Name implements Controller.
func (Switching) Name() string { return "epd-trigger" }

// Every implements Controller.
func (Switching) Every() time.Duration { return 5 * time.Second }

// Decide implements Controller.
func (Switching) Decide(v *autoscale.View) []Order {
	if v.Pending { // one at a time
		return nil
	}
	q := waiting(v)
	to := autoscale.Encode
	for s := range autoscale.Stages {
		if q[s] > q[to] {
			to = autoscale.Stage(s)
		}
	}
	balanced, from, most := true, to, 0
	for s := range autoscale.Stages {
		balanced = balanced && 2*q[s] >= q[to]
		if _, n := alone(v, autoscale.Stage(s)); q[s] < q[to] && n-1 > most {
			from, most = autoscale.Stage(s), n-1
		}
	}
	if balanced || most == 0 {
		return nil
	}
	return move(v, from, to, fmt.Sprintf("%v wait", q))
}

// Attaining is ElasticMoE's rule (arXiv:2510.02613): NPUs are added while fewer than 90% of requests meet their targets, and taken away when
// there is little load. The paper tells no window, step or threshold for little; here it is the minute of the signals, one NPU each 5 s
// of the stage that has most waiting for each of its NPUs (decode, where it is the time between tokens that is missed), and all of a
// stage's NPUs busy for less than 40% of the time for a minute.
type Attaining struct {
	idle [autoscale.Stages]time.Duration // since when; 0: it is not
}

// Name implements Controller.
func (*Attaining) Name() string { return "elasticmoe-rule" }

// Every implements Controller.
func (*Attaining) Every() time.Duration { return 5 * time.Second }

// Decide implements Controller.
func (a *Attaining) Decide(v *autoscale.View) []Order {
	var busy [autoscale.Stages]float64
	for s := range busy {
		all, npus := alone(v, autoscale.Stage(s))
		for _, i := range all {
			busy[s] += i.Busy * float64(len(i.NPUs)) / float64(max(1, npus))
		}
		switch {
		case busy[s] >= 0.4:
			a.idle[s] = 0
		case a.idle[s] == 0:
			a.idle[s] = v.Now
		}
	}
	if v.Pending {
		return nil
	}
	const enough, goal = 20, 0.9
	to := -1
	switch {
	case v.TPOT.Requests >= enough && v.TPOT.Met < goal:
		to = int(autoscale.Decode)
	case v.TTFT.Requests >= enough && v.TTFT.Met < goal:
		q, most := waiting(v), -1.0
		for s := range q {
			if _, n := alone(v, autoscale.Stage(s)); float64(q[s])/float64(max(1, n)) > most {
				to, most = s, float64(q[s])/float64(max(1, n))
			}
		}
	}
	if to >= 0 {
		all, _ := alone(v, autoscale.Stage(to))
		for _, i := range all {
			if spare := v.Spare[i.Node]; len(spare) > 0 {
				return []Order{{autoscale.Change{
					Action: autoscale.Widen, Stage: autoscale.Stage(to), Instance: i.Name, Node: i.Node, Roles: i.Roles, Numbers: spare[:1], NPUs: len(i.NPUs) + 1,
				}, "targets are missed"}}
			}
		}
	}
	for s := range a.idle {
		all, npus := alone(v, autoscale.Stage(s))
		if a.idle[s] == 0 || v.Now-a.idle[s] < time.Minute || npus < 2 || s == to || len(all[0].NPUs) < 2 {
			continue
		}
		i := all[0]
		a.idle[s] = 0
		return []Order{{autoscale.Change{
			Action: autoscale.Narrow, Stage: autoscale.Stage(s), Instance: i.Name, Node: i.Node, Roles: i.Roles,
			Numbers: i.NPUs[len(i.NPUs)-1:], NPUs: len(i.NPUs) - 1,
		}, "there is little load"}}
	}
	return nil
}

// Replicas is Kubernetes' HorizontalPodAutoscaler on what each stage has queued and in work, with its defaults
// (https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/): every 15 s desired = ceil(current x metric / target), no
// change within a tolerance of 10%, at most four more or twice as many at a time, fewer only as the most of the last five minutes says.
// Pods have one NPU each.
type Replicas struct {
	Target [autoscale.Stages]float64 // pieces of work for each NPU; 0: DefaultTarget
	asked  [autoscale.Stages][]desired
}

type desired struct {
	at time.Duration
	n  int
}

// DefaultTarget is the pictures, prompts and sequences that an NPU should have: a picture on it and, half of the time, another one; a
// few prompts that share a step; sequences as many as fit the memory of an A100 for OPT-13B, by half.
var DefaultTarget = [autoscale.Stages]float64{1.5, 3, 24}

// Name implements Controller.
func (*Replicas) Name() string { return "hpa-queue" }

// Every implements Controller.
func (*Replicas) Every() time.Duration { return 15 * time.Second }

// Decide implements Controller.
func (h *Replicas) Decide(v *autoscale.View) (all []Order) {
	q := waiting(v)
	spare := map[string][]int{}
	for node, n := range v.Spare {
		spare[node] = n
	}
	for s := range autoscale.Stages {
		stage := autoscale.Stage(s)
		pods, _ := alone(v, stage)
		target := cmp.Or(h.Target[s], DefaultTarget[s])
		current := len(pods)
		if current == 0 {
			continue
		}
		ratio := float64(q[s]+v.Queues[s].InWork) / float64(current) / target
		n := current
		if math.Abs(ratio-1) > 0.1 {
			n = max(1, int(math.Ceil(float64(current)*ratio-1e-9)))
		}
		h.asked[s] = append(slices.DeleteFunc(h.asked[s], func(d desired) bool { return v.Now-d.at > 5*time.Minute }), desired{v.Now, n})
		most := 0
		for _, d := range h.asked[s] {
			most = max(most, d.n)
		}
		if n < current {
			n = min(current, most)
		}
		n = min(n, current+max(4, current))
		why := fmt.Sprintf("%d pieces of work for %d, %g each are wanted", q[s]+v.Queues[s].InWork, current, target)
		for k := n; k < current; k++ {
			i := pods[k]
			all = append(all, Order{autoscale.Change{Action: autoscale.Remove, Stage: stage, Instance: i.Name, Node: i.Node, Roles: i.Roles, Numbers: i.NPUs}, why})
		}
		node := pods[0].Node
		if more := min(n-current, len(spare[node])); more > 0 {
			all = append(all, Order{autoscale.Change{
				Action: autoscale.Add, Stage: stage, Node: node, Roles: stage.Letter(), NPUs: 1, Count: more, Numbers: spare[node][:more],
			}, why})
			spare[node] = spare[node][more:]
		}
	}
	return all
}
