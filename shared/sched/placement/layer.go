package placement

import (
	"cmp"
	"math"
	"slices"
)

// layer is the placement of one layer's experts while it is worked on.
type layer struct {
	npus  Set
	slots int // most experts of an NPU
	load  []uint64
	mean  uint64 // load of an NPU if all were alike
	old   []Set  // a copy that lies here already costs nothing
	has   []Set  // the copies, all on npus

	used  [MaxNPUs]int    // experts of each NPU
	total [MaxNPUs]uint64 // load of each NPU
}

// newLayer returns a layer that has what is on npus of the given copies.
func newLayer(copies []Set, load []uint64, npus Set, slots int) *layer {
	l := &layer{
		npus: npus, slots: slots, load: scaled(load, len(copies)),
		old: make([]Set, len(copies)), has: make([]Set, len(copies)),
	}
	if len(copies) > 0 {
		l.mean = scale / uint64(npus.Len())
	}
	for e, s := range copies {
		l.set(e, s&npus)
	}
	return l
}

// share is the load of each of so many copies of expert e.
func (l *layer) share(e, copies int) uint64 {
	if copies == 0 {
		return 0
	}
	return l.load[e] / uint64(copies)
}

// set has expert e be on the NPUs of to.
func (l *layer) set(e int, to Set) {
	from := l.has[e]
	share := l.share(e, from.Len())
	for n := range from.All() {
		l.used[n]--
		l.total[n] -= share
	}
	share = l.share(e, to.Len())
	for n := range to.All() {
		l.used[n]++
		l.total[n] += share
	}
	l.has[e] = to
}

// busiest is the load of the NPU that has most.
func (l *layer) busiest() uint64 { return l.total[l.hottest()] }

func (l *layer) hottest() int {
	hot := -1
	for n := range l.npus.All() {
		if hot < 0 || l.total[n] > l.total[hot] {
			hot = n
		}
	}
	return hot
}

// least is a load below which nobody can bring the busiest NPU: the mean, and the largest expert's share if it had all the
// copies that there is room for.
func (l *layer) least() uint64 {
	copies := min(l.npus.Len(), l.npus.Len()*l.slots-len(l.has)+1)
	return max(l.mean, l.share(l.heaviest(), copies))
}

func (l *layer) heaviest() int {
	most := 0
	for e, v := range l.load {
		if v > l.load[most] {
			most = e
		}
	}
	return most
}

// fill places all experts anew, as EPLB does: one copy each; then, spare times, one more of the expert whose copies have the
// largest share, but not of the expert single; then the copies by falling share, each to the NPU with the least load that has a slot.
func (l *layer) fill(spare, single int) {
	copies := make([]int, len(l.has))
	for e := range copies {
		copies[e] = 1
	}
	for range spare {
		most := -1
		for e, c := range copies {
			if c < l.npus.Len() && e != single && (most < 0 || l.share(e, c) > l.share(most, copies[most])) {
				most = e
			}
		}
		if most < 0 || l.load[most] == 0 {
			break
		}
		copies[most]++
	}
	type one struct {
		e     int
		share uint64
	}
	var all []one
	for e, c := range copies {
		for range c {
			all = append(all, one{e, l.share(e, c)})
		}
	}
	slices.SortStableFunc(all, func(a, b one) int { return cmp.Compare(b.share, a.share) })
	must := len(l.has) // experts without a copy
	free := l.npus.Len() * l.slots
	for _, c := range all {
		if l.has[c.e] != 0 && free <= must {
			continue // the rest of the slots is for experts that have none
		}
		if n := l.lightest(c.e); n >= 0 {
			if l.has[c.e] == 0 {
				must--
			}
			free--
			l.set(c.e, l.has[c.e].With(n))
		}
	}
}

// lightest is the NPU with the least load, of these with the fewest experts, that has a free slot and not expert e; -1: none.
func (l *layer) lightest(e int) int {
	best := -1
	for n := range l.npus.All() {
		if l.used[n] >= l.slots || l.has[e].Has(n) {
			continue
		}
		if best < 0 || l.total[n] < l.total[best] || l.total[n] == l.total[best] && l.used[n] < l.used[best] {
			best = n
		}
	}
	return best
}

// complete has every expert be somewhere and no NPU over its slots.
func (l *layer) complete() {
	for n := range l.npus.All() {
		for l.used[n] > l.slots {
			l.set(l.leaver(n))
		}
	}
	var missing []int
	for e, s := range l.has {
		if s == 0 {
			missing = append(missing, e)
		}
	}
	slices.SortStableFunc(missing, func(a, b int) int { return cmp.Compare(l.load[b], l.load[a]) })
	for _, e := range missing {
		n := l.lightest(e)
		for n < 0 { // all slots are taken, some by second copies
			l.set(l.spare())
			n = l.lightest(e)
		}
		l.set(e, Of(n))
	}
}

// leaver is the expert that an NPU with too many had best lose, and where that is from then on: one that is elsewhere, too, if
// there is one, else the one with the least load.
func (l *layer) leaver(n int) (e int, to Set) {
	best := -1
	for e, s := range l.has {
		if !s.Has(n) {
			continue
		}
		if best < 0 || (s.Len() > 1) != (l.has[best].Len() > 1) && s.Len() > 1 ||
			(s.Len() > 1) == (l.has[best].Len() > 1) && l.share(e, s.Len()) < l.share(best, l.has[best].Len()) {
			best = e
		}
	}
	return best, l.has[best].Without(n)
}

// spare is the second copy that is needed least, and where its expert is without it.
func (l *layer) spare() (e int, to Set) {
	best, load := -1, uint64(math.MaxUint64)
	for e, s := range l.has {
		if s.Len() > 1 && l.share(e, s.Len()) < load {
			best, load = e, l.share(e, s.Len())
		}
	}
	at := -1
	for n := range l.has[best].All() {
		if at < 0 || l.total[n] > l.total[at] {
			at = n
		}
	}
	return best, l.has[best].Without(at)
}
