package wire

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"time"
)

// BucketLayouts has the layout records of instances (Layout) by LayoutKey. A change of one is a compare-and-set.
const BucketLayouts = "trireme_layouts"

// Kinds of operations on an instance.
const (
	ChangeScale     = "scale"     // it gets another number of NPUs
	ChangeRebalance = "rebalance" // its experts are placed anew on the NPUs that it has
	ChangeRole      = "role"      // what operators call two scales, of which the first gives up an NPU that the second takes
)

// What Change.Spare and Change.Slack are where nobody says something else.
const (
	DefaultSpare = 0.25
	DefaultSlack = 0.05
)

// Kinds of events about operations on instances, all with a ChangeReport as data.
const (
	EventScalePlan    = "scale.plan"
	EventScalePrepare = "scale.prepare"
	EventScaleCommit  = "scale.commit"
	EventScaleRelease = "scale.release"
	EventScaleAbort   = "scale.abort"
	EventScaleDone    = "scale.done" // in the new layout, or as it was; its Why says which
)

// SubjectChange is where a stage instance answers Change.
func SubjectChange(instance string) string { return "trireme.instance." + instance + ".change" }

// LayoutKey is the key of an instance's layout record: the node, and the name that the instance keeps over its processes.
func LayoutKey(node, name string) string { return node + "." + name }

// Layout is an instance's layout record: what its next process starts with. It is the one truth about which epoch is in force;
// who owns an NPU the HMM says.
type Layout struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Instance string   // id of the process that has written it
	Model    [32]byte // model.Config.Digest
	Asked    int      // NPUs that the process was started with: a record made for another number is not followed
	Epoch    uint64   // 0: as an instance starts by itself
	NPUs     []int    // on the node, by slot; -1: a hole. A slot's number does not change while an NPU has it
	Experts  []byte   // who has which experts: placement.Layout.Encode, by slot
	Pending  *Pending // the operation under way, if any
	Last     *Ended   // the operation before
}

// Record is the key of the instance's layout record.
func (i *Instance) Record() string { return LayoutKey(i.Node, cmp.Or(i.Name, i.ID)) }

// Pending is an operation that has not come to its commit.
type Pending struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	ID, Kind string
	NPUs     int           // that the instance is to have
	Left     time.Duration // until it is given up, when it began
}

// Ended is an operation that has come to its commit, or was given up before.
type Ended struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	ID, Kind  string
	Committed bool
	Why       string // it was given up
}

// Is reports whether the record is the one of an operation that has been committed.
func (l *Layout) Is(operation string) bool {
	return l.Last != nil && l.Last.ID == operation && l.Last.Committed
}

// Empty reports whether the instance has no NPUs, or is about to give up the last ones.
func (l *Layout) Empty() bool {
	return NPUCount(l.NPUs) == 0 || l.Pending != nil && l.Pending.NPUs == 0
}

// Awaits reports whether an operation is pending.
func (l *Layout) Awaits(operation string) bool { return l.Pending != nil && l.Pending.ID == operation }

// Change asks a stage instance for an operation: request/reply on SubjectChange, answered with a ChangeReport. Asking again under
// the ID of an operation that the instance knows starts nothing and tells how far it is.
type Change struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	ID       string // letters and digits, made by who asks
	Kind     string
	NPUs     int           // to have then; ChangeScale only. 0: none, as a standby; ByNPUs: as By says
	Left     time.Duration // the operation is given up if it has not come to its commit by then
	Rate     int64         // most bytes to copy in a second; 0: as fast as it goes
	Spare    float64       // places for second copies of experts, as a part of those that first ones need
	Slack    float64       // so much longer than in the best placement the busiest NPU may take, in order to move less
	DryRun   bool          // only plan
	Seen     uint64        // the last ChangeReport.Number that who asks has: the answer waits for a newer one, for a second
	Hold     string        // for tests: stop behind the work of these states, by commas, for HoldTime each
	HoldTime time.Duration // "

	// Of ChangeScale, instead of NPUs: those of the node, by number, that are to join and to leave; and the name of the instance that those
	// that leave are kept for, for as long as the HMM keeps NPUs of instances that have ended.
	Join, Leave []int
	For         string

	Fence uint64 // of the scaler that asks, see Fence; 0: an operator asks
	By    int    // with NPUs ByNPUs: how many more than when it begins, or fewer. Who does not look at it refuses such a number of NPUs
}

// ByNPUs is the Change.NPUs of a change by a number of NPUs.
const ByNPUs = -1

