package placement

import "math"

// step is a change of one expert's copies, or of two at once.
type step struct {
	e  int
	to Set
	f  int // -1: of one only
	tf Set

	gain  int64 // by how much it lowers what the NPUs have over the bound
	price int   // copies that have to be made for it; negative: that do not any more
}

// better says whether s is to be preferred to t: the largest gain a copy, of those alike the cheaper one.
func (s *step) better(t *step) bool {
	switch {
	case (s.price <= 0) != (t.price <= 0):
		return s.price <= 0
	case s.price <= 0:
		return s.price < t.price || s.price == t.price && s.gain > t.gain
	}
	a, b := s.gain*int64(t.price), t.gain*int64(s.price)
	return a > b || a == b && s.price < t.price
}

// improve lowers the load of the busiest NPU step by step until none has more than bound or nothing helps. In each step an
// expert of that NPU gets a copy elsewhere, moves, changes places with another, or is left to its other copies. What all
// NPUs have over the bound falls with every step, so there is an end.
func (l *layer) improve(bound uint64) {
	for {
		hot := l.hottest()
		if l.total[hot] <= bound {
			return
		}
		best := step{f: -1}
		consider := func(s step) {
			if s.gain > 0 && (best.gain == 0 || s.better(&best)) {
				best = s
			}
		}
		for e, s := range l.has {
			if s.Has(hot) {
				l.single(e, hot, bound, consider)
			}
		}
		if best.gain == 0 {
			for e, s := range l.has {
				if s.Has(hot) {
					l.double(e, hot, bound, consider)
				}
			}
		}
		if best.gain == 0 {
			return
		}
		l.set(best.e, best.to)
		if best.f >= 0 {
			l.set(best.f, best.tf)
		}
	}
}

// single considers changes of expert e, which is on hot, alone.
func (l *layer) single(e, hot int, bound uint64, consider func(step)) {
	top := l.total[hot]
	try := func(to Set) {
		consider(step{e: e, to: to, f: -1, gain: l.gain(e, to, bound, top), price: l.price(e, to)})
	}
	less := l.has[e].Without(hot)
	if less != 0 {
		try(less)
	}
	for n := range (l.npus &^ l.has[e]).All() {
		if l.used[n] < l.slots {
			try(less.With(n))
			try(l.has[e].With(n))
		}
	}
}

// double considers that expert e, which is on hot, moves or gets a copy where another one makes room for it, which is left to
// its other copies or moves to hot.
func (l *layer) double(e, hot int, bound uint64, consider func(step)) {
	was, top := l.has[e], l.total[hot]
	smallest := l.share(e, was.Len()+1) // of e where it has not been
	for f, at := range l.has {
		if f == e {
			continue
		}
		share := l.share(f, at.Len())
		for n := range (at &^ was).All() {
			if l.total[n] >= bound || l.total[n]-share+smallest >= top {
				continue
			}
			less := at.Without(n)
			for _, tf := range [2]Set{less, less.With(hot)} {
				if tf == 0 {
					continue
				}
				s := step{f: f, tf: tf, gain: l.gain(f, tf, bound, math.MaxUint64), price: l.price(f, tf)}
				l.set(f, tf)
				for _, to := range [2]Set{was.Without(hot).With(n), was.With(n)} {
					if to.Has(hot) && l.used[hot] > l.slots {
						continue
					}
					t := s
					t.e, t.to = e, to
					t.gain += l.gain(e, to, bound, math.MaxUint64)
					t.price += l.price(e, to)
					if t.gain > 0 {
						l.set(e, to)
						for n := range (tf | to).With(hot).All() {
							if l.total[n] >= top {
								t.gain = 0
							}
						}
						l.set(e, was)
						consider(t)
					}
				}
				l.set(f, at)
			}
		}
	}
}

// gain is by how much less the NPUs have over the bound, all together, with expert e on the NPUs of to; 0 if an NPU would then
// have more than before and at least top.
func (l *layer) gain(e int, to Set, bound, top uint64) int64 {
	from := l.has[e]
	before, after := l.share(e, from.Len()), l.share(e, to.Len())
	var gain int64
	for n := range (from | to).All() {
		was := l.total[n]
		is := was
		if from.Has(n) {
			is -= before
		}
		if to.Has(n) {
			is += after
		}
		if is > was && is >= top {
			return 0
		}
		gain += over(was, bound) - over(is, bound)
	}
	return gain
}

func over(load, bound uint64) int64 {
	if load <= bound {
		return 0
	}
	return int64(load - bound)
}

// price is how many more copies have to be made with expert e on the NPUs of to.
func (l *layer) price(e int, to Set) int {
	return (to &^ l.old[e]).Len() - (l.has[e] &^ l.old[e]).Len()
}

// copies are how many have to be made.
func (l *layer) copies() (n int) {
	for e, s := range l.has {
		n += (s &^ l.old[e]).Len()
	}
	return n
}

// thin undoes what turned out not to be needed: a new copy goes, or back to where the expert was, if the bound holds without it.
func (l *layer) thin(bound uint64) {
	bound = max(bound, l.busiest())
	for again := true; again; {
		again = false
		for e := range l.has {
			for n := range (l.has[e] &^ l.old[e]).All() {
				less := l.has[e].Without(n)
				if less != 0 && l.holds(e, less, bound) {
					l.set(e, less)
					again = true
					continue
				}
				for back := range (l.old[e] & l.npus &^ less).All() {
					if l.used[back] < l.slots && l.holds(e, less.With(back), bound) {
						l.set(e, less.With(back))
						again = true
						break
					}
				}
			}
		}
	}
}

// holds says whether no NPU has more than bound with expert e on the NPUs of to.
func (l *layer) holds(e int, to Set, bound uint64) bool {
	was := l.has[e]
	l.set(e, to)
	ok := l.busiest() <= bound
	l.set(e, was)
	return ok
}

// rename has the NPUs change their parts, which are all worth the same, so that many experts are where they were in present.
func (l *layer) rename(present []Set) {
	l.old = present
	var common [MaxNPUs][MaxNPUs]int // experts of part a that NPU b has
	for e, s := range l.has {
		for a := range s.All() {
			for b := range (present[e] & l.npus).All() {
				common[a][b]++
			}
		}
	}
	parts, free := l.npus, l.npus
	var name [MaxNPUs]int
	for parts != 0 {
		a, b := -1, -1
		for p := range parts.All() {
			for n := range free.All() {
				if a < 0 || common[p][n] > common[a][b] {
					a, b = p, n
				}
			}
		}
		name[a] = b
		parts, free = parts.Without(a), free.Without(b)
	}
	for e, s := range l.has {
		var to Set
		for a := range s.All() {
			to = to.With(name[a])
		}
		l.set(e, to)
	}
}
