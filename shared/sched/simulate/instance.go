package simulate

import (
	"slices"
	"strings"
	"time"

	"trireme.dev/shared/sched"
	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/sched/placement"
)

// stages is a set of stages, a bit each.
type stages uint8

func stagesOf(letters string) (set stages) {
	for s := range autoscale.Stages {
		if strings.Contains(letters, autoscale.Stage(s).Letter()) {
			set |= 1 << s
		}
	}
	return set
}

// most is the most NPUs of an instance.
const most = placement.MaxNPUs

// npu is one of an instance.
type npu struct {
	number  int
	slot    int
	leaving bool // it gets no new work
	on      *request
	pieces  int // of the picture on it that are computed
	seqs    int // prompts and sequences
	kv      int // tokens that these may come to need
	busy    time.Duration
	work    Work // of the step that is being computed
}

// idle reports whether nothing is in work on it.
func (n *npu) idle() bool { return n.on == nil && n.seqs == 0 }

// instance is a running one, or a standby.
type instance struct {
	f       *Fleet
	id      string
	name    string
	node    string
	roles   string
	set     stages
	replica bool
	kv      int // tokens for which an NPU of it has KV memory; 0: any number
	ready   bool
	closing bool   // it takes nothing more: it ends, or hands over
	ending  bool   // it is going to
	op      string // the change that it has part in; "": none

	npus     []*npu // by slot; nil: a hole
	open     placement.Set
	load     sched.Load
	given    uint64     // when it was given something last
	seqs     []*request // that decode
	arriving []*request // sequences whose KV is copied
	prompts  *sched.Queue
	taken    []*request // prompts in the step
	step     sched.Step
	seats    []sched.Held
	order    []int
	busy     bool // something is being computed
	stepping bool // a step is

	count   counts
	samples []sample // see signals.go
}

// counts are what an instance has done since it began, as wire.StageStats has it.
type counts struct {
	rows, steps [autoscale.Stages]float64
	spent       [autoscale.Stages]time.Duration
}

// add starts an instance on NPUs of these numbers.
func (f *Fleet) add(as Instance, numbers []int) *instance {
	if as.KV == 0 {
		as.KV = f.cfg.KV
	}
	i := &instance{
		f: f, id: as.Name, name: as.Name, node: as.Node, roles: as.Roles, set: stagesOf(as.Roles), replica: as.Replica, kv: as.KV, ready: true,
		prompts: sched.NewQueue(sched.Order{Policy: f.cfg.Order, Patience: patience}),
	}
	f.started++
	f.instances = append(f.instances, i)
	for _, n := range numbers {
		i.join(n)
	}
	return i
}

func (i *instance) has(s autoscale.Stage) bool { return i.set>>s&1 != 0 }

// width is the number of NPUs that it has.
func (i *instance) width() (n int) {
	for _, u := range i.npus {
		if u != nil {
			n++
		}
	}
	return n
}

// join gives it an NPU, in the first slot that is free.
func (i *instance) join(number int) {
	slot := slices.Index(i.npus, nil)
	if slot < 0 {
		slot = len(i.npus)
		i.npus = append(i.npus, nil)
	}
	i.npus[slot] = &npu{number: number, slot: slot}
	i.epoch()
}

// part takes an NPU from it that is idle.
func (i *instance) part(n *npu) {
	if !n.idle() {
		panic("BUG: an NPU leaves with work on it")
	}
	i.npus[n.slot] = nil
	i.epoch()
}

// epoch is another set of NPUs.
func (i *instance) epoch() {
	var set placement.Set
	i.open = 0
	for slot, n := range i.npus {
		if n == nil {
			continue
		}
		set = set.With(slot)
		if !n.leaving {
			i.open = i.open.With(slot)
		}
	}
	l := sched.Limits{Mixed: i.f.cfg.mixed()}
	if i.has(autoscale.Prefill) {
		l.Rows, l.Seqs, l.Prompt = l.Rows+i.f.cfg.Rows, l.Seqs+promptSeqs, i.f.cfg.Rows
	}
	if i.has(autoscale.Decode) {
		l.Rows, l.Seqs = l.Rows+Sequences, l.Seqs+Sequences
	}
	i.step = sched.NewStep(l, set)
	i.seats = make([]sched.Held, len(i.npus))
}

// seat is the NPU for a request that comes to have KV on it, nil if none has room. In need it is the one with most room.
func (i *instance) seat(r *request, need bool) *npu {
	for slot, n := range i.npus {
		if n != nil {
			i.seats[slot] = sched.Held{Slabs: (n.kv + slab - 1) / slab, Seqs: n.seqs}
		}
	}
	i.order = sched.Seats(i.seats, i.open, i.order)
	for _, slot := range i.order {
		if n := i.npus[slot]; need || i.kv == 0 || n.kv+r.kv() <= i.kv {
			return n
		}
	}
	return nil
}

// slab is the tokens of a slab of KV.
const slab = 256

