package signals_test

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"trireme.dev/services/scaler/signals"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/obs/quantile"
	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/wire"
)

var targets = autoscale.Default().Targets

// round is a script's round of questions: everything has answered, unless the script takes something away.
type round struct {
	gateways map[string]*wire.Demand
	stages   []*stage
	spare    []int
	kept     map[int]string // NPUs, by the name that they are kept for
	mute     map[string]bool
	queues   []bus.Queue
}

// stage is an instance of the script.
type stage struct {
	name, role string
	npus       []int
	work       wire.StageStats
	starting   bool
	changing   string
}

func (r *round) heard(at time.Duration) *signals.Heard {
	h := &signals.Heard{At: at, Queues: r.queues, Starters: map[string]bool{"n": true}}
	for id, d := range r.gateways {
		h.Instances = append(h.Instances, wire.Instance{ID: id, Role: "gateway", Ready: true})
		if !r.mute[id] {
			h.Stats = append(h.Stats, wire.Stats{Instance: id, Role: "gateway", Demand: new(*d)})
		}
	}
	n := hbm.Stats{Node: "n"}
	for _, k := range r.spare {
		n.Memory = append(n.Memory, hbm.NPUStats{NPU: k, Capacity: 100, Free: 100})
	}
	for k, name := range r.kept {
		n.Memory = append(n.Memory, hbm.NPUStats{NPU: k, Reserved: name})
	}
	for _, s := range r.stages {
		id := s.name + "-x"
		h.Instances = append(h.Instances, wire.Instance{
			ID: id, Name: s.name, Role: s.role, Node: "n", NPUs: s.npus, Ready: !s.starting, Standby: len(s.npus) == 0, Changing: s.changing,
		})
		for _, k := range s.npus {
			n.Memory = append(n.Memory, hbm.NPUStats{
				NPU: k, Instance: id, Name: s.name, Capacity: 100, Free: 40, Usage: hbm.Usage{Used: 60, Cached: 10},
				Kinds: map[string]hbm.Usage{"kv": {Used: 50, Cached: 10}, "mm": {Used: 10}},
			})
		}
		if !r.mute[s.name] && !s.starting {
			w := s.work
			w.NPUs = append([]wire.NPUWork(nil), w.NPUs...)
			w.Roles = append([]wire.RoleStats(nil), w.Roles...)
			h.Stats = append(h.Stats, wire.Stats{Instance: id, Role: s.role, Node: "n", Work: &w})
		}
	}
	if !r.mute["hmm"] {
		h.Nodes = []hbm.Stats{n}
	}
	return h
}

const second = time.Second

// What arrives is the sum of what each gateway has counted since the book began, whoever starts, answers late or starts anew.
func TestDemandIsTheSumOverGateways(t *testing.T) {
	t.Parallel()
	b := signals.NewBook()
	one, two := &wire.Demand{Requests: 100, PromptTokens: 1000, Expected: 5000}, &wire.Demand{Requests: 7, PromptTokens: 70}
	r := &round{gateways: map[string]*wire.Demand{"one": one, "two": two}, mute: map[string]bool{"two": true}}
	want := func(at time.Duration, known bool, age time.Duration, requests, prompt, output float64) {
		t.Helper()
		b.Hear(r.heard(at))
		v := b.View(at, targets)
		if d := v.Demand; d.Known != known || d.Age != age || d.Requests != requests || d.Prompt != prompt || d.Output != output {
			t.Errorf("at %v: %+v; want known %v, %v old, %v requests, %v and %v tokens", at, d, known, age, requests, prompt, output)
		}
	}
	want(1*second, false, 0, 0, 0, 0) // one gateway has not answered
	delete(r.mute, "two")
	want(2*second, true, 0, 0, 0, 0) // it was there before: what it has counted is old
	one.Requests, one.PromptTokens, one.Expected = 103, 1030, 5100
	two.Requests, two.PromptTokens = 8, 80
	want(3*second, true, 0, 4, 40, 100)
	want(4*second, true, 0, 4, 40, 100) // nothing is a signal
	r.mute["one"] = true
	one.Requests, one.PromptTokens = 110, 1100
	want(5*second, true, 1*second, 4, 40, 100)
	want(6*second, true, 2*second, 4, 40, 100)
	delete(r.mute, "one")
	want(7*second, true, 0, 11, 110, 100) // an answer that was lost loses nothing
	r.gateways["three"] = &wire.Demand{Requests: 5, PromptTokens: 50}
	want(8*second, true, 0, 16, 160, 100) // a new one has counted from 0
	delete(r.gateways, "three")
	want(9*second, true, 0, 16, 160, 100)
	*two = wire.Demand{Requests: 2, PromptTokens: 20} // started anew under its old name
	want(10*second, true, 0, 18, 180, 100)
	clear(r.gateways)
	want(11*second, false, 0, 18, 180, 100)
}