// ChangeReport is how far an operation is.
type ChangeReport struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	ID       string `json:"id"`
	Kind     string `json:"kind"`
	Instance string `json:"instance"`
	Record   string `json:"record"` // key of the layout record, which tells more when the instance is gone
	Number   uint64 `json:"number"` // rises

	State     string `json:"state"`         // see shared/sched/elastic
	Why       string `json:"why,omitempty"` // it was refused or aborted, or what went wrong behind its commit
	Refused   bool   `json:"refused,omitempty"`
	Committed bool   `json:"committed"`
	Epoch     uint64 `json:"epoch"`          // in force
	Held      bool   `json:"held,omitempty"` // it waits as Change.Hold has asked for

	Plan ChangePlan `json:"plan"`

	// Figures as far as they are known.
	Copied    int64         `json:"copied_bytes"` // of Plan.Bytes
	Maps      int           `json:"maps"`         // calls, in order that kernels find the experts in ranges of addresses (stage.IndirectionRanges)
	Unmaps    int           `json:"unmaps"`       // "
	Mapping   time.Duration `json:"mapping_ns"`   // for Maps, beside serving
	Planning  time.Duration `json:"planning_ns"`
	Copying   time.Duration `json:"copying_ns"`
	Warming   time.Duration `json:"warming_ns"`
	Pause     time.Duration `json:"pause_ns"`      // steps were held up for so long by the switch
	Committal time.Duration `json:"committing_ns"` // of the record
	Total     time.Duration `json:"total_ns"`      // until all NPUs of the new layout compute
	Releasing time.Duration `json:"releasing_ns"`  // behind that: to give back what only the old one needed

	Fence uint64 `json:"fence,omitempty"` // of what was refused for an older one: the newest that was seen

	// Device memory that the instance has in use, with its weights, by the HMM's books: in bytes of whole pages, without what only a cache keeps.
	UsedBefore int64 `json:"used_before_bytes"` // when PREPARE begins
	Peak       int64 `json:"peak_bytes"`        // most from then on, until RELEASE, or ABORT, is done
	UsedAfter  int64 `json:"used_after_bytes"`  // then
}

// ChangePlan is what an operation has to do.
type ChangePlan struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Before []int         `json:"npus_before"` // on the node, by slot; -1: a hole
	After  []int         `json:"npus_after"`
	Copies int           `json:"experts_copied"` // experts of a layer that an NPU gets
	Drops  int           `json:"experts_dropped"`
	Bytes  int64         `json:"bytes"`           // that are copied between memory domains, or read
	Shared int           `json:"experts_shared"`  // of Copies: they lie in the NPU's memory domain already, and are only mapped
	Memory int64         `json:"memory_bytes"`    // that is needed beside the larger layout until the end
	Rows   uint64        `json:"rows"`            // that the measured load is of: tokens times layers times experts
	Was    float64       `json:"balance_before"`  // of the measured load: the part of the time that the NPUs do not wait for the busiest
	Will   float64       `json:"balance_after"`   // "
	Expect time.Duration `json:"expected_ns"`     // to copy Bytes: at the copy rate, or, without one, as fast as copies went last
	Moves  bool          `json:"something_to_do"` // false: the instance is as it should be
}

// Sentence says for people how far the operation is.
func (r *ChangeReport) Sentence() string {
	p := &r.Plan
	head := r.Kind + " " + r.ID + ": "
	what := "nothing to copy"
	if p.Bytes > 0 {
		what = fmt.Sprintf("%.3g MB to copy", float64(p.Bytes)/1e6)
	}
	if p.HasExperts() {
		what = fmt.Sprintf("%d experts to other NPUs, %d copies dropped, %s, balance %.2f to %.2f", p.Copies, p.Drops, what, p.Was, p.Will)
	}
	if before, after := NPUCount(p.Before), NPUCount(p.After); before != after {
		what = fmt.Sprintf("from %d to %d NPUs, ", before, after) + what
	}
	switch {
	case r.Why != "" && r.Committed:
		return head + "committed as epoch " + strconv.FormatUint(r.Epoch, 10) + ", but " + r.Why
	case r.Why != "":
		return head + "given up: " + r.Why
	case r.Committed:
		return fmt.Sprintf("%sepoch %d is in force, %s; steps were held up for %v", head, r.Epoch, what, r.Pause.Round(time.Microsecond))
	case r.State == "plan":
		return head + "deciding what moves"
	case !p.Moves:
		return head + "nothing to do"
	}
	return head + what
}

// HasExperts reports whether the instance computes with experts, before or after.
func (p *ChangePlan) HasExperts() bool { return p.Was > 0 || p.Will > 0 }

// NPUCount is the number of NPUs in slots.
func NPUCount(slots []int) int {
	return len(slots) - len(slices.DeleteFunc(slices.Clone(slots), func(n int) bool { return n >= 0 }))
}
