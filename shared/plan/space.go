package plan

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"

	"trireme.dev/shared/conf"
	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/sched/simulate"
)

// Space is the topologies that are thought about.
type Space struct {
	// Families are sets of kinds of instances, by their roles; a topology has at least one instance of each kind of a family. nil: Apart.
	Families [][]string
	Widths   []int // NPUs of an instance; nil: the least with which a kind fits into memory, of 1, 2, 4 and 8
	Rows     []int // most prompt tokens of a step (--rows of prefill and stage); nil: the default
	Steps    []int // most tokens of a step with prompts and decoding (--step-tokens of stage); nil: the default
	// Most is the most topologies of one number of NPUs: with more only families count in which each stage has NPUs of one kind. 0: any number.
	Most int

	longest int               // tokens of a request and its answer
	kinds   map[string][]kind // by roles: those that fit
}

// Apart are the families in which each stage has NPUs of one kind only.
func Apart() [][]string {
	return [][]string{{"E", "P", "D"}, {"EP", "D"}, {"E", "PD"}, {"EPD"}}
}

// order is that of kinds of instances in a topology.
var order = []string{"E", "ED", "EP", "EPD", "P", "PD", "D"}

// Canonical is a topology with its groups in one order, and those that are alike as one, as in Topologies.
func Canonical(t conf.Topology) conf.Topology {
	groups := slices.Clone(t.Groups)
	slices.SortStableFunc(groups, func(a, b conf.Group) int {
		return cmp.Or(cmp.Compare(slices.Index(order, a.Roles), slices.Index(order, b.Roles)), cmp.Compare(a.NPUs, b.NPUs))
	})
	t.Groups = nil
	for _, g := range groups {
		if last := len(t.Groups) - 1; last >= 0 && t.Groups[last].Roles == g.Roles && t.Groups[last].NPUs == g.NPUs {
			t.Groups[last].Count += g.Count
		} else {
			t.Groups = append(t.Groups, g)
		}
	}
	return t
}

// Mixed are all families of these kinds of instances that have all stages which the kinds have together.
func Mixed(kinds ...string) (all [][]string) {
	kinds = slices.Clone(kinds)
	slices.SortStableFunc(kinds, func(a, b string) int { return cmp.Compare(slices.Index(order, a), slices.Index(order, b)) })
	letters := func(kinds []string) (have int) {
		for at, s := range []string{"E", "P", "D"} {
			if strings.Contains(strings.Join(kinds, ""), s) {
				have |= 1 << at
			}
		}
		return have
	}
	for set := 1; set < 1<<len(kinds); set++ {
		var family []string
		for i, k := range kinds {
			if set>>i&1 != 0 {
				family = append(family, k)
			}
		}
		if letters(family) == letters(kinds) {
			all = append(all, family)
		}
	}
	slices.SortStableFunc(all, func(a, b []string) int { return cmp.Compare(len(a), len(b)) })
	return all
}

// kind is a kind of instance.
type kind struct {
	roles string
	npus  int
	kv    int // tokens, 0: any number
}

func (s *Space) complete() error {
	if s.Families == nil {
		s.Families = Apart()
	}
	if s.Rows == nil {
		s.Rows = []int{simulate.Rows}
	}
	if s.Steps == nil {
		s.Steps = []int{simulate.StepTokens}
	}
	for _, f := range s.Families {
		for i, k := range f {
			if err := conf.CheckRoles(k); err != nil || slices.Contains(f[:i], k) {
				return fmt.Errorf("%w: a family of instances %v: kinds of E, P and D, each once", ErrPlan, f)
			}
		}
		if all := strings.Join(f, ""); !strings.Contains(all, "P") || !strings.Contains(all, "D") {
			return fmt.Errorf("%w: instances %v cannot serve a request: they need prefill (P) and decode (D)", ErrPlan, f)
		}
	}
	for _, list := range [][]int{s.Rows, s.Steps, s.Widths} {
		for _, n := range list {
			if n < 1 {
				return fmt.Errorf("%w: NPUs of an instance, rows and step tokens have to be at least 1, not %d", ErrPlan, n)
			}
		}
	}
	return nil
}

// shape finds the kinds of instances that fit into memory, with the longest of the requests.
func (l *Planner) shape() {
	s := &l.p.Space
	for _, load := range append(slices.Clone(l.loads), l.judges...) {
		for i := range load {
			s.longest = max(s.longest, load[i].Prompt+load[i].Output)
		}
	}
	s.kinds = map[string][]kind{}
	for _, f := range s.Families {
		for _, roles := range f {
			if _, done := s.kinds[roles]; done {
				continue
			}
			s.kinds[roles] = nil
			widths, first := s.Widths, false
			if widths == nil {
				widths, first = []int{1, 2, 4, 8}, true
			}
			for _, w := range widths {
				kv, err := l.room(roles, w)
				if err != nil {
					if !first {
						l.Unfit++
					}
					continue
				}
				s.kinds[roles] = append(s.kinds[roles], kind{roles, w, kv})
				if first {
					break
				}
			}
			if len(s.kinds[roles]) == 0 && first {
				l.Unfit++
			}
		}
	}
}