// What a cache has is no work: prompts and pictures count by the share of lately that had to be computed.
func TestCachedDemandIsNoWork(t *testing.T) {
	t.Parallel()
	b := signals.NewBook()
	d := &wire.Demand{}
	r := &round{gateways: map[string]*wire.Demand{"g": d}}
	b.Hear(r.heard(0))
	*d = wire.Demand{Requests: 10, Pictured: 5, Pictures: 10, PictureTokens: 1000, PromptTokens: 4000}
	b.Hear(r.heard(second)) // nothing is known of caches yet
	if v := b.View(second, targets); v.Demand.Prompt != 4000 || v.Demand.Visual != 1000 || v.Demand.Pictures != 10 {
		t.Errorf("%+v", v.Demand)
	}
	d.Computed, d.Cached, d.MMHits, d.MMAsked = 1000, 3000, 8, 10
	b.Hear(r.heard(2 * second))
	*d = wire.Demand{
		Requests: 20, Pictured: 10, Pictures: 20, PictureTokens: 2000, PromptTokens: 8000, Computed: 1000, Cached: 3000, MMHits: 8, MMAsked: 10, Waiting: 12,
	}
	b.Hear(r.heard(3 * second))
	v := b.View(3*second, targets)
	if v.Demand.Prompt != 4000+1000 || v.Demand.Visual != 1000+200 || v.Demand.Pictures != 20 || v.Demand.Requests != 20 {
		t.Errorf("%+v", v.Demand)
	}
	// Of 12 that wait each has a picture on average, and half have none.
	if e, p := v.Queues[autoscale.Encode].Waiting, v.Queues[autoscale.Prefill].Waiting; e != 12 || p != 6 {
		t.Errorf("%d pictures and %d prompts wait", e, p)
	}
}

func roles(name string, rows, steps uint64, spent time.Duration) wire.RoleStats {
	return wire.RoleStats{Role: name, Rows: rows, Steps: steps, Spent: spent, InWork: 9}
}

