// Package signals makes of what gateways, stages, HMMs and queues say the view that the scaler decides by (autoscale.View). Book is the
// pure part: what was heard goes in, a view comes out, without a clock or a goroutine. Asker asks.
package signals

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/wire"
)

// Heard is what came of one round of questions. What nobody has answered is left out.
type Heard struct {
	At        time.Duration      // when the questions were sent, since some moment of the caller's choice
	Instances []wire.Instance    // heartbeats, of each name the last process (bus.Instances.Named)
	Stats     []wire.Stats       // of gateways and stages
	Nodes     []hbm.Stats        // of HMMs
	Queues    []bus.Queue        // nil: JetStream has not answered
	Starters  map[string]bool    // nodes on which somebody starts and stops processes (wire.SubjectReplicas)
	Anywhere  bool               // somebody does on all nodes, of whatever name: Kubernetes, or a person with docker compose
	Planned   map[string]float64 // by id of an instance: the balance of its experts that a rebalance would reach
}

const (
	// memory is how far back the shares of what a cache answers count, and of requests with pictures.
	memory = time.Minute
	// lately is how far back the work of an instance counts: some steps of the slowest kind, and over soon when the load changes.
	lately = 10 * time.Second
	// coming is how long a process may take to be ready, or its successor to come, while nothing else is changed. A process that takes
	// longer, or never comes, must not keep everything as it is.
	coming = time.Minute
	// forgotten is how long the counts of a gateway that is silent are remembered: when it is back they go on from there.
	forgotten = time.Hour
	// outOfDate is the age from which on what an HMM has said of spare NPUs is not used.
	outOfDate = 2 * time.Second
)

// Book remembers what was heard. It is not safe for concurrent use.
type Book struct {
	heard    Heard // the last round
	began    bool
	before   map[string]bool // gateways that were there when the Book began: what they count from then on matters
	gateways map[string]*gateway
	stages   map[string]*stage
	nodes    map[string]*node
	queues   [autoscale.Stages]bus.Queue
	queuesAt time.Duration
	queued   bool // queues are known

	total    autoscale.Demand // without its Signal
	sums     []sums           // of the time of memory
	shares   shares
	unsettle map[string]time.Duration // what is on its way, since when
}

// gateway is what one process has counted.
type gateway struct {
	at   time.Duration
	last wire.Demand
}

// sums are what all gateways have counted, as far as the Book knows.
type sums struct {
	at                                    time.Duration
	requests, pictured, pictures          float64
	computed, cached, picturesHit, looked float64
}

// shares say of what arrives how much is work. They stay when nothing arrives.
type shares struct {
	computed float64 // of prompt tokens, that no cache has
	encoded  float64 // of pictures, that no cache has
	pictured float64 // of requests, with pictures
	pictures float64 // of a request
}

type node struct {
	at    time.Duration
	stats hbm.Stats
}

// NewBook returns a Book that has heard nothing.
func NewBook() *Book {
	return &Book{
		before: map[string]bool{}, gateways: map[string]*gateway{}, stages: map[string]*stage{}, nodes: map[string]*node{},
		shares: shares{computed: 1, encoded: 1}, unsettle: map[string]time.Duration{},
	}
}

// Hear takes note of a round. At must not go back.
func (b *Book) Hear(h *Heard) {
	b.heard = *h
	if !b.began {
		for _, i := range h.Instances {
			if i.Role == "gateway" {
				b.before[i.ID] = true
			}
		}
	}
	for i := range h.Stats {
		s := &h.Stats[i]
		switch {
		case s.Demand != nil:
			b.hearGateway(h.At, s.Instance, s.Demand)
		case s.Work != nil:
			w := b.stages[s.Instance]
			if w == nil {
				w = &stage{}
				b.stages[s.Instance] = w
			}
			w.hear(h.At, s.Work)
		}
	}
	b.began = true
	b.share(h.At)
	for _, n := range h.Nodes {
		b.nodes[n.Node] = &node{h.At, n}
	}
	if h.Queues != nil {
		b.queued, b.queuesAt = true, h.At
		for _, q := range h.Queues {
			if s, ok := stageNamed(q.Stage); ok {
				b.queues[s] = q
			}
		}
	}
	b.settle(h)
	b.forget(h)
}

// forget drops what is gone.
func (b *Book) forget(h *Heard) {
	maps.DeleteFunc(b.stages, func(id string, _ *stage) bool {
		return !slices.ContainsFunc(h.Instances, func(i wire.Instance) bool { return i.ID == id })
	})
	maps.DeleteFunc(b.gateways, func(_ string, g *gateway) bool { return h.At-g.at > forgotten })
	maps.DeleteFunc(b.nodes, func(_ string, n *node) bool { return h.At-n.at > forgotten })
}

