package sched

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"
)

// Times in this package are durations since some moment of the caller's choice, the same for all of them.

// Never is a time that does not come.
const Never = time.Duration(math.MaxInt64)

// ErrPolicy is wrapped by errors of ParsePolicy.
var ErrPolicy = errors.New("no such policy")

// Policy says which of a tenant's requests of one priority goes first.
type Policy uint8

// The policies. Whatever they compare, among equals the one that arrived first goes first.
const (
	FCFS Policy = iota // who arrived first
	SJF                // who has the least work
	SLO                // who has to start first to meet its targets
)

var policies = []string{"fcfs", "sjf", "slo"}

// ParsePolicy is the policy of a name: fcfs, sjf or slo. Its error wraps ErrPolicy.
func ParsePolicy(name string) (Policy, error) {
	i := slices.Index(policies, name)
	if i < 0 {
		return 0, fmt.Errorf("%w: %q; there are fcfs, sjf and slo", ErrPolicy, name)
	}
	return Policy(i), nil
}

// String is the name of the policy.
func (p Policy) String() string { return policies[p] }

// Item is a request that waits in a Queue, or a part of its work.
type Item struct {
	Owner    any           // the caller's, for whom it stands
	Tenant   string        // tenants share a priority's service by their weights
	Weight   float64       // of the tenant; 0 is 1. That of its newest item counts
	Priority int           // lower ones go first (vLLM's meaning)
	Tokens   int64         // its work: prompt tokens and those that its answer is expected to have; below 1 counts as 1
	Arrived  time.Duration // when the client's request came
	Due      time.Duration // the last moment to start and meet its targets; Never: it has none
	Begun    bool          // its answer has begun: it goes before all that have not

	seq   uint64 // order of Push
	key   int64  // what the policy compares
	late  bool   // it is with those that go last
	place *flow  // nil: in no queue
}

// Late reports whether the item goes last because it can no longer meet its targets.
func (it *Item) Late() bool { return it.late }

func (it *Item) tokens() int64 { return max(1, it.Tokens) }

// before is the order within a flow.
func (it *Item) before(o *Item) int {
	return cmp.Or(cmp.Compare(it.key, o.key), cmp.Compare(it.Arrived, o.Arrived), cmp.Compare(it.seq, o.seq))
}

// band says which items go before which others, whatever the tenant and the policy.
func (it *Item) band() bandKey {
	return bandKey{begun: it.Begun, late: it.late && !it.Begun, priority: it.Priority}
}

// Order says in which order a Queue gives its items.
type Order struct {
	Policy Policy
	// Patience is how long after its arrival an item without targets is due under SLO, so that it has a place among those
	// that have some. It does not become late.
	Patience time.Duration
	// Every keeps all from starving: each so many'th pick goes to the priority that has waited longest for one, and each so
	// many'th of a tenant to the oldest of its items. 0: DefaultEvery.
	Every int
}

// DefaultEvery leaves seven of eight picks to the order that was asked for.
const DefaultEvery = 8

// Queue holds what waits, and says what goes next:
//
//  1. by band: answers that have begun, then what can still meet its targets, then what is late; within these by priority;
//  2. within a band, the tenant that has had the least service for its weight (start-time fair queueing, Goyal, Vin and
//     Cheng 1996, over tokens): of two tenants that both wait, none gets more than the other by more than the tokens of one
//     item of each, over their weights, plus what Every takes out of turn within a tenant, which changes no tenant's share;
//  3. within a tenant, the policy.
//
// It holds nobody back: as long as there are items there is a next one.
type Queue struct {
	order  Order
	bands  []*band // in order; none is empty
	count  int
	tokens int64
	seq    uint64
	picks  uint64
}

type bandKey struct {
	begun, late bool
	priority    int
}

func (k bandKey) compare(o bandKey) int {
	rank := func(k bandKey) int {
		switch {
		case k.begun:
			return 0
		case k.late:
			return 2
		}
		return 1
	}
	return cmp.Or(cmp.Compare(rank(k), rank(o)), cmp.Compare(k.priority, o.priority))
}

