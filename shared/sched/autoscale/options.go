package autoscale

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// widest is the most NPUs of an instance.
const widest = 64

// fullest is the part of KV and MM memory that survivors may have in use when others have left: what is there grows.
const fullest = 0.85

// option is a change that could be made, and the fleet that there would be then.
type option struct {
	Alternative
	after fleet
}

// options collects what could be done in one View.
type options struct {
	v      *View
	p      *Policy
	now    fleet
	all    []*Instance // by name
	need   [Stages]float64
	listed []option
}

// add appends an option, unless something forbids it: then it is listed as refused.
func (o *options) add(c Change, after fleet, refused string) {
	a := option{Alternative: Alternative{Change: c, Refused: refused}, after: after}
	a.Cost = o.cost(c)
	a.Effect = Effect{Utilisation: after.utilisation(o.need), NPUs: after.all()}
	a.Score = o.score(&after, a.Effect.Utilisation, a.Cost.Time)
	if a.Refused == "" {
		a.Refused = o.forbidden(c, &after)
	}
	o.listed = append(o.listed, a)
}

func (o *options) cost(c Change) Cost {
	measured := func(a Action) Cost {
		if cost, ok := o.v.Costs[a]; ok {
			return cost
		}
		return o.p.Costs[a]
	}
	cost := measured(c.Action)
	if c.Action == Move && c.Instance == "" { // the process has to be started first
		cost.Time += measured(Add).Time
	}
	return cost
}

// score says how good a fleet is: less is better.
func (o *options) score(f *fleet, u [Stages]float64, change time.Duration) float64 {
	late := wanting(u, o.now.all()) // the same size for all that are compared: to add NPUs makes no lack greater
	for s, b := range o.p.Bounds {
		late += float64(max(0, b.Min-f.with(Stage(s))))
	}
	w := o.p.Weights
	return w.NPU*float64(f.all()) + w.Late*late + w.Change*change.Seconds()
}

// forbidden says which rule of the policy a change breaks. Where the fleet is outside of its bounds already, what brings it nearer
// to them is allowed.
func (o *options) forbidden(c Change, after *fleet) string {
	if !slices.Contains(o.p.Actions, c.Action) {
		return "the policy does not allow to " + string(c.Action)
	}
	if c.Action == Move && c.Instance == "" && !slices.Contains(o.p.Actions, Add) {
		return "it needs a new process, which the policy does not allow"
	}
	if b, more := o.p.Budget, after.all()-o.now.all(); b > 0 && more > 0 && o.held()+more > b {
		return fmt.Sprintf("%d NPUs are more than the budget of %d", o.held()+more, b)
	}
	for k, b := range o.p.Bounds {
		s := Stage(k)
		was, is := o.now.with(s), after.with(s)
		switch {
		case is < was && (is < b.Min || after.instances(s) == 0):
			return fmt.Sprintf("%s would have %d NPUs, at least %d are wanted", s, is, max(1, b.Min))
		case is > was && b.Max > 0 && is > b.Max:
			return fmt.Sprintf("%s would have %d NPUs, at most %d are wanted", s, is, b.Max)
		}
	}
	for _, f := range o.v.Failed {
		if same(f.Change, c) && f.Ago < o.p.Retry {
			return fmt.Sprintf("it failed %v ago: %s", f.Ago.Round(time.Second), f.Why)
		}
	}
	return ""
}

// same reports whether two changes are of the same kind and the same instances, whatever the number of NPUs.
func same(a, b Change) bool {
	return a.Action == b.Action && a.Instance == b.Instance && a.From == b.From && a.Node == b.Node && a.Roles == b.Roles
}

// held is how many NPUs instances have, those that are not ready included.
func (o *options) held() int {
	n := 0
	for _, i := range o.all {
		n += len(i.NPUs)
	}
	return n
}

