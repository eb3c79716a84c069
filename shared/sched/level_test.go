package sched_test

import (
	"testing"

	"trireme.dev/shared/sched"
)

func TestLevels(t *testing.T) {
	for _, x := range []struct {
		load                    sched.Load
		onward, compute, decode int
	}{
		{sched.Load{}, 0, 1, 0},
		{sched.Load{Sequences: 1}, 2, 3, 1},
		{sched.Load{Sequences: 200}, 2, 3, 8},
		{sched.Load{Sequences: 1000}, 2, 3, 9},
		{sched.Load{Pictures: 1}, 3, 3, 3},
		{sched.Load{Prompts: 1}, 3, 3, 3},
		{sched.Load{Prompts: 1, Sequences: 9}, 4, 5, 4},
		{sched.Load{Pictures: 1, Prompts: 1}, 5, 5, 4},
		{sched.Load{Prompts: 3}, 6, 6, 4},
		{sched.Load{Prompts: 9}, 8, 8, 6},
		{sched.Load{Prompts: 32}, 9, 9, 8},
	} {
		on, c, d := x.load.LevelToCompute(true), x.load.LevelToCompute(false), x.load.LevelToDecode()
		if on != x.onward || c != x.compute || d != x.decode {
			t.Errorf("%+v asks for prompts at level %d, if it goes on with them itself, or %d, and for sequences at %d, want %d, %d and %d",
				x.load, on, c, d, x.onward, x.compute, x.decode)
		}
	}
	// More work never makes an instance go before one with less, whatever it asks for.
	for _, less := range loads() {
		for _, more := range loads() {
			if less.Pictures <= more.Pictures && less.Prompts <= more.Prompts && less.Sequences <= more.Sequences &&
				(less.LevelToCompute(true) > more.LevelToCompute(true) || less.LevelToCompute(false) > more.LevelToCompute(false) ||
					less.LevelToDecode() > more.LevelToDecode()) {
				t.Fatalf("%+v asks after %+v", less, more)
			}
		}
	}
}

func loads() (all []sched.Load) {
	for _, pictures := range []int{0, 1, 2, 7} {
		for _, prompts := range []int{0, 1, 3, 31} {
			for _, sequences := range []int{0, 1, 2, 63, 300} {
				all = append(all, sched.Load{Pictures: pictures, Prompts: prompts, Sequences: sequences})
			}
		}
	}
	return all
}

func TestBatch(t *testing.T) {
	for _, x := range [][3]int{{0, 32, 1}, {1, 31, 1}, {8, 24, 8}, {31, 1, 1}, {4, 0, 0}} {
		if n := sched.Batch(x[0], x[1]); n != x[2] {
			t.Errorf("with %d in work and room for %d it asks for %d, want %d", x[0], x[1], n, x[2])
		}
	}
}
