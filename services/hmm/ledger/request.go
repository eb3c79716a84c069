package ledger

import (
	"container/heap"
	"fmt"
	"time"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"
)

// request is the one record of a request: alive until it is ended by End or by its expiry, then a tombstone that keeps
// late messages from bringing it back.
type request struct {
	id      string
	newest  int       // attempt
	known   bool      // somebody told the deadline
	expiry  time.Time // alive: deadline and margin; ended: when it is forgotten
	ended   bool
	objects map[*object]bool
	claims  map[*claim]bool
	logs    map[claimKey]*object // token logs by the part that they are of, see Inherit; each has the request's hold
	records map[claimKey]record  // of parts of which there is anything to say
	index   int                  // in its queue
	by      *conn                // who named it first, or its gateway since; nil once it has ended
}

// maxLeft bounds the time to a deadline that a client may name.
const maxLeft = 7 * 24 * time.Hour

// touch returns the record of the request that ref names for a client, made if need be, and raises its attempt and deadline: ErrEnded
// when the request has ended or a newer attempt is known. Deadlines told by different processes differ by the time that
// messages spent in queues; the latest counts, so that nobody's memory goes early.
func (l *Ledger) touch(now time.Time, c *conn, ref protocol.Ref) (*request, error) {
	if ref.Left <= 0 {
		return nil, fmt.Errorf("request %s is past its deadline: %w", ref.Request, mem.ErrEnded)
	}
	return l.raise(now, c, ref.Request, ref.Attempt, ref.Left)
}

// raise is touch for one who may not know the deadline (left 0).
func (l *Ledger) raise(now time.Time, c *conn, id string, attempt int, left time.Duration) (*request, error) {
	if id == "" || len(id) > maxID || attempt < 0 || left < 0 {
		return nil, fmt.Errorf("request %.40q attempt %d: %w", id, attempt, mem.ErrInvalid)
	}
	l.Tick(now)
	r, ok := l.requests[id]
	if !ok {
		if most := l.cfg.MaxRequests; most > 0 && c.named >= most {
			return nil, fmt.Errorf("request %s: %q has named %d requests that have not ended, as many as one may: %w", id, c.instance, most, mem.ErrExhausted)
		}
		c.named++
		r = &request{id: id, by: c, newest: attempt, objects: map[*object]bool{}, claims: map[*claim]bool{}, logs: map[claimKey]*object{}}
		r.expiry = now.Add(l.cfg.Unknown)
		l.requests[id] = r
		heap.Push(&l.live, r)
	}
	switch {
	case r.ended:
		return nil, fmt.Errorf("request %s: %w", id, mem.ErrEnded)
	case attempt < r.newest:
		return nil, fmt.Errorf("attempt %d at request %s, the newest is %d: %w", attempt, id, r.newest, mem.ErrEnded)
	case attempt > r.newest:
		l.supersede(r, attempt)
	}
	if c.role == protocol.RoleGateway && r.by != c { // the same one, over another connection
		r.by.named--
		c.named++
		r.by = c
	}
	if orphan := r.by.gone && r.by.role == protocol.RoleGateway; left > 0 && !orphan {
		if e := now.Add(min(left, maxLeft) + l.cfg.Margin); !r.known || e.After(r.expiry) {
			r.known, r.expiry = true, e
			heap.Fix(&l.live, r.index)
		}
	}
	return r, nil
}

// supersede makes attempt the newest: what older ones hold and claim goes.
func (l *Ledger) supersede(r *request, attempt int) {
	r.newest = attempt
	for _, o := range newestFirst(r.objects) {
		if o.requests[r] < attempt {
			l.drop(r, o)
		}
	}
	for k := range r.claims {
		if k.part.Attempt < attempt {
			l.release(k)
		}
	}
	clear(r.logs)
	r.again()
}

