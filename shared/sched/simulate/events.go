package simulate

import (
	"container/heap"
	"time"
)

// event is something that happens at a time. Of several at one time the one that was planned first goes first.
type event struct {
	at  time.Duration
	seq uint64
	do  func()
}

type events struct {
	all []event
	seq uint64
}

func (e *events) Len() int { return len(e.all) }
func (e *events) Less(i, j int) bool {
	a, b := &e.all[i], &e.all[j]
	return a.at < b.at || a.at == b.at && a.seq < b.seq
}
func (e *events) Swap(i, j int) { e.all[i], e.all[j] = e.all[j], e.all[i] }
func (e *events) Push(x any)    { e.all = append(e.all, x.(event)) }
func (e *events) Pop() any {
	last := len(e.all) - 1
	x := e.all[last]
	e.all[last] = event{}
	e.all = e.all[:last]
	return x
}

// at plans something for a time that is not over.
func (f *Fleet) at(t time.Duration, do func()) {
	if t < f.now {
		panic("BUG: an event is planned for a time that is over")
	}
	f.events.seq++
	heap.Push(&f.events, event{t, f.events.seq, do})
}

// after plans something for later; with 0 it is done at once.
func (f *Fleet) after(d time.Duration, do func()) {
	if d <= 0 {
		do()
		return
	}
	f.at(f.now+d, do)
}

// next lets the next event happen.
func (f *Fleet) next() {
	e := heap.Pop(&f.events).(event)
	f.now = e.at
	e.do()
}