// hearGateway adds what a gateway has counted since it was heard last. One that is new has counted from 0, as has one of an old name
// whose counts have become less.
func (b *Book) hearGateway(at time.Duration, id string, d *wire.Demand) {
	g, last := b.gateways[id], wire.Demand{}
	switch {
	case g != nil && d.Requests >= g.last.Requests && d.PromptTokens >= g.last.PromptTokens:
		last = g.last
	case g == nil && (!b.began || b.before[id]):
		last = *d
	}
	b.gateways[id] = &gateway{at, *d}
	more := func(now, then uint64) float64 { return float64(now) - float64(min(now, then)) }
	s := sums{at: at}
	if n := len(b.sums); n > 0 {
		s = b.sums[n-1]
		s.at = at
	}
	s.requests += more(d.Requests, last.Requests)
	s.pictured += more(d.Pictured, last.Pictured)
	s.pictures += more(d.Pictures, last.Pictures)
	s.computed += more(d.Computed, last.Computed)
	s.cached += more(d.Cached, last.Cached)
	s.picturesHit += more(d.MMHits, last.MMHits)
	s.looked += more(d.MMAsked, last.MMAsked)
	b.sums = append(b.sums, s)
	// What a cache will have of a request is known when it has its first token: what arrives is counted by the share of lately.
	b.total.Requests += more(d.Requests, last.Requests)
	b.total.Pictures += more(d.Pictures, last.Pictures)
	b.total.Visual += more(d.PictureTokens, last.PictureTokens) * b.shares.encoded
	b.total.Prompt += more(d.PromptTokens, last.PromptTokens) * b.shares.computed
	b.total.Output += more(d.Expected, last.Expected)
}

// share says how much of what arrived lately was work.
func (b *Book) share(now time.Duration) {
	drop := 0
	for drop < len(b.sums)-2 && now-b.sums[drop+1].at >= memory {
		drop++
	}
	b.sums = slices.Delete(b.sums, 0, drop)
	if len(b.sums) == 0 {
		return
	}
	first, last := b.sums[0], b.sums[len(b.sums)-1]
	part := func(to *float64, of, all float64) {
		if all > 0 {
			*to = of / all
		}
	}
	part(&b.shares.computed, last.computed-first.computed, last.computed-first.computed+last.cached-first.cached)
	part(&b.shares.encoded, last.looked-first.looked-(last.picturesHit-first.picturesHit), last.looked-first.looked)
	part(&b.shares.pictured, last.pictured-first.pictured, last.requests-first.requests)
	part(&b.shares.pictures, last.pictures-first.pictures, last.requests-first.requests)
	b.shares.encoded = max(0, b.shares.encoded) // counts of one moment are not read in one moment
}

// settle notes what is on its way: processes that start or end, and NPUs that are kept for the successor of one that has died. While
// that is so a change is under way, whoever made it.
func (b *Book) settle(h *Heard) {
	now := map[string]bool{}
	known := map[string]bool{}
	for _, i := range h.Instances {
		known[i.ID] = true
		if i.Role != "gateway" && !i.Ready {
			now[i.ID] = true
		}
	}
	for _, n := range h.Nodes {
		for _, m := range n.Memory {
			switch {
			case m.NPU < 0:
			case m.Reserved != "":
				now[wire.LayoutKey(n.Node, m.Reserved)] = true
			case m.Instance != "" && !known[m.Instance]:
				now[m.Instance] = true
			}
		}
	}
	for what := range now {
		if _, ok := b.unsettle[what]; !ok {
			b.unsettle[what] = h.At
		}
	}
	maps.DeleteFunc(b.unsettle, func(what string, _ time.Duration) bool { return !now[what] })
}

// Pending says what is on its way or being changed at a time; empty: nothing.
func (b *Book) Pending(now time.Duration) string {
	for _, i := range b.heard.Instances {
		if i.Changing != "" {
			return cmp.Or(i.Name, i.ID) + " is being changed"
		}
	}
	for _, what := range slices.Sorted(maps.Keys(b.unsettle)) {
		if now-b.unsettle[what] < coming {
			return what + " starts or ends"
		}
	}
	return ""
}

