package lead

import (
	"encoding/json"
	"time"

	"trireme.dev/shared/sched/autoscale"
)

// record is what stands in the bucket, as JSON: who leads, and what it has under way. Each write of it is a compare-and-set over the
// revision of the one before, so that no two writers can both believe that they came next.
type record struct {
	Leader    string        `json:"leader"`   // id of a process; empty: the last one has given up in order, and does nothing any more
	Write     uint64        `json:"write"`    // number of the leader's write, by which it knows one of its own whose answer was lost
	Lease     time.Duration `json:"lease_ns"` // of the leader: whoever wants to follow it waits at least so long
	Fence     uint64        `json:"fence"`
	Operation *Operation    `json:"operation,omitempty"`
}

// Operation is a change that is carried out. It is noted in the record before it is asked for, so that a successor finds it there and
// asks again under the same ids.
type Operation struct {
	ID     string           `json:"id"` // letters and digits, made by whoever decides
	Change autoscale.Change `json:"change"`
	Step   int              `json:"step,omitempty"` // of a change in several halves: that many have ended
	Note   json.RawMessage  `json:"note,omitempty"` // what the actuator has to remember of it; its shape is the actuator's
}

// lease is what one process knows of the record, and what it may do by that: a state machine without clock, goroutine or I/O. All
// times are of this process' own monotonic clock; times of two processes are never compared. What makes it safe:
//
//	a leader may act for less than a lease, counted from before it has sent the write that gives it the lease
//	a follower may write over a revision that has not changed for a lease, counted from after it has first read it
//
// The write is sent before it is stored, and stored before anybody reads it. So a leader's time is over before a follower's wait is, by
// an eighth of the lease, which is what clocks may differ in pace and what an answer that is already on its way may take.
type lease struct {
	me     string
	length time.Duration // that this process wants

	read     bool          // the record was read, or found missing: revision 0 then
	rec      record        // as last seen or written
	revision uint64        // of it
	since    time.Duration // it has been there at least since
	until    time.Duration // this process leads and may act until then; 0: it does not lead
	writes   uint64
	fence    uint64 // the greatest ever seen, that of records that were lost included
}

// saw takes note of the record as it was read; now is when the answer had come.
func (l *lease) saw(now time.Duration, rec record, revision uint64) {
	if l.read && revision == l.revision && rec.Leader == l.rec.Leader && rec.Write == l.rec.Write { // a new store counts from 1 again
		return
	}
	l.read, l.rec, l.revision, l.since = true, rec, revision, now
	l.fence = max(l.fence, rec.Fence)
}

// wait is how long the record has to stand before it may be taken over.
func (l *lease) wait() time.Duration {
	if l.revision > 0 && l.rec.Leader == "" {
		return 0
	}
	return max(l.length, l.rec.Lease)
}

// free reports whether the record may be taken over. One that is missing is waited for too: NATS may have lost its store under a
// leader.
func (l *lease) free(now time.Duration) bool {
	return l.read && l.until == 0 && now-l.since >= l.wait()
}

// next is the record to write over the present one, with another operation, and a greater fence if raise. above is what the fence
// has to be greater than.
func (l *lease) next(op *Operation, raise bool, above uint64) record {
	l.writes++
	rec := record{Leader: l.me, Write: l.writes, Lease: l.length, Fence: l.rec.Fence, Operation: op}
	if raise {
		rec.Fence = max(l.fence, above) + 1
	}
	return rec
}

// stored takes note of a write of this process that stands as revision; sent is from before it was first tried.
func (l *lease) stored(sent time.Duration, rec record, revision uint64) {
	l.read, l.rec, l.revision, l.since = true, rec, revision, sent
	l.fence = max(l.fence, rec.Fence)
	if rec.Leader != l.me {
		l.lost() // given up in order
		return
	}
	l.until = max(l.until, sent+l.length-l.length/8)
}

// conflicted takes note of what stands where a write of this process was refused, and says what that means: the write itself has been
// stored, and its answer was lost; or an earlier one of this process has, over which it can be tried again; or somebody else leads.
func (l *lease) conflicted(now, sent time.Duration, wrote, stands record, revision uint64) conflict {
	switch {
	case revision > 0 && stands.Leader == l.me && stands.Write == wrote.Write:
		l.stored(sent, stands, revision)
		return mine
	case revision > 0 && stands.Leader == l.me && l.until > 0:
		l.rec, l.revision, l.fence = stands, revision, max(l.fence, stands.Fence)
		return again
	}
	l.lost()
	l.saw(now, stands, revision)
	return others
}

type conflict int

const (
	mine conflict = iota
	again
	others
)

// acts reports whether this process may act now.
func (l *lease) acts(now time.Duration) bool { return l.until > 0 && now < l.until }

// lost ends this process' term.
func (l *lease) lost() { l.until = 0 }