// crowded says why those who are left could not hold what leaving NPUs of an instance hold; empty: they can.
func (o *options) crowded(from *Instance, leaving int) string {
	left := len(from.NPUs) - leaving
	for _, m := range []struct {
		what  string
		stage Stage
		used  func(*Instance) float64
	}{
		{"KV", Decode, func(i *Instance) float64 { return i.KV }},
		{"encoded pictures", Encode, func(i *Instance) float64 { return i.MM }},
	} {
		if !from.Has(m.stage) {
			continue
		}
		if full := m.used(from) * float64(len(from.NPUs)); left > 0 && full > fullest*float64(left) {
			return fmt.Sprintf("the NPUs that %s would keep have no room for its %s", from.Name, m.what)
		}
		var full, npus float64
		for _, i := range o.all {
			if i.Ready && i.Has(m.stage) {
				full += m.used(i) * float64(len(i.NPUs))
				npus += float64(len(i.NPUs))
			}
		}
		if npus -= float64(leaving); npus > 0 && full > fullest*npus {
			return fmt.Sprintf("the NPUs that would be left have no room for %s's %s", from.Name, m.what)
		}
	}
	return ""
}

// more lists what gives a stage up to so many NPUs more.
func (o *options) more(s Stage, npus int) {
	for _, i := range o.all {
		spare := o.v.Spare[i.Node]
		k := min(npus, len(spare), widest-len(i.NPUs), o.affordable(s))
		if !i.Has(s) || !i.Ready || k < 1 {
			continue
		}
		after := o.now
		c := Change{Action: Widen, Stage: s, Instance: i.Name, Node: i.Node, Roles: i.Roles, Numbers: slices.Clone(spare[:k]), NPUs: len(i.NPUs) + k}
		if i.Standby() {
			c.Action = Promote
			after.change(rolesOf(i.Roles), k, 1)
		} else {
			after.change(rolesOf(i.Roles), k, 0)
		}
		o.add(c, after, "")
	}
	o.replicas(s, npus)
	for _, from := range o.all {
		o.moves(s, npus, from)
	}
}

// affordable is how many NPUs a stage may have more, by its bound and the budget: larger steps would only be refused. At least 1, so
// that there is something to refuse, with its reason.
func (o *options) affordable(s Stage) int {
	k := widest
	if b := o.p.Budget; b > 0 {
		k = min(k, b-o.held())
	}
	if b := o.p.Bounds[s]; b.Max > 0 {
		k = min(k, b.Max-o.now.with(s))
	}
	return max(1, k)
}

// replicas lists processes that could be started: like those that there are.
func (o *options) replicas(s Stage, npus int) {
	type kind struct {
		roles string
		npus  int
	}
	seen := map[kind]bool{}
	for _, like := range o.all {
		k := kind{like.Roles, len(like.NPUs)}
		if !like.Replica || like.Standby() || !like.Has(s) || seen[k] {
			continue
		}
		seen[k] = true
		for _, node := range o.nodes() {
			spare := o.v.Spare[node]
			count := min((npus+k.npus-1)/k.npus, len(spare)/k.npus, max(1, o.affordable(s)/k.npus))
			if count < 1 {
				continue
			}
			after := o.now
			after.change(rolesOf(k.roles), count*k.npus, count)
			o.add(Change{
				Action: Add, Stage: s, Node: node, Roles: k.roles, NPUs: k.npus, Count: count, Numbers: slices.Clone(spare[:count*k.npus]),
			}, after, "")
		}
	}
}