// room is the tokens of KV for which an NPU of a kind of instance has memory, or why it has too little.
func (l *Planner) room(roles string, npus int) (kv int, err error) {
	switch kv, fits := l.p.Room(roles, npus); {
	case !fits:
		return 0, fmt.Errorf("%w: the weights of %s on %d NPUs do not fit into memory", ErrPlan, roles, npus)
	case kv > 0 && kv < l.p.Space.longest && roles != "E":
		return 0, fmt.Errorf("%w: %s on %d NPUs has memory for %d tokens, a request has %d", ErrPlan, roles, npus, kv, l.p.Space.longest)
	default:
		return kv, nil
	}
}

// Fits says why a topology cannot serve the load at any rate, or has no memory for it; nil: it may.
func (l *Planner) Fits(t conf.Topology) error {
	roles := ""
	for _, g := range t.Groups {
		if _, err := l.room(g.Roles, g.NPUs); err != nil {
			return err
		}
		if g.NPUs > 0 {
			roles += g.Roles
		}
	}
	if !strings.Contains(roles, "P") || !strings.Contains(roles, "D") || l.pictures && !strings.Contains(roles, "E") {
		return fmt.Errorf("%w: %s has not all stages that the load needs", ErrPlan, t)
	}
	return nil
}

// Narrowed reports whether there are more topologies of so many NPUs than Space.Most.
func (l *Planner) Narrowed(npus int) bool {
	s, all := &l.p.Space, 0
	for _, f := range s.Families {
		ways := make([]int, npus+1) // to share so many NPUs among the kinds so far
		ways[0] = 1
		for _, roles := range f {
			next := make([]int, npus+1)
			for _, k := range s.kinds[roles] {
				for have, n := range ways {
					for to := have + k.npus; to <= npus; to += k.npus {
						next[to] = min(next[to]+n, math.MaxInt32)
					}
				}
			}
			ways = next
		}
		all += ways[npus]
	}
	return s.Most > 0 && all > s.Most
}

// Topologies are all of so many NPUs, in a fixed order.
func (l *Planner) Topologies(npus int) (all []conf.Topology) {
	narrowed := l.Narrowed(npus)
	for _, f := range l.p.Space.Families {
		if narrowed && len(strings.Join(f, "")) > autoscale.Stages { // a stage has NPUs of two kinds
			continue
		}
		all = append(all, fill(l.p.Space.kinds, f, npus)...)
	}
	return all
}

// Splits are the topologies of so many NPUs in which each stage has NPUs of one kind only, in instances of one NPU each.
func Splits(npus int) (all []conf.Topology) {
	kinds := map[string][]kind{}
	for _, f := range Apart() {
		for _, roles := range f {
			kinds[roles] = []kind{{roles: roles, npus: 1}}
		}
	}
	for _, f := range Apart() {
		all = append(all, fill(kinds, f, npus)...)
	}
	return all
}

// fill is all ways to share NPUs among the kinds of a family, each of which gets an instance at least; in one topology all instances with the
// same roles are as wide.
func fill(kinds map[string][]kind, family []string, npus int) (all []conf.Topology) {
	var groups []conf.Group
	var next func(i, left int)
	next = func(i, left int) {
		if i == len(family) {
			if left == 0 {
				all = append(all, conf.Topology{Groups: slices.Clone(groups)})
			}
			return
		}
		for _, k := range kinds[family[i]] {
			for n := 1; n*k.npus <= left; n++ {
				if i == len(family)-1 && n*k.npus < left {
					continue
				}
				groups = append(groups, conf.Group{Count: n, Roles: k.roles, NPUs: k.npus})
				next(i+1, left-n*k.npus)
				groups = groups[:len(groups)-1]
			}
		}
	}
	next(0, npus)
	return all
}

// Instances are those of a topology, all on one node; kv is the tokens of KV for which each NPU of a kind has memory, nil: any number.
func Instances(t conf.Topology, kv func(roles string, npus int) int) (all []simulate.Instance) {
	for _, g := range t.Groups {
		tokens := 0
		if kv != nil {
			tokens = kv(g.Roles, g.NPUs)
		}
		for range g.Count {
			all = append(all, simulate.Instance{
				Name: fmt.Sprintf("%s-%d", g.Roles, len(all)), Node: Node, Roles: g.Roles, NPUs: g.NPUs, Replica: true, KV: tokens,
			})
		}
	}
	return all
}

// Node is the name of the node on which Instances are.
const Node = "node"

// Config is a topology and its budgets.
type Config struct {
	conf.Topology
	Rows  int
	Steps int // of instances that compute prompts and decode; without any it is the first of the space
}

// configs are the topologies with all budgets that make a difference, the first ones of the space first.
func (s *Space) configs(t conf.Topology) (all []Config) {
	steps := s.Steps[:1]
	for _, g := range t.Groups {
		if strings.Contains(g.Roles, "PD") {
			steps = s.Steps
		}
	}
	for _, rows := range s.Rows {
		for _, n := range steps {
			all = append(all, Config{t, rows, n})
		}
	}
	return all
}
