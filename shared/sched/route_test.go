package sched_test

import (
	"testing"
	"time"

	"trireme.dev/shared/sched"
)

func TestOffer(t *testing.T) {
	const ms = time.Millisecond
	r := sched.Routing{Least: 2 * ms, Limit: 500 * ms}
	for name, x := range map[string]struct {
		own, wait time.Duration
		others    []time.Duration
		to        int
		most      time.Duration
	}{
		"nobody has anything":                      {100 * ms, 0, nil, -1, 0},
		"it lies here":                             {0, 0, []time.Duration{40 * ms, 10 * ms}, -1, 0},
		"it lies there":                            {40 * ms, 0, []time.Duration{0}, 0, 20 * ms},
		"most of it lies with the second":          {100 * ms, 0, []time.Duration{90 * ms, 20 * ms, 70 * ms}, 1, 40 * ms},
		"of two alike the first":                   {100 * ms, 0, []time.Duration{20 * ms, 20 * ms}, 0, 40 * ms},
		"as much there as here":                    {50 * ms, 0, []time.Duration{50 * ms}, -1, 0},
		"less than an offer costs":                 {11 * ms, 0, []time.Duration{10 * ms}, -1, 0},
		"just what an offer costs":                 {12 * ms, 0, []time.Duration{10 * ms}, 0, 1 * ms},
		"whoever is busy lets it wait there, too":  {40 * ms, 300 * ms, []time.Duration{0}, 0, 320 * ms},
		"a wait is bounded, whatever there is not": {time.Hour, 0, []time.Duration{0}, 0, 500 * ms},
	} {
		if to, most := r.Offer(x.own, x.wait, x.others); to != x.to || most != x.most {
			t.Errorf("%s: offered to %d for a wait of at most %v, want %d and %v", name, to, most, x.to, x.most)
		}
	}
	if to, _ := (sched.Routing{Least: ms}).Offer(time.Hour, 0, []time.Duration{0}); to != -1 {
		t.Error("offered although work may not wait at all")
	}
}

func TestWithout(t *testing.T) {
	l := sched.Load{Pictures: 1, Prompts: 2, Sequences: 3}
	if got := l.Without(sched.Load{Prompts: 1, Sequences: 5}); got != (sched.Load{Pictures: 1, Prompts: 1}) {
		t.Errorf("%+v", got)
	}
}
