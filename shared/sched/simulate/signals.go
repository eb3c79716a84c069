package simulate

import (
	"cmp"
	"math"
	"slices"
	"time"

	"trireme.dev/shared/sched/autoscale"
)

// What gateways and the scaler remember, as services/gateway/demand.go and services/scaler/signals have it.
const (
	lately      = 10 * time.Second // the work of an instance
	attained    = time.Minute      // latencies
	firstLength = 128              // tokens of an answer, before one has ended
	stale       = time.Minute      // changes that failed are told for so long
)

// signals is what is known of the fleet.
type signals struct {
	f      *Fleet
	total  autoscale.Demand
	length float64 // of answers lately
	lately int     // arrivals since the last Moment

	awaiting map[*request]struct{}
	ttft     []judged
	tpot     []judged
	failed   []failure
	costs    map[autoscale.Action]autoscale.Cost
	seen     int // of Result.Made, in costs
}

// judged is a latency; below 0: it never came.
type judged struct {
	at, took time.Duration
}

type failure struct {
	at     time.Duration
	change autoscale.Change
	why    string
}

// sample is what an instance had done at a time.
type sample struct {
	at    time.Duration
	npus  []int
	busy  []time.Duration
	count counts
}

func newSignals(f *Fleet) signals {
	return signals{f: f, length: firstLength, awaiting: map[*request]struct{}{}, costs: map[autoscale.Action]autoscale.Cost{}}
}

// arrived counts a request at the gateway.
func (g *signals) arrived(r *request) {
	g.lately++
	g.awaiting[r] = struct{}{}
	t := &g.total
	t.Requests++
	t.Pictures += float64(r.Pictures)
	t.Visual += float64(r.Pictures * r.Visual)
	t.Prompt += float64(r.Prompt)
	t.Output += min(g.length, float64(r.Output)) // clients ask for no more than they get: max_tokens
}

func (g *signals) refused() { g.ttft = append(g.ttft, judged{g.f.now, -1}) }

func (g *signals) first(r *request) {
	delete(g.awaiting, r)
	g.ttft = append(g.ttft, judged{g.f.now, g.f.now - r.Arrive})
}

func (g *signals) ended(r *request, o *Outcome) {
	delete(g.awaiting, r)
	g.length += (float64(r.Output) - g.length) / 16
	if o.TPOT > 0 {
		g.tpot = append(g.tpot, judged{g.f.now, o.TPOT})
	}
}

// ask has the controller decide, on signals that are some time old when it does.
func (f *Fleet) ask() {
	c := f.cfg.Control
	if f.now+c.Every() <= f.end {
		f.after(c.Every(), f.ask)
	}
	v := f.view()
	age := f.cfg.Lag[0] + time.Duration(f.rand.Float64()*float64(f.cfg.Lag[1]-f.cfg.Lag[0]))
	lost := -1
	if f.cfg.Lost > 0 && f.rand.Float64() < f.cfg.Lost {
		lost = f.rand.IntN(len(v.Instances) + 1)
	}
	f.after(age, func() {
		v.Now = f.now
		known := autoscale.Signal{Known: true, Age: age}
		v.Demand.Signal, v.TTFT.Signal, v.TPOT.Signal = known, known, known
		for s := range v.Queues {
			v.Queues[s].Signal = known
		}
		for k := range v.Instances {
			v.Instances[k].Signal = known
			if k == lost {
				v.Instances[k].Signal = autoscale.Signal{}
			}
		}
		if lost == len(v.Instances) {
			v.Demand.Signal = autoscale.Signal{}
		}
		if lost >= 0 {
			f.result.Blind++
		}
		v.Pending = len(f.ops) > 0 // the scaler knows what it has begun itself
		for _, o := range c.Decide(v) {
			if err := f.do(o); err != nil {
				f.result.Refused = append(f.result.Refused, o.Sentence()+": "+err.Error())
				f.signals.failed = append(f.signals.failed, failure{f.now, o.Change, err.Error()})
			}
		}
	})
}

// view is what is known now.
func (f *Fleet) view() *autoscale.View {
	g := &f.signals
	v := &autoscale.View{Now: f.now, Demand: g.total, Spare: map[string][]int{}, Costs: g.measured()}
	for node, n := range f.spare {
		v.Spare[node] = slices.Clone(n)
	}
	waiting := float64(f.line.queue.Len())
	for s := range v.Queues {
		v.Queues[s].Pending = len(f.queues[s])
	}
	// Nobody counts the pictures of requests in the line: they are taken to be as all others.
	if n := g.total.Requests; n > 0 {
		perRequest, pictured := g.share()
		v.Queues[autoscale.Encode].Waiting = int(waiting*perRequest + 0.5)
		v.Queues[autoscale.Prefill].Waiting = int(waiting*(1-pictured) + 0.5)
	}
	for _, i := range f.instances {
		v.Queues[autoscale.Encode].InWork += i.load.Pictures
		v.Queues[autoscale.Prefill].InWork += i.load.Prompts
		v.Queues[autoscale.Decode].InWork += i.load.Sequences
		v.Instances = append(v.Instances, i.tell())
	}
	slices.SortFunc(v.Instances, func(a, b autoscale.Instance) int {
		return cmp.Or(cmp.Compare(a.Node, b.Node), cmp.Compare(a.Name, b.Name))
	})
	overdue := 0
	for r := range g.awaiting {
		if f.now-r.Arrive > f.cfg.Targets.TTFT {
			overdue++
		}
	}
	v.TTFT = g.attainment(&g.ttft, f.cfg.Targets.TTFT, overdue)
	v.TPOT = g.attainment(&g.tpot, f.cfg.Targets.TPOT, 0)
	for _, x := range g.failed {
		if ago := f.now - x.at; ago < stale {
			v.Failed = append(v.Failed, autoscale.Failure{Change: x.change, Ago: ago, Why: x.why})
		}
	}
	return v
}