func (r *request) sit(i *instance, n *npu) {
	r.on, r.npu = i, n
	n.seqs++
	n.kv += r.kv()
}

func (r *request) stand() {
	r.npu.seqs--
	r.npu.kv -= r.kv()
	r.on, r.npu = nil, nil
}

// takes reports whether the instance has room for a piece of work now.
func (i *instance) takes(s autoscale.Stage, r *request) bool {
	if !i.ready || i.closing || !i.has(s) || i.open == 0 {
		return false
	}
	switch s {
	case autoscale.Encode:
		return i.vacant() != nil
	case autoscale.Prefill:
		return i.load.Prompts < promptSeqs*i.open.Len()
	}
	return i.load.Sequences < Sequences*i.open.Len() && i.seat(r, false) != nil
}

// vacant is an NPU for a picture. An encoder takes the next one just in time (services/encoder/ahead.go), here at the very moment.
func (i *instance) vacant() *npu {
	for slot := range i.open.All() {
		if n := i.npus[slot]; n.on == nil {
			return n
		}
	}
	return nil
}

// dispatch gives what waits for a stage to whoever asks at the lowest level; of those alike, to who was given something longest ago.
func (f *Fleet) dispatch(s autoscale.Stage) {
	q := f.queues[s]
	for len(q) > 0 {
		var to *instance
		best := 0
		for _, i := range f.instances {
			if !i.takes(s, q[0]) {
				continue
			}
			level := i.load.LevelToCompute(s == autoscale.Encode && i.has(autoscale.Prefill) || s == autoscale.Prefill && i.has(autoscale.Decode))
			if s == autoscale.Decode {
				level = i.load.LevelToDecode()
			}
			if to == nil || level < best || level == best && i.given < to.given {
				to, best = i, level
			}
		}
		if to == nil {
			break
		}
		f.given++
		to.given = f.given
		r := q[0]
		q[0] = nil
		q = q[1:]
		to.take(s, r)
	}
	f.queues[s] = q
}

// take takes a piece of work.
func (i *instance) take(s autoscale.Stage, r *request) {
	switch s {
	case autoscale.Encode:
		i.load.Pictures++
		n := i.vacant()
		n.on, n.pieces = r, 0
	case autoscale.Prefill:
		i.load.Prompts++
		r.sit(i, i.seat(r, true))
		i.wait(r)
	case autoscale.Decode:
		i.load.Sequences++
		r.sit(i, i.seat(r, true))
		i.arriving = append(i.arriving, r)
		r.taken++
		taken := r.taken
		i.f.after(i.f.cfg.Costs.Copy(r.pos+r.tokens), func() {
			if r.taken == taken { // else it was handed over meanwhile
				i.arriving = slices.DeleteFunc(i.arriving, func(o *request) bool { return o == r })
				i.seqs = append(i.seqs, r)
				i.kick()
			}
		})
		return
	}
	i.kick()
}

// wait puts a prompt in line with what is left of it.
func (i *instance) wait(r *request) {
	left := r.Prompt - r.pos
	r.item = sched.Item{Owner: r, Tokens: int64(left), Arrived: r.Arrive, Due: sched.Never}
	if t := i.f.cfg.Aims.TTFT; t > 0 {
		r.item.Due = r.Arrive + t - i.f.cfg.Costs.Step(Work{Prompt: left})
	}
	i.prompts.Push(&r.item)
}

// kick has the instance compute, if it does not already and there is something to do.
func (i *instance) kick() {
	if i.busy {
		return
	}
	if took, any := i.form(); any {
		i.busy, i.stepping = true, true
		i.f.after(max(1, took), func() {
			i.stepping = false
			i.computed(took)
			i.piece()
		})
		return
	}
	i.piece()
}

// form makes a step of what there is, as shared/stage/runner does: tokens first, then chunks of prompts.
func (i *instance) form() (took time.Duration, any bool) {
	if len(i.seqs) == 0 && i.prompts.Len() == 0 {
		return 0, false
	}
	s := &i.step
	s.Begin()
	for _, n := range i.npus {
		if n != nil {
			n.work = Work{}
		}
	}
	for _, r := range i.seqs {
		pos := r.Prompt + r.tokens - 1
		if r.takes = s.Token(r.npu.slot, pos); r.takes {
			r.npu.work.Decoding++
			r.npu.work.Context += pos + 1
			any = true
		}
	}
	i.prompt(s)
	any = any || len(i.taken) > 0
	for _, n := range i.npus {
		if n == nil || n.work == (Work{}) {
			continue
		}
		cost := i.slowed(i.f.cfg.Costs.Step(n.work))
		n.busy += cost
		took = max(took, cost)
	}
	return took, any
}

// slowed is how long work takes on this instance now.
func (i *instance) slowed(d time.Duration) time.Duration {
	if i.op != "" {
		return time.Duration(float64(d) * i.f.cfg.Drag)
	}
	return d
}

