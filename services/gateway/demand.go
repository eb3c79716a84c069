package gateway

import (
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"

	"trireme.dev/shared/obs"
	"trireme.dev/shared/obs/quantile"
	"trireme.dev/shared/wire"
)

// demand is what clients ask of this gateway and how long they wait, for whoever asks (wire.SubjectStats): the scaler above all. It is
// safe for concurrent use. Nothing is done for a token that is not done already: of those the metrics know.
type demand struct {
	mu       sync.Mutex
	total    wire.Demand           // counts of requests only
	awaiting map[*arrival]struct{} // without their first token
	classes  map[string]*latencies
	length   float64 // of answers lately, in tokens
}

// firstLength is how long answers are expected to be before one has ended.
const firstLength = 128

// arrival is a prompt that has come.
type arrival struct {
	class  string
	began  time.Time
	target time.Duration // to the first token; 0: none
}

// latencies are those of a class.
type latencies struct{ ttft, tpot *quantile.Window }

// demandWindow is how long latencies count: long enough for a quantile of some ten requests a second, short enough that what a change of
// instances brings is seen within a minute.
const demandWindow = time.Minute

func newDemand() *demand {
	return &demand{awaiting: make(map[*arrival]struct{}), classes: make(map[string]*latencies), length: firstLength}
}

// arrived counts a job of a request that came at began. gone must be called when it has ended, however.
func (d *demand) arrived(j *job, o *objective, began time.Time) (gone func()) {
	a := &arrival{class: o.class, began: began, target: o.targets.TTFT}
	d.mu.Lock()
	defer d.mu.Unlock()
	j.arrival = a
	d.awaiting[a] = struct{}{}
	t := &d.total
	t.Requests++
	t.PromptTokens += uint64(len(j.spec.Prompt))
	t.Expected += uint64(min(d.length, float64(j.spec.Sampling.MaxTokens))) * uint64(j.spec.Choices)
	if n := len(j.pictures); n > 0 {
		t.Pictured++
		t.Pictures += uint64(n)
		t.PictureTokens += uint64(j.pictureTokens())
	}
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.awaiting, a)
	}
}

// refused counts a job that was not let in.
func (d *demand) refused(a *arrival, now time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.total.Refused++
	d.of(a.class).ttft.Miss(now)
}

// first takes note of a job's first token.
func (d *demand) first(a *arrival, now time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.awaiting, a)
	d.of(a.class).ttft.Add(now, now.Sub(a.began), a.target)
}

// ended takes note of an answer that ended well: its tokens, of all choices, and the time between two of them, 0 if it had not two.
func (d *demand) ended(o *objective, now time.Time, tokens, choices int, each time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.total.Ended++
	d.total.Lengths += uint64(tokens)
	d.length += (float64(tokens)/float64(choices) - d.length) / 16
	if each > 0 {
		d.of(o.class).tpot.Add(now, each, o.targets.TPOT)
	}
}

// of are the latencies of a class. d.mu is held.
func (d *demand) of(class string) *latencies {
	l := d.classes[class]
	if l == nil {
		l = &latencies{quantile.NewWindow(demandWindow), quantile.NewWindow(demandWindow)}
		d.classes[class] = l
	}
	return l
}

// read is what there is to say at a time, but for what the metrics and the gate know.
func (d *demand) read(now time.Time) *wire.Demand {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := d.total
	out.Awaiting, out.Window = len(d.awaiting), demandWindow
	overdue := map[string]int{}
	for a := range d.awaiting {
		waited := now.Sub(a.began)
		out.Oldest = max(out.Oldest, waited)
		if a.target > 0 && waited > a.target || a.target == 0 && waited > demandWindow {
			overdue[a.class]++
			d.of(a.class)
		}
	}
	latency := func(w *quantile.Window) wire.Latency {
		s, n := w.Read(now)
		return wire.Latency{Sketch: s.Bytes(), Judged: n.Judged, Met: n.Met, Refused: n.Missed}
	}
	for class, l := range d.classes {
		c := wire.ClassStats{Class: class, TTFT: latency(l.ttft), TPOT: latency(l.tpot)}
		c.TTFT.Overdue = overdue[class]
		if c.TTFT.Sketch != nil || c.TPOT.Sketch != nil || c.TTFT.Overdue > 0 || c.TTFT.Refused > 0 {
			out.Classes = append(out.Classes, c)
		}
	}
	slices.SortFunc(out.Classes, func(a, b wire.ClassStats) int { return strings.Compare(a.Class, b.Class) })
	return &out
}

// stats is what the gateway says of itself.
func (g *Gateway) stats() *wire.Stats {
	d := g.demand.read(time.Now())
	count := func(m prometheus.Metric) uint64 { return uint64(obs.Value(m)) }
	d.Computed, d.Cached, d.Output = count(g.metrics.computed), count(g.metrics.cached), count(g.metrics.generated)
	d.MMHits, d.MMAsked = count(g.metrics.mmHits), count(g.metrics.mmQueries)
	open, waiting := g.gate.Load()
	d.Open, d.Waiting = open+waiting, waiting
	return &wire.Stats{Instance: g.cfg.Instance, Role: "gateway", Node: g.node, Demand: d}
}

// answerStats answers whoever asks for stats, until the subscription ends.
func (g *Gateway) answerStats() (*nats.Subscription, error) {
	return g.bus.Handle(wire.SubjectStats, func(_ []byte, respond func(any) error) {
		if err := respond(g.stats()); err != nil {
			g.log.Warn("answering for stats", "error", err)
		}
	})
}
