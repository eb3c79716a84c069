package lead

import (
	"container/heap"
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// length is the lease of the simulation, and what all of its times are drawn from.
const length = time.Second

// event is something that happens at a time of the simulation.
type event struct {
	at   time.Duration
	turn int // of two at one time the one that was made first
	do   func()
}

type events []event

func (q events) Len() int { return len(q) }
func (q events) Less(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].turn < q[j].turn
}
func (q events) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *events) Push(x any)   { *q = append(*q, x.(event)) }
func (q *events) Pop() any {
	old := *q
	last := old[len(old)-1]
	*q = old[:len(old)-1]
	return last
}

// world is processes with clocks of their own, a store with compare-and-set, and a network between them that delays and loses messages.
type world struct {
	t     *rapid.T
	now   time.Duration
	queue events
	turns int

	rec      record
	revision uint64

	calm   bool // no faults any more
	nodes  []*node
	fences map[uint64]*node // by whom each fence was held while it acted
	newest uint64
	led    map[*node]int
}

// node is a process.
type node struct {
	*world
	lease   lease
	offset  time.Duration // of its clock
	pace    float64       // "
	stopped time.Duration // it does nothing until then
	cut     time.Duration // none of its messages arrive until then
	busy    int           // number of the try that it waits for; 0: none
	tries   int
	retry   *attempt
}

// attempt is a record that a leader tries to write.
type attempt struct {
	sent time.Duration
	rec  record
}

func (w *world) at(when time.Duration, do func()) {
	w.turns++
	heap.Push(&w.queue, event{when, w.turns, do})
}

// clock is what a process' clock shows.
func (n *node) clock() time.Duration { return n.offset + time.Duration(float64(n.now)*n.pace) }

// wakes has a process do something after a time, or when it goes on if it is stopped then.
func (n *node) wakes(after time.Duration, do func()) {
	n.at(n.now+after, func() {
		if n.now < n.stopped {
			n.wakes(n.stopped-n.now, do)
			return
		}
		do()
		n.check()
	})
}

func (n *node) draw(most time.Duration, what string) time.Duration {
	return time.Duration(rapid.Int64Range(0, int64(most)).Draw(n.t, what))
}

// way is how long a message is on its way, and whether it comes at all.
func (n *node) way() (time.Duration, bool) {
	if n.calm {
		return n.draw(length/50, "way"), true
	}
	switch rapid.IntRange(0, 19).Draw(n.t, "fate") {
	case 0:
		return 0, false
	case 1: // the client has kept it, and sends it when the connection is back
		return n.draw(3*length, "late"), true
	}
	return n.draw(length/10, "way"), n.now >= n.cut
}

// call has the store do something, and the process get what it says; gone if nothing has come in time.
func (n *node) call(store func() func(), gone func()) {
	n.tries++
	this := n.tries
	n.busy = this
	n.wakes(length/parts, func() {
		if n.busy == this {
			n.busy = 0
			gone()
		}
	})
	there, comes := n.way()
	if !comes {
		return
	}
	n.at(n.now+there, func() {
		answer := store()
		back, comes := n.way()
		if !comes {
			return
		}
		n.wakes(back, func() {
			if n.busy == this {
				n.busy = 0
				answer()
			}
		})
	})
}

// read reads the record.
func (n *node) read(then func(record, uint64), gone func()) {
	n.call(func() func() {
		rec, revision := n.rec, n.revision
		return func() { then(rec, revision) }
	}, gone)
}

// update is a compare-and-set, as leader.try: what stands instead is read.
func (n *node) update(a attempt, done func(conflict), gone func()) {
	over := n.lease.revision
	n.call(func() func() {
		if n.revision != over {
			return func() {
				n.read(func(stands record, revision uint64) {
					done(n.lease.conflicted(n.clock(), a.sent, a.rec, stands, revision))
				}, gone)
			}
		}
		n.revision++
		n.rec = a.rec
		revision := n.revision
		return func() {
			n.lease.stored(a.sent, a.rec, revision)
			done(mine)
		}
	}, gone)
}

// tick is what a process does every fifth of a lease, as leader does.
func (n *node) tick() {
	n.wakes(length/parts, n.tick)
	if !n.calm && rapid.IntRange(0, 19).Draw(n.t, "fault") == 0 {
		if rapid.Bool().Draw(n.t, "stop") {
			n.stopped = n.now + n.draw(3*length, "stopped for")
		} else {
			n.cut = n.now + n.draw(3*length, "cut for")
		}
	}
	if n.busy != 0 {
		return
	}
	nothing := func() {}
	if n.lease.until > 0 && !n.lease.acts(n.clock()) {
		n.lease.lost()
		n.retry = nil
	}
	if n.lease.until == 0 {
		n.read(func(rec record, revision uint64) {
			n.lease.saw(n.clock(), rec, revision)
			if !n.lease.free(n.clock()) {
				return
			}
			n.update(attempt{n.clock(), n.lease.next(n.lease.rec.Operation, true, 0)}, func(conflict) {}, nothing)
		}, nothing)
		return
	}
	a := n.retry
	if a == nil {
		sent := n.clock()
		switch rapid.IntRange(0, 9).Draw(n.t, "write") {
		case 0:
			a = &attempt{sent, n.lease.next(&Operation{ID: fmt.Sprint(n.lease.writes)}, true, 0)}
		case 1: // in order; nothing acts from now on
			a = &attempt{sent, n.lease.next(n.lease.rec.Operation, false, 0)}
			a.rec.Leader = ""
			n.update(*a, func(conflict) {}, nothing)
			n.lease.lost()
			return
		default:
			a = &attempt{sent, n.lease.next(n.lease.rec.Operation, false, 0)}
		}
	}
	n.retry = a
	n.update(*a, func(conflict) { n.retry = nil }, nothing)
}