// prompt gives prompts their chunks of a step, in the order of their queue (services/prefill/batch.go).
func (i *instance) prompt(s *sched.Step) {
	for _, it := range i.prompts.Overdue(i.f.now) {
		i.prompts.Demote(it)
	}
	full := placement.Set(0)
	var put []*request
	for it := i.prompts.Next(); it != nil; it = i.prompts.Next() {
		r := it.Owner.(*request)
		n := s.Chunk(r.npu.slot, r.pos, r.Prompt-r.pos)
		if n == 0 {
			if full = full.With(r.npu.slot); full == s.NPUs() {
				break
			}
			i.prompts.Remove(it)
			put = append(put, r)
			continue
		}
		i.prompts.TakePart(int64(n))
		r.chunk = n
		i.taken = append(i.taken, r)
		w := &r.npu.work
		w.Prompt += n
		w.Visual += min(r.Pictures*r.Visual, r.pos+n) - min(r.Pictures*r.Visual, r.pos) // pictures stand before the text
		w.Pairs += n*r.pos + n*(n+1)/2
	}
	for _, r := range put {
		i.prompts.Push(&r.item)
	}
}

// computed takes in what a step has made.
func (i *instance) computed(took time.Duration) {
	i.f.result.Steps++
	decoded := 0
	keep := i.seqs[:0]
	var done []*request
	for _, r := range i.seqs {
		if r.takes {
			r.takes = false
			decoded++
			if r.tokens++; r.tokens == r.Output {
				done = append(done, r)
				continue
			}
		}
		keep = append(keep, r)
	}
	clear(i.seqs[len(keep):])
	i.seqs = keep
	if decoded > 0 {
		i.did(autoscale.Decode, decoded, took)
	}
	for _, r := range done {
		i.load.Sequences--
		r.stand()
		i.f.ended(r, false)
	}
	prompts := 0
	for _, r := range i.taken {
		prompts += r.chunk
		r.pos += r.chunk
		r.chunk = 0
		if r.pos < r.Prompt {
			i.wait(r)
			continue
		}
		i.load.Prompts--
		r.stand()
		i.f.prefilled(r)
	}
	clear(i.taken)
	i.taken = i.taken[:0]
	if prompts > 0 {
		i.did(autoscale.Prefill, prompts, took)
		i.f.dispatch(autoscale.Prefill)
	}
	if len(done) > 0 {
		i.f.dispatch(autoscale.Decode)
	}
	i.f.settle(i)
}

// did counts what a step has done for a stage.
func (i *instance) did(s autoscale.Stage, rows int, took time.Duration) {
	i.count.rows[s] += float64(rows)
	i.count.steps[s]++
	i.count.spent[s] += took
}

// piece computes a piece of the picture on each NPU, if there are any, and then the next step. NPUs of an instance do that
// together (services/encoder/line.go).
func (i *instance) piece() {
	var took time.Duration
	var on []*npu
	for _, n := range i.npus {
		if n == nil || n.on == nil {
			continue
		}
		on = append(on, n)
		cost := i.slowed(i.f.cfg.Costs.Encode(n.on.Visual) / time.Duration(i.f.cfg.Pieces))
		n.busy += cost
		i.count.spent[autoscale.Encode] += cost
		took = max(took, cost)
	}
	if len(on) == 0 {
		if i.busy {
			i.busy = false
			i.kick()
		}
		return
	}
	i.busy = true
	i.f.after(took, func() {
		ended := false
		for _, n := range on {
			if n.pieces++; n.pieces < i.f.cfg.Pieces {
				continue
			}
			r := n.on
			n.on, ended = nil, true
			i.load.Pictures--
			i.count.rows[autoscale.Encode] += float64(r.Visual)
			i.count.steps[autoscale.Encode]++
			i.f.encoded(r)
		}
		if ended {
			i.f.dispatch(autoscale.Encode)
			i.f.settle(i)
		}
		i.busy = false
		i.kick()
	})
}

// encoded takes note of a picture of a request that is.
func (f *Fleet) encoded(r *request) {
	if r.encoded++; r.encoded == r.Pictures {
		f.after(f.cfg.Hop, func() { f.prompted(r) })
	}
}

// prompted puts a request into prefill's queue.
func (f *Fleet) prompted(r *request) {
	r.prompt = f.now
	f.queues[autoscale.Prefill] = append(f.queues[autoscale.Prefill], r)
	f.dispatch(autoscale.Prefill)
}

// prefilled has the first token sent, and the others computed.
func (f *Fleet) prefilled(r *request) {
	r.first, r.tokens = f.now, 1
	f.signals.first(r)
	if t := f.cfg.Targets.TTFT; t > 0 && r.first-r.Arrive > t {
		f.miss(r)
	}
	f.line.started(r)
	if r.Output == 1 {
		f.ended(r, false)
		return
	}
	f.after(f.cfg.Hop, func() {
		f.queues[autoscale.Decode] = append(f.queues[autoscale.Decode], r)
		f.dispatch(autoscale.Decode)
	})
}