// EndAttempts drops all holds and claims of the attempts at a request up to one, if there is something of it: they are over, and
// a later one may come.
func (l *Ledger) EndAttempts(now time.Time, id string, last int) {
	l.Tick(now)
	if r, ok := l.requests[id]; ok && !r.ended && last >= r.newest {
		l.supersede(r, last+1)
	}
}

// abandon shortens the time of the requests of a client to the margin: it was their gateway, and nobody waits for their
// answers any more, nor can end them. Who works on one of them does not prolong it (see raise): of a request of which not all messages were
// published when the gateway died nobody may come to know that it will never be complete.
func (l *Ledger) abandon(now time.Time, c *conn) {
	for _, r := range l.live {
		if r.by == c && r.expiry.After(now.Add(l.cfg.Margin)) {
			r.known, r.expiry = false, now.Add(l.cfg.Margin)
		}
	}
	heap.Init(&l.live)
}

func (l *Ledger) drop(r *request, o *object) {
	delete(o.requests, r)
	delete(r.objects, o)
	l.settle(o)
}

// End drops all holds and claims of a request and remembers that it has ended. A request never heard of is remembered
// too: its messages may still be under way.
func (l *Ledger) End(now time.Time, id string) error {
	if id == "" || len(id) > maxID {
		return fmt.Errorf("ending request %.40q: %w", id, mem.ErrInvalid)
	}
	l.Tick(now)
	r, ok := l.requests[id]
	switch {
	case !ok:
		r = &request{id: id, expiry: now}
		l.requests[id] = r
	case r.ended:
		return nil
	default:
		heap.Remove(&l.live, r.index)
	}
	l.end(now, r)
	return nil
}

// end makes a tombstone of a request that is in no queue.
func (l *Ledger) end(now time.Time, r *request) {
	for _, o := range newestFirst(r.objects) {
		l.drop(r, o)
	}
	for k := range r.claims {
		l.release(k)
	}
	if r.by != nil {
		r.by.named--
		r.by = nil
	}
	r.ended, r.objects, r.claims, r.logs, r.records = true, nil, nil, nil, nil
	if t := now.Add(l.cfg.Tombstone); !r.known || t.After(r.expiry) {
		r.expiry = t
	}
	heap.Push(&l.ended, r)
	for len(l.ended) > l.cfg.MaxTombstones {
		l.forget()
	}
}

// forget removes the tombstone that expires first.
func (l *Ledger) forget() {
	r := heap.Pop(&l.ended).(*request)
	delete(l.requests, r.id)
}

// Tick ends what is past its deadline and forgets old tombstones. Call it at Next at the latest.
func (l *Ledger) Tick(now time.Time) {
	l.lapse(now)
	for len(l.live) > 0 && !l.live[0].expiry.After(now) {
		r := heap.Pop(&l.live).(*request)
		l.end(now, r)
	}
	for len(l.ended) > 0 && !l.ended[0].expiry.After(now) {
		l.forget()
	}
}

// Next is the time of the next thing that Tick has to do; ok is false when there is none.
func (l *Ledger) Next() (t time.Time, ok bool) {
	for _, q := range []queue{l.live, l.ended} {
		if len(q) > 0 && (!ok || q[0].expiry.Before(t)) {
			t, ok = q[0].expiry, true
		}
	}
	if len(l.reserved) > 0 && (!ok || l.reserved[0].until.Before(t)) {
		t, ok = l.reserved[0].until, true
	}
	return t, ok
}

// queue is a heap of requests by expiry.
type queue []*request

func (q queue) Len() int           { return len(q) }
func (q queue) Less(i, j int) bool { return q[i].expiry.Before(q[j].expiry) }
func (q queue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].index, q[j].index = i, j
}

// Push implements heap.Interface.
func (q *queue) Push(x any) {
	r := x.(*request)
	r.index = len(*q)
	*q = append(*q, r)
}

// Pop implements heap.Interface.
func (q *queue) Pop() any {
	old := *q
	r := old[len(old)-1]
	old[len(old)-1] = nil
	*q = old[:len(old)-1]
	return r
}
