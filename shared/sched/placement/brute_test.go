package placement_test

import (
	"math"
	"math/rand/v2"
	"testing"

	"trireme.dev/shared/sched/placement"
)

// small is one layer that brute force can go through.
type small struct {
	npus    placement.Set
	slots   int
	load    []uint64
	present []placement.Set
}

// draw returns a random one: up to 5 experts on up to 3 NPUs or 4 on 4, with NPUs that join and leave.
func draw(r *rand.Rand) small {
	var s small
	n := 1 + r.IntN(4)
	experts := 1 + r.IntN([]int{0, 6, 6, 5, 4}[n])
	s.npus = placement.First(n)
	if r.IntN(2) == 0 {
		s.npus = s.npus << r.IntN(3)
	}
	s.slots = (experts+n-1)/n + r.IntN(3)
	for range experts {
		v := uint64(r.IntN(20))
		if r.IntN(4) == 0 {
			v *= 10
		}
		s.load = append(s.load, v)
		present := placement.Set(0)
		for present == 0 && r.IntN(20) > 0 {
			present = placement.Of(r.IntN(6))
			if r.IntN(4) == 0 {
				present = present.With(r.IntN(6))
			}
		}
		s.present = append(s.present, present)
	}
	return s
}

// busiest is the load of the NPU that has most, with each expert's load shared alike by its copies.
func (s *small) busiest(has []placement.Set) float64 {
	var most float64
	for n := range s.npus.All() {
		var sum float64
		for e, at := range has {
			if at.Has(n) {
				sum += s.weight(e) / float64(at.Len())
			}
		}
		most = max(most, sum)
	}
	return most
}

// weight is an expert's load; all are alike where nothing was measured.
func (s *small) weight(e int) float64 {
	for _, v := range s.load {
		if v > 0 {
			return float64(s.load[e])
		}
	}
	return 1
}

// all calls f with every placement that fits.
func (s *small) all(f func(has []placement.Set)) {
	has := make([]placement.Set, len(s.load))
	var used [placement.MaxNPUs]int
	var from func(e int)
	from = func(e int) {
		if e == len(has) {
			f(has)
			return
		}
		for at := s.npus; at != 0; at = (at - 1) & s.npus { // all subsets but the empty one
			fits := true
			for n := range at.All() {
				used[n]++
				fits = fits && used[n] <= s.slots
			}
			if fits {
				has[e] = at
				from(e + 1)
			}
			for n := range at.All() {
				used[n]--
			}
		}
	}
	from(0)
}

func copies(from, to []placement.Set) int {
	n := 0
	for e := range to {
		n += (to[e] &^ from[e]).Len()
	}
	return n
}

// TestBruteForce compares plans with every placement that there is: the busiest NPU has at most a tenth more than in the best
// one, and the copies are, all cases together, at most 1.5% more than the fewest with which a placement as good as the plan's can be
// reached, and never fewer.
func TestBruteForce(t *testing.T) {
	const cases, slack = 10_000, 0.05
	r := rand.New(rand.NewPCG(1, 2))
	made, fewest, worst := 0, 0, 1.0
	for range cases {
		s := draw(r)
		c, err := placement.Plan(placement.Layout{s.present}, placement.Load{s.load}, s.npus,
			placement.Options{Slots: s.slots, Slack: slack})
		if err != nil {
			t.Fatalf("%+v: %v", s, err)
		}
		got, best, few := s.busiest(c.Layout[0]), math.Inf(1), math.MaxInt
		s.all(func(has []placement.Set) {
			most := s.busiest(has)
			best = min(best, most)
			if most <= got*(1+1e-9) {
				few = min(few, copies(s.present, has))
			}
		})
		if got > 1.1*best {
			t.Errorf("%+v: %v has %g on the busiest NPU, %g is possible", s, c.Layout, got, best)
		}
		if len(c.Copies) < few {
			t.Errorf("%+v: %v is said to need %d copies, and no placement as good needs less than %d", s, c.Layout, len(c.Copies), few)
		}
		made, fewest, worst = made+len(c.Copies), fewest+few, max(worst, got/best)
	}
	t.Logf("%d cases: at worst %.3f of the best balance, %d copies where %d are the fewest", cases, worst, made, fewest)
	if float64(made) > 1.015*float64(fewest) {
		t.Errorf("%d copies, %d are the fewest", made, fewest)
	}
}