// band is what waits with one key. It is forgotten, with what its tenants have had, when nothing waits in it.
type band struct {
	key     bandKey
	flows   []*flow // those with items, in no order
	idle    map[string]float64
	virtual float64 // the start tag of what was picked last
	picked  uint64  // the number of its last pick
}

// flow is what waits of one tenant in a band.
type flow struct {
	band   *band
	tenant string
	weight float64
	start  float64 // start tag of the next pick: tokens had, over the weight
	picks  uint64
	items  []*Item // in the policy's order
}

// NewQueue returns an empty queue.
func NewQueue(o Order) *Queue {
	if o.Every == 0 {
		o.Every = DefaultEvery
	}
	return &Queue{order: o}
}

// Len is how many items there are.
func (q *Queue) Len() int { return q.count }

// Tokens is the work of all items.
func (q *Queue) Tokens() int64 { return q.tokens }

// Push adds an item, which is the queue's until it is taken out.
func (q *Queue) Push(it *Item) {
	if it.place != nil {
		panic("BUG: an item is pushed that is in a queue already")
	}
	q.seq++
	it.seq, it.late = q.seq, false
	switch q.order.Policy {
	case FCFS:
		it.key = 0
	case SJF:
		it.key = it.tokens()
	case SLO:
		if it.key = int64(it.Due); it.Due == Never {
			it.key = int64(it.Arrived + q.order.Patience)
		}
	}
	q.insert(it)
}

// insert puts an item into its band.
func (q *Queue) insert(it *Item) {
	key := it.band()
	at, found := slices.BinarySearchFunc(q.bands, key, func(b *band, k bandKey) int { return b.key.compare(k) })
	if !found {
		q.bands = slices.Insert(q.bands, at, &band{key: key, idle: map[string]float64{}, picked: q.picks})
	}
	b := q.bands[at]
	i := slices.IndexFunc(b.flows, func(f *flow) bool { return f.tenant == it.Tenant })
	if i < 0 {
		i = len(b.flows)
		b.flows = append(b.flows, &flow{band: b, tenant: it.Tenant, start: max(b.virtual, b.idle[it.Tenant])})
		delete(b.idle, it.Tenant)
	}
	f := b.flows[i]
	if f.weight = it.Weight; f.weight <= 0 {
		f.weight = 1
	}
	n, _ := slices.BinarySearchFunc(f.items, it, (*Item).before)
	f.items = slices.Insert(f.items, n, it)
	it.place = f
	q.count++
	q.tokens += it.tokens()
}

// Remove takes an item out and reports whether it was there. Its tenant pays nothing for it.
func (q *Queue) Remove(it *Item) bool {
	f := it.place
	if f == nil {
		return false
	}
	n, found := slices.BinarySearchFunc(f.items, it, (*Item).before)
	if !found {
		panic("BUG: an item is not where its queue has put it")
	}
	q.remove(f, n)
	it.place = nil
	return true
}

// remove takes item n out of a flow, and away what is empty then.
func (q *Queue) remove(f *flow, n int) {
	b := f.band
	q.count--
	q.tokens -= f.items[n].tokens()
	f.items = slices.Delete(f.items, n, n+1)
	if len(f.items) > 0 {
		return
	}
	b.flows = slices.DeleteFunc(b.flows, func(o *flow) bool { return o == f })
	if len(b.flows) == 0 {
		q.bands = slices.DeleteFunc(q.bands, func(o *band) bool { return o == b })
		return
	}
	if f.start > b.virtual { // it has had more than its share, which counts if it comes back soon
		b.idle[f.tenant] = f.start
	}
	if len(b.idle) > 2*len(b.flows)+64 {
		maps.DeleteFunc(b.idle, func(_ string, start float64) bool { return start <= b.virtual })
	}
}

// Demote makes an item one of those that go last, from now on.
func (q *Queue) Demote(it *Item) {
	if it.late {
		return
	}
	if !q.Remove(it) {
		panic("BUG: an item is demoted that is in no queue")
	}
	it.late = true
	q.insert(it)
}

