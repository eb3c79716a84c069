package signals

import (
	"math"
	"slices"
	"time"

	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/wire"
)

// stage is the work of an instance lately.
type stage struct {
	at      time.Duration
	samples []sample // in order of time, all with as many NPUs
}

type sample struct {
	at   time.Duration
	work wire.StageStats
}

// hear takes note of what an instance says. When it has other NPUs than before, what was before says nothing of them.
func (w *stage) hear(at time.Duration, work *wire.StageStats) {
	w.at = at
	if n := len(w.samples); n > 0 && (!sameNPUs(&w.samples[n-1].work, work) || work.Busy < w.samples[n-1].work.Busy) {
		w.samples = w.samples[:0]
	}
	drop := 0
	for drop < len(w.samples)-1 && at-w.samples[drop+1].at >= lately {
		drop++
	}
	w.samples = append(slices.Delete(w.samples, 0, drop), sample{at, *work})
}

func sameNPUs(a, b *wire.StageStats) bool {
	return slices.EqualFunc(a.NPUs, b.NPUs, func(x, y wire.NPUWork) bool { return x.NPU == y.NPU })
}

// tell says in an instance's part of the view what it did lately.
func (w *stage) tell(i *autoscale.Instance) {
	last := &w.samples[len(w.samples)-1]
	npus := float64(len(last.work.NPUs))
	if last.work.Rows > 0 && npus > 1 {
		i.Balance = last.work.Balance
	}
	for _, r := range last.work.Roles {
		if r.Role == autoscale.Decode.String() {
			i.Batch = r.InWork
		}
	}
	first := &w.samples[0]
	took := last.at - first.at
	if took <= 0 || npus == 0 {
		return
	}
	for k := range last.work.NPUs {
		i.Busy += (last.work.NPUs[k].Busy - first.work.NPUs[k].Busy).Seconds() / took.Seconds() / npus
	}
	i.Busy = min(1, max(0, i.Busy))
	for _, s := range []autoscale.Stage{autoscale.Encode, autoscale.Prefill, autoscale.Decode} {
		rows, _, spent := between(&first.work, &last.work, s)
		if rows <= 0 || spent <= 0 {
			continue
		}
		i.Rate[s] = rows / spent.Seconds()
		if s != autoscale.Encode { // a picture is one NPU's and its time is that one's, a step is that of all
			i.Rate[s] /= npus
		}
	}
	i.Steps = w.steps(npus)
}

// steps are the decoding steps between each two samples, which had different batches, as far as there were any; the later ones of the
// same batch.
func (w *stage) steps(npus float64) (all []autoscale.Step) {
	for k := 1; k < len(w.samples); k++ {
		rows, steps, spent := between(&w.samples[k-1].work, &w.samples[k].work, autoscale.Decode)
		if rows <= 0 || steps <= 0 || spent <= 0 {
			continue
		}
		st := autoscale.Step{Batch: int(math.Ceil(rows/steps/npus - 1e-9)), Took: time.Duration(float64(spent) / steps)}
		if at := slices.IndexFunc(all, func(o autoscale.Step) bool { return o.Batch == st.Batch }); at >= 0 {
			all[at] = st
		} else {
			all = append(all, st)
		}
	}
	return all
}

// between is what was done for a stage between two samples: rows, steps, and the time of these.
func between(first, last *wire.StageStats, s autoscale.Stage) (rows, steps float64, spent time.Duration) {
	of := func(w *wire.StageStats) (r wire.RoleStats) {
		for _, r := range w.Roles {
			if r.Role == s.String() {
				return r
			}
		}
		return r
	}
	a, b := of(first), of(last)
	return float64(b.Rows) - float64(a.Rows), float64(b.Steps) - float64(a.Steps), b.Spent - a.Spent
}
