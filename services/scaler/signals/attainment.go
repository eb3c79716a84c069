package signals

import (
	"maps"
	"slices"
	"time"

	"trireme.dev/shared/obs/quantile"
	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/wire"
)

// attainment is which part of the requests of the gateways' window, of all gateways and classes, met the targets. Where some requests have
// targets of their own at the gateways, classes without any (such as batch jobs) do not count.
func (b *Book) attainment(now time.Duration, t autoscale.Targets) (ttft, tpot autoscale.Attainment) {
	signal := b.gatewaysKnown(now)
	alive := b.alive()
	var first, each met
	for _, id := range slices.Sorted(maps.Keys(alive)) { // in order: the sums of sketches are of floats
		for _, c := range alive[id].last.Classes {
			first.add(&c.TTFT)
			each.add(&c.TPOT)
		}
	}
	return first.of(t.TTFT, t.Percentile/100, signal), each.of(t.TPOT, t.Percentile/100, signal)
}

// met collects latencies.
type met struct {
	judged, others quantile.Sketch // of classes with targets, and without
	missed         int             // that never had one: refused, or late already
}

func (m *met) add(l *wire.Latency) {
	s, err := quantile.Decode(l.Sketch)
	if err != nil { // of another version: what is left is a smaller sample
		return
	}
	to := &m.others
	if l.Judged > 0 {
		to = &m.judged
	}
	to.Merge(&s)
	m.missed += int(l.Refused) + l.Overdue
}

func (m *met) of(target time.Duration, percentile float64, signal autoscale.Signal) autoscale.Attainment {
	sketch := &m.others
	if m.judged.Count() > 0 {
		sketch = &m.judged
	}
	n := sketch.Count()
	a := autoscale.Attainment{Signal: signal, Requests: n + m.missed}
	if a.Requests > 0 {
		a.Met = sketch.Within(target) * float64(n) / float64(a.Requests)
	}
	if n > 0 { // those that missed are behind all others
		a.Quantile = sketch.Quantile(percentile * float64(a.Requests) / float64(n))
	}
	return a
}
