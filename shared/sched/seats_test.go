package sched_test

import (
	"slices"
	"testing"

	"trireme.dev/shared/sched"
)

func TestSeats(t *testing.T) {
	for _, c := range []struct {
		held []sched.Held
		want []int
	}{
		{[]sched.Held{{}}, []int{0}},
		{[]sched.Held{{}, {}, {}}, []int{0, 1, 2}},
		{[]sched.Held{{Slabs: 2, Seqs: 1}, {Slabs: 1, Seqs: 9}, {Slabs: 2}}, []int{1, 2, 0}},
		{[]sched.Held{{Slabs: 5, Seqs: 5}, {Slabs: 5, Seqs: 4}, {Slabs: 5, Seqs: 4}, {}}, []int{3, 1, 2, 0}},
	} {
		if got := sched.Seats(c.held, nil); !slices.Equal(got, c.want) {
			t.Errorf("%+v: %v, want %v", c.held, got, c.want)
		}
	}
}
