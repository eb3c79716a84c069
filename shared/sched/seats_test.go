package sched_test

import (
	"slices"
	"testing"

	"trireme.dev/shared/sched"
	"trireme.dev/shared/sched/placement"
)

func TestSeats(t *testing.T) {
	for _, c := range []struct {
		held []sched.Held
		npus placement.Set
		want []int
	}{
		{[]sched.Held{{}}, placement.First(1), []int{0}},
		{[]sched.Held{{}, {}, {}}, placement.First(3), []int{0, 1, 2}},
		{[]sched.Held{{Slabs: 2, Seqs: 1}, {Slabs: 1, Seqs: 9}, {Slabs: 2}}, placement.First(3), []int{1, 2, 0}},
		{[]sched.Held{{Slabs: 5, Seqs: 5}, {Slabs: 5, Seqs: 4}, {Slabs: 5, Seqs: 4}, {}}, placement.First(4), []int{3, 1, 2, 0}},
		{[]sched.Held{{Slabs: 5}, {}, {Slabs: 4}, {Slabs: 4}, {}}, placement.Of(0, 2, 3), []int{2, 3, 0}},
	} {
		if got := sched.Seats(c.held, c.npus, nil); !slices.Equal(got, c.want) {
			t.Errorf("%+v, of {%v}: %v, want %v", c.held, c.npus, got, c.want)
		}
	}
}