// View is what is known at a time, which must not be before that of the last round. Targets are those by which attainment is judged.
func (b *Book) View(now time.Duration, t autoscale.Targets) autoscale.View {
	v := autoscale.View{Now: now, Demand: b.total, Spare: map[string][]int{}, Pending: b.Pending(now) != ""}
	v.Demand.Signal = b.gatewaysKnown(now)
	waiting := 0.0
	for _, g := range b.alive() {
		waiting += float64(g.last.Waiting)
	}
	for s := range v.Queues {
		q := &b.queues[s]
		v.Queues[s] = autoscale.Queue{
			Signal:  autoscale.Signal{Known: b.queued, Age: now - b.queuesAt},
			Pending: int(q.Pending), InWork: q.InWork, Redelivered: q.Redelivered, Oldest: q.Untaken,
		}
	}
	// Of requests that wait at the entrance nobody has counted the pictures: they are taken to be as those of lately.
	v.Queues[autoscale.Encode].Waiting = int(waiting*b.shares.pictures + 0.5)
	v.Queues[autoscale.Prefill].Waiting = int(waiting*(1-b.shares.pictured) + 0.5)
	for name, n := range b.nodes {
		if now-n.at > outOfDate {
			continue
		}
		for _, m := range n.stats.Memory {
			if m.NPU >= 0 && m.Instance == "" && m.Reserved == "" {
				v.Spare[name] = append(v.Spare[name], m.NPU)
			}
		}
		slices.Sort(v.Spare[name])
	}
	for i := range b.heard.Instances {
		if h := &b.heard.Instances[i]; h.Role != "gateway" {
			v.Instances = append(v.Instances, b.instance(now, h))
		}
	}
	slices.SortFunc(v.Instances, func(a, c autoscale.Instance) int {
		return cmp.Or(strings.Compare(a.Node, c.Node), strings.Compare(a.Name, c.Name), strings.Compare(a.ID, c.ID))
	})
	v.TTFT, v.TPOT = b.attainment(now, t)
	return v
}

// alive are the gateways with a heartbeat, by id. Those that have not answered yet have an empty one.
func (b *Book) alive() map[string]gateway {
	all := map[string]gateway{}
	for _, i := range b.heard.Instances {
		if i.Role == "gateway" {
			all[i.ID] = gateway{at: -1}
			if g := b.gateways[i.ID]; g != nil {
				all[i.ID] = *g
			}
		}
	}
	return all
}

// gatewaysKnown is how old the oldest word of a gateway is.
func (b *Book) gatewaysKnown(now time.Duration) (s autoscale.Signal) {
	all := b.alive()
	s.Known = len(all) > 0
	for _, g := range all {
		s.Known = s.Known && g.at >= 0
		s.Age = max(s.Age, now-g.at)
	}
	if !s.Known {
		s.Age = 0
	}
	return s
}

// instance is what is known of one.
func (b *Book) instance(now time.Duration, h *wire.Instance) autoscale.Instance {
	i := autoscale.Instance{ID: h.ID, Name: cmp.Or(h.Name, h.ID), Node: h.Node, Roles: letters(h.Role), Ready: h.Ready}
	n := b.nodes[h.Node]
	if n == nil {
		i.NPUs = slices.Clone(h.NPUs)
		return i
	}
	i.Known, i.Age = true, now-n.at
	memory := map[string]hbm.Usage{}
	var room int64 // that is free, or only cached
	for _, m := range n.stats.Memory {
		if m.NPU < 0 || m.Instance != h.ID {
			continue
		}
		i.NPUs = append(i.NPUs, m.NPU)
		room += m.Free + m.Cached
		for kind, u := range m.Kinds {
			sum := memory[kind]
			sum.Used += u.Used + u.Padded - u.Cached
			memory[kind] = sum
		}
	}
	slices.Sort(i.NPUs)
	used := func(kind mem.Kind) float64 {
		u := memory[kind.String()].Used
		return float64(u) / float64(max(1, u+room))
	}
	i.KV, i.MM = used(mem.KindKV), used(mem.KindMM)
	i.Replica = len(i.NPUs) > 0 && (b.heard.Anywhere || h.Name != "" && b.heard.Starters[h.Node])
	i.Planned = b.heard.Planned[h.ID]
	if !h.Ready { // what it has the HMM knows; it does nothing yet, or no more
		return i
	}
	w := b.stages[h.ID]
	if w == nil {
		i.Known = false
		return i
	}
	i.Age = max(i.Age, now-w.at)
	w.tell(&i)
	return i
}

// letters are an instance's roles as in a topology.
func letters(role string) string {
	var text string
	for s := range autoscale.Stages {
		if wire.HasRole(role, autoscale.Stage(s).String()) {
			text += autoscale.Stage(s).Letter()
		}
	}
	return text
}

// stageNamed is the stage of a name of the bus.
func stageNamed(name string) (s autoscale.Stage, ok bool) {
	return s, s.UnmarshalText([]byte(name)) == nil
}
