package autoscale

import (
	"cmp"
	"slices"
	"strings"
)

// stages is a set of stages, a bit each.
type stages uint8

func of(s Stage) stages { return 1 << s }

func rolesOf(letters string) stages {
	var set stages
	for s := range Stages {
		if strings.Contains(letters, Stage(s).Letter()) {
			set |= of(Stage(s))
		}
	}
	return set
}

// fleet is who has how many NPUs, by the set of roles.
type fleet struct {
	npus   [1 << Stages]int
	served [1 << Stages]int // instances that are ready and have NPUs
}

func fleetOf(v *View) fleet {
	var f fleet
	for k := range v.Instances {
		if i := &v.Instances[k]; i.Ready && !i.Standby() {
			f.change(rolesOf(i.Roles), len(i.NPUs), 1)
		}
	}
	return f
}

// change gives an instance with certain roles more NPUs, or fewer, and counts it in (1) or out (-1) or neither.
func (f *fleet) change(roles stages, npus, instances int) {
	f.npus[roles] += npus
	f.served[roles] += instances
}

func (f *fleet) all() int {
	n := 0
	for _, k := range f.npus {
		n += k
	}
	return n
}

// with is the NPUs that have a role.
func (f *fleet) with(s Stage) int { return serving(f.npus[:], s) }

// instances is how many serve a stage.
func (f *fleet) instances(s Stage) int { return serving(f.served[:], s) }

// serving is the sum, of what is counted by set of roles, over those with a stage.
func serving(count []int, s Stage) (n int) {
	for roles, k := range count {
		if stages(roles)&of(s) != 0 {
			n += k
		}
	}
	return n
}

// none is the utilisation of a stage that has no NPU and needs one.
const none = 1e6

// utilisation is, by stage, how much more is needed than there is, when NPUs with several roles divide their time as is best. A set of
// stages needs what its stages need, and has the NPUs with any of these roles: where no set needs more than it has there is a
// division that serves all (Hall's theorem, for work that can be divided). The set that is worst off can have no help: its stages are
// as slow as that says. What it leaves, stages and NPUs, is looked at alike.
func (f *fleet) utilisation(need [Stages]float64) [Stages]float64 {
	var u [Stages]float64
	for left := stages(1<<Stages - 1); left != 0; {
		worst, over := stages(0), -1.0
		for set := stages(1); set < 1<<Stages; set++ {
			if set&^left != 0 {
				continue
			}
			if r := f.ratio(set, left, need); r > over {
				worst, over = set, r
			}
		}
		for s := range Stages {
			if worst&of(Stage(s)) != 0 {
				u[s] = over
			}
		}
		left &^= worst
	}
	return u
}

// ratio is what the stages of a set need over what they have, of the NPUs that serve no stage outside of left.
func (f *fleet) ratio(set, left stages, need [Stages]float64) float64 {
	var wanted, have float64
	for s := range Stages {
		if set&of(Stage(s)) != 0 {
			wanted += need[s]
		}
	}
	for roles, k := range f.npus {
		if stages(roles)&set != 0 && stages(roles)&^left == 0 {
			have += float64(k)
		}
	}
	switch {
	case wanted == 0:
		return 0
	case have <= 0:
		return none
	}
	return wanted / have
}

// wanting is how many NPUs a fleet of a size lacks: as many times its own as the slowest stage, which all requests wait for, is too
// slow, and half of that for each of the others, so that of two changes that leave the slowest as it is the better one is chosen.
func wanting(u [Stages]float64, size int) float64 {
	var worst, sum float64
	for _, over := range u {
		over = max(0, over-1)
		worst, sum = max(worst, over), sum+over
	}
	return (worst + (sum-worst)/2) * float64(max(1, size))
}

// sortedInstances is the instances by name.
func sortedInstances(v *View) []*Instance {
	all := make([]*Instance, len(v.Instances))
	for k := range v.Instances {
		all[k] = &v.Instances[k]
	}
	slices.SortFunc(all, func(a, b *Instance) int {
		return cmp.Or(cmp.Compare(a.Node, b.Node), cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID))
	})
	return all
}