// What an NPU can do is what was done in the time in which it computed: of a picture that of one NPU, of a step that of all.
func TestWorkOfInstances(t *testing.T) {
	t.Parallel()
	b := signals.NewBook()
	e := &stage{name: "encoder-0", role: "encode", npus: []int{0, 1}, work: wire.StageStats{
		Busy: second, NPUs: []wire.NPUWork{{NPU: 0, Busy: second}, {NPU: 1}}, Roles: []wire.RoleStats{roles("encode", 1000, 10, 2*second)},
	}}
	d := &stage{name: "decoder-0", role: "decode", npus: []int{3, 2}, work: wire.StageStats{
		Balance: 0.8, Rows: 5, NPUs: []wire.NPUWork{{NPU: 2}, {NPU: 3}}, Roles: []wire.RoleStats{roles("decode", 0, 0, 0)},
	}}
	standby := &stage{name: "decoder-1", role: "decode"}
	r := &round{stages: []*stage{e, d, standby}, spare: []int{7, 5}}
	b.Hear(r.heard(0))
	e.work.NPUs = []wire.NPUWork{{NPU: 0, Busy: 2 * second}, {NPU: 1, Busy: second}}
	e.work.Roles[0] = roles("encode", 3000, 30, 4*second)
	d.work.NPUs = []wire.NPUWork{{NPU: 2, Busy: second}, {NPU: 3, Busy: second}}
	d.work.Roles[0] = roles("decode", 400, 20, second)
	b.Hear(r.heard(2 * second))
	d.work.Roles[0] = roles("decode", 1200, 40, 3*second)
	b.Hear(r.heard(4 * second))
	v := b.View(4*second+100*time.Millisecond, targets)
	fresh := autoscale.Signal{Known: true, Age: 100 * time.Millisecond}
	want := []autoscale.Instance{
		{
			Signal: fresh, ID: "decoder-0-x", Name: "decoder-0", Node: "n", Roles: "D", NPUs: []int{2, 3}, Ready: true, Replica: true,
			Busy: 0.25, Rate: [3]float64{0, 0, 200}, Batch: 9, Balance: 0.8, KV: 80. / 180, MM: 20. / 120,
			Steps: []autoscale.Step{{Batch: 10, Took: 50 * time.Millisecond}, {Batch: 20, Took: 100 * time.Millisecond}},
		},
		{Signal: fresh, ID: "decoder-1-x", Name: "decoder-1", Node: "n", Roles: "D", Ready: true},
		{
			Signal: fresh, ID: "encoder-0-x", Name: "encoder-0", Node: "n", Roles: "E", NPUs: []int{0, 1}, Ready: true, Replica: true,
			Busy: 0.25, Rate: [3]float64{1000, 0, 0}, KV: 80. / 180, MM: 20. / 120,
		},
	}
	if !reflect.DeepEqual(v.Instances, want) {
		t.Errorf("instances are\n%+v\nwant\n%+v", v.Instances, want)
	}
	h := r.heard(4 * second)
	h.Starters = nil
	for _, anywhere := range []bool{true, false} {
		h.Anywhere = anywhere
		b.Hear(h)
		for _, i := range b.View(4*second+100*time.Millisecond, targets).Instances {
			if i.Replica != (anywhere && len(i.NPUs) > 0) {
				t.Errorf("processes are started anywhere: %v; %s can be stopped and started: %v", anywhere, i.Name, i.Replica)
			}
		}
	}
	if !reflect.DeepEqual(v.Spare, map[string][]int{"n": {5, 7}}) {
		t.Errorf("spare are %v", v.Spare)
	}
	// With other NPUs nothing of before counts, and an instance is no fresher than what its node says.
	e.npus = []int{0}
	e.work.NPUs = e.work.NPUs[:1]
	r.mute = map[string]bool{"hmm": true}
	b.Hear(r.heard(5 * second))
	v = b.View(5*second, targets)
	if i := v.Instances[2]; i.Rate[0] != 0 || i.Busy != 0 || i.Age != second || !i.Known {
		t.Errorf("%+v", i)
	}
	r.mute["hmm"], r.mute["decoder-0"] = false, true
	b.Hear(r.heard(9 * second))
	v = b.View(9*second, targets)
	if i := v.Instances[0]; i.Age != 4*second {
		t.Errorf("%+v", i)
	}
}