// nodes are all that have NPUs, in order.
func (o *options) nodes() []string {
	var all []string
	for node := range o.v.Spare {
		all = append(all, node)
	}
	for _, i := range o.all {
		all = append(all, i.Node)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// moves lists what NPUs of an instance could do for a stage: on the same node, for an instance that has the role, a standby, or a new
// process. One, as many as are wanted, and half of that are tried: what is best for both stages the score says.
func (o *options) moves(s Stage, npus int, from *Instance) {
	if from.Standby() || !from.Ready || rolesOf(from.Roles) == of(s) {
		return
	}
	most := min(npus, len(from.NPUs))
	var to []*Instance
	for _, i := range o.all {
		if i.Node == from.Node && i != from && i.Has(s) && i.Ready && rolesOf(i.Roles) != rolesOf(from.Roles) && len(i.NPUs) < widest {
			to = append(to, i)
		}
	}
	if len(to) == 0 && slices.ContainsFunc(o.all, func(i *Instance) bool { return i.Replica && rolesOf(i.Roles) == of(s) }) {
		to = append(to, nil)
	}
	tried := []int{1, (most + 1) / 2, most}
	for _, i := range to {
		for _, k := range slices.Compact(tried) {
			c := Change{
				Action: Move, Stage: s, From: from.Name, Node: from.Node, Roles: s.Letter(),
				Numbers: slices.Clone(from.NPUs[len(from.NPUs)-k:]), NPUs: k, FromNPUs: len(from.NPUs) - k,
			}
			after := o.now
			ended := 0
			if c.FromNPUs == 0 {
				ended = -1
			}
			after.change(rolesOf(from.Roles), -k, ended)
			if i == nil {
				after.change(of(s), k, 1)
			} else {
				c.Instance, c.Roles, c.NPUs = i.Name, i.Roles, len(i.NPUs)+k
				began := 0
				if i.Standby() {
					began = 1
				}
				after.change(rolesOf(i.Roles), k, began)
			}
			o.add(c, after, o.crowded(from, k))
		}
	}
}

// fewer lists how NPUs could become spare, as many at a time as can.
func (o *options) fewer(can func(*fleet) bool) {
	for _, i := range o.all {
		if i.Standby() || !i.Ready {
			continue
		}
		s := Stage(0)
		for !i.Has(s) {
			s++
		}
		c := Change{Stage: s, Instance: i.Name, Node: i.Node, Roles: i.Roles}
		if i.Replica {
			after := o.now
			after.change(rolesOf(i.Roles), -len(i.NPUs), -1)
			if can(&after) {
				c.Action, c.NPUs, c.Numbers = Remove, 0, slices.Clone(i.NPUs)
				o.add(c, after, o.crowded(i, len(i.NPUs)))
			}
		}
		for keep := 1; keep < len(i.NPUs); keep++ {
			after := o.now
			after.change(rolesOf(i.Roles), keep-len(i.NPUs), 0)
			if !can(&after) {
				continue
			}
			c.Action, c.NPUs, c.Numbers = Narrow, keep, slices.Clone(i.NPUs[keep:])
			refused := o.crowded(i, len(i.NPUs)-keep)
			o.add(c, after, refused)
			if refused == "" && o.listed[len(o.listed)-1].Refused == "" {
				break
			}
		}
	}
}

// best is the option to choose, nil where there is none; all options are then in the order in which they are good, what is refused
// behind what is not.
func (o *options) best() *option {
	slices.SortStableFunc(o.listed, func(a, b option) int {
		refused := func(x option) int { return min(1, len(x.Refused)) }
		return cmp.Or(
			cmp.Compare(refused(a), refused(b)), cmp.Compare(a.Score, b.Score),
			cmp.Compare(len(a.Change.Roles), len(b.Change.Roles)), // an NPU that has but one thing to do
			cmp.Compare(slices.Index(Actions, a.Change.Action), slices.Index(Actions, b.Change.Action)),
			cmp.Compare(a.Change.NPUs, b.Change.NPUs),
			cmp.Compare(a.Change.Node, b.Change.Node), cmp.Compare(a.Change.Instance, b.Change.Instance), cmp.Compare(a.Change.From, b.Change.From),
		)
	})
	if len(o.listed) == 0 || o.listed[0].Refused != "" {
		return nil
	}
	return &o.listed[0]
}

// told is how many alternatives a Decision lists.
const told = 8

func (o *options) alternatives() []Alternative {
	var all []Alternative
	for _, a := range o.listed[:min(told, len(o.listed))] {
		all = append(all, a.Alternative)
	}
	return all
}

// Sentence says for people what a change is.
func (c Change) Sentence() string {
	numbers := func() string {
		var all []string
		for _, n := range c.Numbers {
			all = append(all, fmt.Sprintf("%s/%d", c.Node, n))
		}
		return strings.Join(all, ", ")
	}
	switch c.Action {
	case Widen:
		return fmt.Sprintf("widen %s to %s", c.Instance, count(c.NPUs, "NPU"))
	case Narrow:
		return fmt.Sprintf("narrow %s to %s", c.Instance, count(c.NPUs, "NPU"))
	case Move:
		to := c.Instance
		if to == "" {
			to = "a new instance of " + c.Stage.String()
		}
		return fmt.Sprintf("move %s from %s to %s", numbers(), c.From, to)
	case Add:
		return fmt.Sprintf("add %s %s of %s on %s", count(c.Count, "instance"), c.Roles, count(c.NPUs, "NPU"), c.Node)
	case Remove:
		return "remove " + c.Instance
	case Promote:
		return fmt.Sprintf("promote the standby %s to %s", c.Instance, count(c.NPUs, "NPU"))
	case Rebalance:
		return "rebalance the experts of " + c.Instance
	}
	return "change nothing"
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