// check is what must be true always: nobody acts while another one does, and what one acts with no other one has acted with, nor with
// anything newer before.
func (n *node) check() {
	if !n.lease.acts(n.clock()) {
		return
	}
	for _, other := range n.nodes {
		if other != n && other.lease.acts(other.clock()) {
			n.t.Fatalf("at %v two act: %s with fence %d until %v, and %s with %d until %v of their clocks", n.now,
				n.lease.me, n.lease.rec.Fence, n.lease.until-n.clock(), other.lease.me, other.lease.rec.Fence, other.lease.until-other.clock())
		}
	}
	fence := n.lease.rec.Fence
	if holder := n.fences[fence]; holder != nil && holder != n {
		n.t.Fatalf("at %v %s acts with fence %d, with which %s has acted", n.now, n.lease.me, fence, holder.lease.me)
	}
	if fence < n.newest {
		n.t.Fatalf("at %v %s acts with fence %d, after one of %d", n.now, n.lease.me, fence, n.newest)
	}
	n.fences[fence], n.newest = n, fence
	n.led[n]++
}

// until has time go on.
func (w *world) until(end time.Duration) {
	for len(w.queue) > 0 && w.queue[0].at <= end {
		e := heap.Pop(&w.queue).(event)
		w.now = e.at
		e.do()
	}
	w.now = end
}

func newWorld(t *rapid.T) *world {
	w := &world{t: t, fences: map[uint64]*node{}, led: map[*node]int{}}
	for i := range rapid.IntRange(2, 4).Draw(t, "processes") {
		n := &node{
			world: w, lease: lease{me: fmt.Sprint("p", i), length: length},
			offset: time.Duration(rapid.Int64Range(0, int64(1000*length)).Draw(t, "offset")),
			pace:   rapid.Float64Range(0.97, 1.03).Draw(t, "pace"),
		}
		w.nodes = append(w.nodes, n)
		n.wakes(time.Duration(rapid.Int64Range(0, int64(length)).Draw(t, "start")), n.tick)
	}
	return w
}

// However messages are delayed and lost, and processes stopped, cut off and with clocks that go at other paces: never do two act at
// once, and no fence comes back. When all is well again somebody leads within three leases.
func TestLeaseNeverTwoAct(t *testing.T) {
	changes := 0
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t)
		w.until(time.Duration(rapid.IntRange(5, 30).Draw(t, "leases")) * length)
		w.calm = true
		w.until(w.now + 4*length) // the last faults and late messages end
		clear(w.led)
		w.until(w.now + 3*length)
		if len(w.led) == 0 {
			t.Fatalf("nobody leads")
		}
		changes = max(changes, len(w.fences))
	})
	if changes < 3 {
		t.Errorf("the simulation has not seen more than %d fences: it shows nothing", changes)
	}
}

// The lease of a leader ends before the wait of whoever has read the record at the earliest moment that is possible.
func TestLeaseEndsBeforeTheWait(t *testing.T) {
	a, b := lease{me: "a", length: length}, lease{me: "b", length: length}
	a.saw(0, record{}, 0)
	if a.free(length - 1) {
		t.Error("a missing record is taken before a lease is over")
	}
	sent := length
	rec := a.next(nil, true, 0)
	a.stored(sent, rec, 1)
	b.saw(sent, rec, 1) // the message took no time
	for now := sent; now < 3*length; now += time.Millisecond {
		if a.acts(now) && b.free(now) {
			t.Fatalf("at %v one may act and the other one take over", now)
		}
	}
	if !b.free(2*length) || a.acts(2*length) {
		t.Error("after a lease the record is not free")
	}
	rec.Leader = ""
	b.saw(2*length, rec, 2)
	if !b.free(2 * length) {
		t.Error("what was given up in order is not free")
	}
	long := record{Leader: "c", Lease: 5 * length}
	b.saw(2*length, long, 3)
	if b.free(6 * length) {
		t.Error("the leader's lease is longer, and was not waited for")
	}
}

// A write whose answer was lost is recognised, and an earlier one is written over.
func TestLeaseConflicts(t *testing.T) {
	l := lease{me: "a", length: length}
	l.saw(0, record{}, 0)
	first := l.next(nil, true, 0)
	if got := l.conflicted(9, 5, first, first, 1); got != mine || !l.acts(6) {
		t.Errorf("its own write: %v", got)
	}
	note := l.next(&Operation{ID: "x"}, true, 0)
	renewal := l.next(l.rec.Operation, false, 0)
	if got := l.conflicted(20, 15, renewal, note, 2); got != again {
		t.Errorf("an earlier one of its own: %v", got)
	}
	if renewal = l.next(l.rec.Operation, false, 0); renewal.Operation.ID != "x" || renewal.Fence != note.Fence {
		t.Errorf("what had been stored is written over: %+v", renewal)
	}
	if got := l.conflicted(30, 25, renewal, record{Leader: "b", Fence: 77}, 3); got != others || l.acts(26) {
		t.Errorf("another one's: %v", got)
	}
	if next := l.next(nil, true, 0); next.Fence != 78 {
		t.Errorf("the next fence: %d", next.Fence)
	}
	if next := l.next(nil, true, 100); next.Fence != 101 {
		t.Errorf("a fence above 100: %d", next.Fence)
	}
}