func TestPending(t *testing.T) {
	t.Parallel()
	b := signals.NewBook()
	d := &stage{name: "decoder-0", role: "decode", npus: []int{0}, work: wire.StageStats{NPUs: []wire.NPUWork{{NPU: 0}}}}
	r := &round{stages: []*stage{d}}
	want := func(at time.Duration, pending string) {
		t.Helper()
		b.Hear(r.heard(at))
		v, why := b.View(at, targets), b.Pending(at)
		if v.Pending != (pending != "") || !strings.Contains(why, pending) || pending == "" && why != "" {
			t.Errorf("at %v: %v, %q; want %q", at, v.Pending, why, pending)
		}
		if v.Instances[0].Known != true {
			t.Errorf("at %v: %+v", at, v.Instances[0])
		}
	}
	want(0, "")
	d.changing = "op"
	want(1*second, "decoder-0 is being changed")
	d.changing = ""
	want(2*second, "")
	d.starting = true // an instance that starts has no stats, and is known by its node
	want(3*second, "decoder-0-x starts or ends")
	want(62*second, "decoder-0-x starts or ends")
	want(63*second, "") // it will not, for all that anybody knows
	d.starting = false
	want(64*second, "")
	r.kept = map[int]string{4: "decoder-1"}
	want(65*second, "n.decoder-1 starts or ends")
	clear(r.kept)
	want(66*second, "")
}

func TestQueues(t *testing.T) {
	t.Parallel()
	b := signals.NewBook()
	r := &round{}
	b.Hear(r.heard(0))
	if v := b.View(0, targets); v.Queues[autoscale.Decode].Known {
		t.Error("a queue is known of which nobody has said anything")
	}
	r.queues = []bus.Queue{{Stage: "encode"}, {Stage: "prefill"}, {Stage: "decode", Pending: 3, InWork: 4, Redelivered: 1, Oldest: 9 * second, Untaken: second}}
	b.Hear(r.heard(second))
	r.queues = nil
	b.Hear(r.heard(3 * second))
	want := autoscale.Queue{Signal: autoscale.Signal{Known: true, Age: 2 * second}, Pending: 3, InWork: 4, Redelivered: 1, Oldest: second}
	if q := b.View(3*second, targets).Queues[autoscale.Decode]; q != want {
		t.Errorf("%+v, want %+v", q, want)
	}
}

func latency(class string, judged bool, refused uint64, overdue int, ttft ...time.Duration) wire.ClassStats {
	var s quantile.Sketch
	for _, d := range ttft {
		s.Add(d)
	}
	l := wire.Latency{Sketch: s.Bytes(), Refused: refused, Overdue: overdue}
	if judged {
		l.Judged = uint64(len(ttft))
	}
	return wire.ClassStats{Class: class, TTFT: l}
}

// Attainment is over all gateways and classes; who was refused, or is late without a first token, has missed.
func TestAttainment(t *testing.T) {
	t.Parallel()
	b := signals.NewBook()
	one, two := &wire.Demand{}, &wire.Demand{}
	r := &round{gateways: map[string]*wire.Demand{"one": one, "two": two}}
	b.Hear(r.heard(0))
	if v := b.View(0, targets); !v.TTFT.Known || v.TTFT.Requests != 0 || v.TPOT.Requests != 0 {
		t.Errorf("nothing has arrived: %+v", v.TTFT)
	}
	one.Classes = []wire.ClassStats{latency("default", false, 1, 0, second, second, second), latency("flex", false, 0, 2, 5*second)}
	two.Classes = []wire.ClassStats{latency("default", false, 0, 0, second, second, 9*second)}
	b.Hear(r.heard(second))
	v := b.View(second+100*time.Millisecond, autoscale.Targets{TTFT: 2 * second, TPOT: second, Percentile: 50})
	if a := v.TTFT; a.Requests != 10 || a.Met != 0.5 || a.Age != 100*time.Millisecond || a.Quantile < 900*time.Millisecond || a.Quantile > 5200*time.Millisecond {
		t.Errorf("%+v", a)
	}
	// Where some have targets at the gateway those without do not count.
	two.Classes = append(two.Classes, latency("gold", true, 0, 0, second, 9*second))
	b.Hear(r.heard(2 * second))
	v = b.View(2*second, targets)
	if a := v.TTFT; a.Requests != 5 || a.Met != 0.2 {
		t.Errorf("%+v", a)
	}
}
