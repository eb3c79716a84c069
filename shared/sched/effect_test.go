package sched_test

import (
	"cmp"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"trireme.dev/shared/sched"
)

// arrival is one request of a made-up load.
type arrival struct {
	at     time.Duration
	tokens int64
	tenant string
	target time.Duration // to its start; 0: none
}

// outcome is what became of one.
type outcome struct {
	arrival
	refused  bool
	waited   time.Duration // until it started, or was refused
	expected time.Duration // wait, when it came; -1: not known yet
}

// simulate plays a load on a queue before so many servers, each of which does a number of tokens a second. What is late goes
// last or is refused. It measures and decides as the gateway's admission does.
func simulate(load []arrival, order sched.Order, servers int, speed float64, refuse bool) []outcome {
	q := sched.NewQueue(order)
	var rate sched.Rate
	free := make([]time.Duration, servers) // when each server is done
	out := make([]outcome, len(load))
	index := map[*sched.Item]int{}
	give := func(it *sched.Item, at time.Duration) {
		s := slices.Index(free, slices.Min(free))
		free[s] = at + time.Duration(float64(it.Tokens)/speed*float64(time.Second))
		out[index[it]].waited = at - it.Arrived
	}
	late := func(it *sched.Item, now time.Duration) {
		if !refuse {
			q.Demote(it)
			return
		}
		q.Remove(it)
		out[index[it]].refused, out[index[it]].waited = true, now-it.Arrived
	}
	serve := func(until time.Duration) { // all that starts before then
		for q.Len() > 0 && slices.Min(free) <= until {
			now := slices.Min(free)
			for _, it := range q.Overdue(now) {
				late(it, now)
			}
			if it := q.Take(); it != nil {
				rate.Done(now, it.Tokens)
				give(it, now)
			}
			if q.Len() == 0 {
				rate.Stop(now)
			}
		}
	}
	for i, a := range load {
		serve(a.at)
		it := &sched.Item{Tenant: a.tenant, Tokens: a.tokens, Arrived: a.at, Due: sched.Never}
		if a.target > 0 {
			it.Due = a.at + a.target
		}
		index[it] = i
		out[i] = outcome{arrival: a, expected: -1}
		if q.Len() == 0 && slices.Min(free) <= a.at {
			give(it, a.at)
			continue
		}
		if q.Len() == 0 {
			rate.Start(a.at)
		}
		q.Push(it)
		if rate.Known() {
			out[i].expected, _ = rate.Time(a.at, q.Before(it)+it.Tokens)
			if order.Policy == sched.SLO && it.Due != sched.Never && a.at+out[i].expected > it.Due {
				late(it, a.at)
			}
		}
	}
	serve(sched.Never)
	return out
}

// overload is a load of which half as much again comes as 8 servers of 100 tokens/s can do, for a minute, and half of that for
// the next: sizes as of a chat, many short and a few long ones, and two of three are in a hurry.
func overload(seed uint64) []arrival {
	r := rand.New(rand.NewPCG(seed, 1))
	var load []arrival
	for at := 0.0; at < 120; {
		share := 1.5
		if at > 60 {
			share = 0.5
		}
		tokens := min(2000, max(5, math.Exp(4+r.NormFloat64()))) // on average about 90
		at += r.ExpFloat64() * 90 / (800 * share)
		a := arrival{at: time.Duration(at * float64(time.Second)), tokens: int64(tokens), target: 30 * time.Second}
		if r.IntN(3) > 0 {
			a.target = 2 * time.Second
		}
		load = append(load, a)
	}
	return load
}

// mean is the mean wait of those that were served, attained the share of all that started in time.
func mean(out []outcome) float64 {
	var sum float64
	n := 0
	for _, o := range out {
		if !o.refused {
			sum += o.waited.Seconds()
			n++
		}
	}
	return sum / float64(n)
}

func attained(out []outcome) float64 {
	n := 0
	for _, o := range out {
		if !o.refused && o.waited <= o.target {
			n++
		}
	}
	return float64(n) / float64(len(out))
}

