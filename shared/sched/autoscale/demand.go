package autoscale

import (
	"math"
	"time"
)

// units are the kinds of work that arrives.
const (
	requests = iota
	pictures
	visual
	prompt
	output
	unitCount
)

type amounts [unitCount]float64

func (d *Demand) totals() amounts {
	return amounts{requests: d.Requests, pictures: d.Pictures, visual: d.Visual, prompt: d.Prompt, output: d.Output}
}

// remembered is how far back arrivals count. A longer time would make the rate surer; where the rate drifts slowly it would be
// wrong by half of that.
const remembered = 2 * time.Minute

// recent are the times at whose rate a change of the load is looked for, each for changes of its own size: a tenfold burst shows
// in a second or two, a third more only in half a minute.
var recent = [...]time.Duration{3 * time.Second, 10 * time.Second, 30 * time.Second}

// surely is how many standard deviations make a change. There is a look each second, at each time, and few arrivals scatter more widely
// upwards than a normal distribution has it: at 4, with three requests a second, one an hour is chance.
const surely = 6

// arrivals estimates at which rate work arrives: an average over as long as the rate has stayed what it is, by a test for that.
// So it is sure of a steady load, and fast when it changes.
type arrivals struct {
	seen []arrival // in order of time; at least one when anything was seen
}

type arrival struct {
	at    time.Duration
	total amounts
}

// see adds what has arrived until now. Totals that have become less begin anew.
func (a *arrivals) see(now time.Duration, total amounts) {
	if n := len(a.seen); n > 0 {
		last := a.seen[n-1]
		if now == last.at {
			return
		}
		for u := range total {
			if total[u] < last.total[u] {
				a.seen = a.seen[:0]
				break
			}
		}
	}
	a.seen = append(a.seen, arrival{now, total})
	drop := 0
	for drop < len(a.seen)-2 && now-a.seen[drop+1].at >= remembered {
		drop++
	}
	a.seen = a.seen[drop:]
	for _, w := range recent {
		if from := a.before(now - w); from > 0 && a.changed(from) {
			a.seen = a.seen[from:]
		}
	}
	if drop > 0 || cap(a.seen) > 4*len(a.seen)+64 { // what is cut off is let go
		a.seen = append(make([]arrival, 0, 2*len(a.seen)), a.seen...)
	}
}

// before is the last sample at or before a time; 0 if there is none.
func (a *arrivals) before(t time.Duration) int {
	for i := len(a.seen) - 1; i > 0; i-- {
		if a.seen[i].at <= t {
			return i
		}
	}
	return 0
}

// changed reports whether any kind of work arrives surely faster, or more slowly, behind sample from than before it.
func (a *arrivals) changed(from int) bool {
	first, mid, last := a.seen[0], a.seen[from], a.seen[len(a.seen)-1]
	old, young := (mid.at - first.at).Seconds(), (last.at - mid.at).Seconds()
	if old <= 0 || young <= 0 || old < young {
		return false // too little to compare with
	}
	arrived := mid.total[requests] - first.total[requests]
	for u := range unitCount {
		was, is := (mid.total[u]-first.total[u])/old, (last.total[u]-mid.total[u])/young
		// The variance of a second's arrivals, as measured, and at least what it is of requests alike that come by chance; of a rate
		// of 0, of one that might have come.
		piece := 1.0
		if arrived > 0 && was > 0 {
			piece = (mid.total[u] - first.total[u]) / arrived
		} else if got := last.total[requests] - mid.total[requests]; got > 0 {
			piece = (last.total[u] - mid.total[u]) / got
		}
		variance := max(a.variance(from, u, was), max(was, piece/old)*piece)
		if math.Abs(is-was) > surely*math.Sqrt(variance/young+variance/old) {
			return true
		}
	}
	return false
}

// variance is that of the arrivals in a second, from the differences of samples up to one.
func (a *arrivals) variance(to, unit int, rate float64) float64 {
	var sum, time float64
	for i := 1; i <= to; i++ {
		dt := (a.seen[i].at - a.seen[i-1].at).Seconds()
		off := a.seen[i].total[unit] - a.seen[i-1].total[unit] - rate*dt
		sum, time = sum+off*off, time+dt
	}
	if time == 0 {
		return 0
	}
	return sum / time
}

// rates is how much arrives in a second, and the standard error of that; false while nothing can be said.
func (a *arrivals) rates() (rate, within amounts, ok bool) {
	if len(a.seen) < 2 {
		return rate, within, false
	}
	first, last := a.seen[0], a.seen[len(a.seen)-1]
	took := (last.at - first.at).Seconds()
	for u := range rate {
		rate[u] = (last.total[u] - first.total[u]) / took
		piece := 0.0
		if n := last.total[requests] - first.total[requests]; n > 0 {
			piece = rate[u] * took / n
		}
		within[u] = math.Sqrt(max(a.variance(len(a.seen)-1, u, rate[u]), rate[u]*piece) / took)
	}
	return rate, within, true
}

// plus is a + k b, and never below 0.
func (a amounts) plus(k float64, b amounts) amounts {
	for u := range a {
		a[u] = max(0, a[u]+k*b[u])
	}
	return a
}