// Overdue is which items should have started before now to meet their targets and are not among the late yet, under SLO;
// the other policies know no targets. They stay where they are: it is for the caller to remove them, or Demote them.
func (q *Queue) Overdue(now time.Duration) []*Item {
	if q.order.Policy != SLO {
		return nil
	}
	var out []*Item
	for _, b := range q.bands {
		if b.key.late || b.key.begun {
			continue
		}
		for _, f := range b.flows {
			for _, it := range f.items {
				if it.key >= int64(now) {
					break
				}
				if it.Due != Never {
					out = append(out, it)
				}
			}
		}
	}
	return out
}

// Next is the item that goes next, nil when there is none. It stays the next one, whatever is pushed meanwhile, only if
// nothing comes that goes before it.
func (q *Queue) Next() *Item {
	if q.count == 0 {
		return nil
	}
	f, n := q.next()
	return f.items[n]
}

// Take takes the next item out, and its tenant pays for its tokens.
func (q *Queue) Take() *Item { return q.TakePart(math.MaxInt64) }

// TakePart takes the next item out, and its tenant pays for as many of its tokens only: the caller does a part of the work,
// and pushes the rest again.
func (q *Queue) TakePart(tokens int64) *Item {
	if q.count == 0 {
		return nil
	}
	f, n := q.next()
	it := f.items[n]
	q.picks++
	f.band.picked = q.picks
	f.picks++
	f.band.virtual = f.start
	f.start += float64(min(tokens, it.tokens())) / f.weight
	q.remove(f, n)
	it.place = nil
	return it
}

// next finds the next item.
func (q *Queue) next() (*flow, int) {
	b := q.bands[0]
	if len(q.bands) > 1 && (q.picks+1)%uint64(q.order.Every) == 0 {
		b = slices.MinFunc(q.bands, func(a, b *band) int { return cmp.Compare(a.picked, b.picked) })
	}
	f := slices.MinFunc(b.flows, func(a, b *flow) int {
		return cmp.Or(cmp.Compare(a.start, b.start), a.items[0].before(b.items[0]))
	})
	n := 0
	if (f.picks+1)%uint64(q.order.Every) == 0 {
		for i, it := range f.items {
			if cmp.Or(cmp.Compare(it.Arrived, f.items[n].Arrived), cmp.Compare(it.seq, f.items[n].seq)) < 0 {
				n = i
			}
		}
	}
	return f, n
}

// Last is the item to give up when there are too many: of the band that goes last, of the tenant that has most work
// waiting for its weight, the one that goes last. Answers that have begun are not given up; nil when there are no others.
func (q *Queue) Last() *Item {
	if q.count == 0 || q.bands[len(q.bands)-1].key.begun {
		return nil
	}
	b := q.bands[len(q.bands)-1]
	waiting := func(f *flow) float64 {
		var sum int64
		for _, it := range f.items {
			sum += it.tokens()
		}
		return float64(sum) / f.weight
	}
	most := slices.MaxFunc(b.flows, func(a, b *flow) int {
		return cmp.Or(cmp.Compare(waiting(a), waiting(b)), a.items[len(a.items)-1].before(b.items[len(b.items)-1]))
	})
	return most.items[len(most.items)-1]
}

// Before is the work of what goes before an item of the queue if nothing else comes: all picks until its own, made on a
// copy.
func (q *Queue) Before(it *Item) int64 {
	c := q.clone()
	var sum int64
	for {
		o := c.pick()
		if o == it {
			return sum
		}
		if o == nil {
			panic("BUG: asked what goes before an item that is in no queue")
		}
		sum += o.tokens()
	}
}

// pick is Take on a copy, which leaves the items themselves as they are.
func (q *Queue) pick() *Item {
	if q.count == 0 {
		return nil
	}
	f, n := q.next()
	it, place := f.items[n], f.items[n].place
	q.Take()
	it.place = place
	return it
}

func (q *Queue) clone() *Queue {
	c := *q
	c.bands = make([]*band, len(q.bands))
	for i, b := range q.bands {
		nb := *b
		nb.idle = maps.Clone(b.idle)
		nb.flows = make([]*flow, len(b.flows))
		for j, f := range b.flows {
			nf := *f
			nf.band, nf.items = &nb, slices.Clone(f.items)
			nb.flows[j] = &nf
		}
		c.bands[i] = &nb
	}
	return &c
}