// The effect of each policy on an overload that is always the same one.
func TestEffectOfPolicies(t *testing.T) {
	for seed := range uint64(3) {
		load := overload(seed)
		run := func(p sched.Policy, refuse bool) []outcome {
			return simulate(load, sched.Order{Policy: p, Patience: 30 * time.Second}, 8, 100, refuse)
		}
		fcfs, sjf, last, refused := run(sched.FCFS, false), run(sched.SJF, false), run(sched.SLO, false), run(sched.SLO, true)
		t.Logf("%d requests; mean wait: fcfs %.2f s, sjf %.2f s; in time: fcfs %.0f%%, sjf %.0f%%, slo and late ones last %.0f%%, late ones refused %.0f%%",
			len(load), mean(fcfs), mean(sjf), 100*attained(fcfs), 100*attained(sjf), 100*attained(last), 100*attained(refused))
		if mean(sjf) > mean(fcfs)/2 {
			t.Errorf("the shortest first, they wait for %.2f s on average, and %.2f s in the order in which they came", mean(sjf), mean(fcfs))
		}
		if attained(last) < attained(fcfs)+0.1 || attained(refused) < attained(fcfs)+0.1 {
			t.Errorf("in time: %.2f in the order in which they came, %.2f by targets, %.2f with refusals", attained(fcfs), attained(last), attained(refused))
		}
		var work [2]int64 // nothing is lost: what is not refused is served
		for i, out := range [][]outcome{fcfs, last} {
			for _, o := range out {
				if !o.refused {
					work[i] += o.tokens
				}
			}
		}
		if work[0] != work[1] {
			t.Errorf("%d and %d tokens were served", work[0], work[1])
		}
	}
}

// A tenant that brings half an hour of work at once delays others by its requests in service, not by those in line.
func TestEffectOfFairness(t *testing.T) {
	load := func(greedy string) []arrival {
		var l []arrival
		for range 1000 {
			l = append(l, arrival{tokens: 1440, tenant: greedy})
		}
		for i := range 60 {
			l = append(l, arrival{at: time.Duration(i+1) * time.Second, tokens: 80, tenant: "modest"})
		}
		return l
	}
	modest := func(out []outcome) (mean, most float64) {
		for _, o := range out[1000:] {
			mean += o.waited.Seconds() / 60
			most = max(most, o.waited.Seconds())
		}
		return mean, most
	}
	run := func(greedy string) []outcome {
		return simulate(load(greedy), sched.Order{Policy: sched.FCFS}, 8, 100, false)
	}
	oneMean, oneMost := modest(run("modest")) // nobody tells the two apart
	fairMean, fairMost := modest(run("greedy"))
	t.Logf("the modest tenant waits for %.1f s on average, %.1f s at most; not told apart, for %.1f s and %.1f s", fairMean, fairMost, oneMean, oneMost)
	// One request of the greedy tenant takes a server for 14.4 s, of which the eight begin at the same moment here.
	if fairMost > 2*14.4 || fairMean > oneMean/20 {
		t.Errorf("the modest tenant waits for %.1f s on average, %.1f s at most; not told apart, for %.1f s", fairMean, fairMost, oneMean)
	}
}

// What is expected of a wait is what it comes to, in the order of arrival, where nothing that comes later matters.
func TestExpectedWaits(t *testing.T) {
	var errs []float64
	for _, o := range simulate(overload(7), sched.Order{Policy: sched.FCFS}, 8, 100, false) {
		if o.expected > time.Second {
			errs = append(errs, (o.waited-o.expected).Seconds()/o.expected.Seconds())
		}
	}
	slices.SortFunc(errs, func(a, b float64) int { return cmp.Compare(math.Abs(a), math.Abs(b)) })
	half, most := math.Abs(errs[len(errs)/2]), math.Abs(errs[len(errs)*9/10])
	t.Logf("%d waits of a second and more: half of them were foreseen to within %.0f%%, nine of ten to within %.0f%%", len(errs), 100*half, 100*most)
	if len(errs) < 200 || half > 0.2 || most > 0.5 {
		t.Errorf("of %d waits half were foreseen to within %.2f, nine of ten to within %.2f", len(errs), half, most)
	}
}