// share is the pictures of a request, and the part of requests that have any, of those that arrived in the last minute.
func (g *signals) share() (pictures, pictured float64) {
	n := 0.0
	for k := int(g.total.Requests) - 1; k >= 0; k-- {
		r := &g.f.result.Outcomes[k].Request
		if g.f.now-r.Arrive > attained {
			break
		}
		n++
		pictures += float64(r.Pictures)
		pictured += math.Min(1, float64(r.Pictures))
	}
	if n == 0 {
		return 0, 0
	}
	return pictures / n, pictured / n
}

// measured is what the last change of each kind took.
func (g *signals) measured() map[autoscale.Action]autoscale.Cost {
	for _, m := range g.f.result.Made[g.seen:] {
		if m.Action != autoscale.Move || m.Instance != "" { // else a start is in it
			g.costs[m.Action] = autoscale.Cost{Time: m.Took}
		}
	}
	g.seen = len(g.f.result.Made)
	all := map[autoscale.Action]autoscale.Cost{}
	for a, c := range g.costs {
		all[a] = c
	}
	return all
}

// attainment is that of the last minute.
func (g *signals) attainment(all *[]judged, target time.Duration, overdue int) autoscale.Attainment {
	drop := 0
	for drop < len(*all) && g.f.now-(*all)[drop].at > attained {
		drop++
	}
	*all = (*all)[drop:]
	a := autoscale.Attainment{Requests: len(*all) + overdue}
	met := 0
	for _, j := range *all {
		if j.took >= 0 && (target == 0 || j.took <= target) {
			met++
		}
	}
	if a.Requests > 0 {
		a.Met = float64(met) / float64(a.Requests)
	}
	return a
}

// tell is what is known of an instance, of which a sample is taken.
func (i *instance) tell() autoscale.Instance {
	t := autoscale.Instance{
		ID: i.id, Name: i.name, Node: i.node, Roles: i.roles, NPUs: i.numbers(), Ready: i.ready && !i.closing, Replica: i.replica,
		Batch: i.load.Sequences,
	}
	s := sample{at: i.f.now, npus: t.NPUs, count: i.count}
	kv := 0
	for _, n := range i.npus {
		if n != nil {
			s.busy = append(s.busy, n.busy)
		}
	}
	for _, r := range i.seqs {
		kv += r.Prompt + r.tokens
	}
	if i.kv > 0 && len(t.NPUs) > 0 {
		t.KV = min(1, float64(kv)/float64(i.kv*len(t.NPUs)))
	}
	if n := len(i.samples); n > 0 && !slices.Equal(i.samples[n-1].npus, s.npus) {
		i.samples = nil
	}
	drop := 0
	for drop < len(i.samples)-1 && i.f.now-i.samples[drop+1].at >= lately {
		drop++
	}
	i.samples = append(slices.Delete(i.samples, 0, drop), s)
	i.work(&t)
	return t
}

// work is what it did lately, as services/scaler/signals makes it of two words of an instance.
func (i *instance) work(t *autoscale.Instance) {
	first, last := &i.samples[0], &i.samples[len(i.samples)-1]
	took, npus := last.at-first.at, float64(len(t.NPUs))
	if took <= 0 || npus == 0 {
		return
	}
	for k := range last.busy {
		t.Busy += (last.busy[k] - first.busy[k]).Seconds() / took.Seconds() / npus
	}
	t.Busy = min(1, max(0, t.Busy))
	for s := range t.Rate {
		rows, spent := last.count.rows[s]-first.count.rows[s], last.count.spent[s]-first.count.spent[s]
		if rows <= 0 || spent <= 0 {
			continue
		}
		t.Rate[s] = rows / spent.Seconds()
		if autoscale.Stage(s) != autoscale.Encode {
			t.Rate[s] /= npus
		}
	}
	for k := 1; k < len(i.samples); k++ {
		a, b := &i.samples[k-1].count, &i.samples[k].count
		d := autoscale.Decode
		rows, steps, spent := b.rows[d]-a.rows[d], b.steps[d]-a.steps[d], b.spent[d]-a.spent[d]
		if rows <= 0 || steps <= 0 {
			continue
		}
		st := autoscale.Step{Batch: int(math.Ceil(rows/steps/npus - 1e-9)), Took: time.Duration(float64(spent) / steps)}
		if at := slices.IndexFunc(t.Steps, func(o autoscale.Step) bool { return o.Batch == st.Batch }); at >= 0 {
			t.Steps[at] = st
		} else {
			t.Steps = append(t.Steps, st)
		}
	}
}
