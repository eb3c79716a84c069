// Package elastic is the state machine of an operation that changes the NPUs of an instance, or where its experts are, while it
// serves. It decides what comes next and touches nothing: whoever drives it does what Next says and tells the outcome.
//
//	PLAN --Begin--> PREPARE --Store--> COMMIT --Switch--> RELEASE --> done
//	  \________________\__________________\--(not committed)--> ABORT --> aborted
//
// The commit point is one compare-and-set of the instance's layout record: Store. What comes before it can be undone, what comes
// behind it can only be completed, by this process or by its successor. While nobody can say whether Store has happened neither
// layout is let go: a second write over the same revision (Settle) decides it, as only one of the two can succeed.
package elastic

import "fmt"

// State is where an operation stands. States are what operators see.
type State string

// The states. An operation begins in Plan and ends in Done or Aborted.
const (
	Plan    State = "plan"    // what moves is decided, and noted in the layout record as pending
	Prepare State = "prepare" // experts are copied and the new layout is built, beside serving
	Commit  State = "commit"  // the layout record is changed, and the process switches
	Release State = "release" // what only the old layout needed is given back
	Abort   State = "abort"   // what was prepared is given back; the old layout stays
	Done    State = "done"
	Aborted State = "aborted"
)

// Ended reports whether nothing comes behind the state.
func (s State) Ended() bool { return s == Done || s == Aborted }

// Step is what is to be done next.
type Step int

// The steps, each with the outcomes that it may have.
const (
	MakePlan Step = iota // decide what moves: OK, Nothing, Failed
	Begin                // note the operation as pending in the layout record: OK, Failed, Unclear, Lost
	Copy                 // copy, build, warm: OK, Failed
	Store                // compare-and-set of the record to the new epoch: OK, Failed, Unclear, Lost
	Settle               // compare-and-set of the record, over the same revision, to the old epoch with nothing pending: OK,
	// Committed, Lost. It is tried until there is an answer
	Switch  // to the new layout, between two steps: OK, Failed
	Drop    // what only the old layout needed: OK, Failed
	Undo    // what Copy has made: OK, Failed
	Restart // the process cannot go on: its successor starts in the layout of the record. It has no outcome
	End     // nothing. It has no outcome
)

var steps = [...]string{"MakePlan", "Begin", "Copy", "Store", "Settle", "Switch", "Drop", "Undo", "Restart", "End"}

// String is the step's name.
func (s Step) String() string { return steps[s] }

// Result is how a step went.
type Result int

// Results.
const (
	OK        Result = iota
	Nothing          // of MakePlan: everything is as it should be already
	Failed           // for the reason given
	Unclear          // the record may have been written, or may yet be
	Lost             // the record was written by somebody else: another process is this instance now
	Committed        // of Settle: the write before it had succeeded
)

var results = [...]string{"OK", "Nothing", "Failed", "Unclear", "Lost", "Committed"}

// String is the result's name.
func (r Result) String() string { return results[r] }

// Operation is an operation that is driven. Its zero value is one that begins.
type Operation struct {
	step      Step
	begun     bool // the record may say that it is pending
	lost      bool
	committed bool
	state     State
	why       error
}

// State is where the operation stands.
func (o *Operation) State() State {
	if o.state == "" {
		return Plan
	}
	return o.state
}

// Next is what is to be done now.
func (o *Operation) Next() Step { return o.step }

// Committed reports whether the new epoch is in force, for this process or its successor.
func (o *Operation) Committed() bool { return o.committed }

// Why is why the operation was aborted, or what went wrong behind its commit; nil: nothing.
func (o *Operation) Why() error { return o.why }

// CanStop reports whether the operation may still be told to stop: its Copy or MakePlan then fails. Later it is completed.
func (o *Operation) CanStop() bool { return o.step < Store }

// Outcome tells how the step that Next has named went, with the reason if it is not OK, and moves on.
func (o *Operation) Outcome(r Result, why error) {
	switch bad := r != OK && r != Nothing && r != Committed; {
	case bad && o.why == nil:
		o.why = why
	case bad && o.step == Undo: // nobody else tells of it
		o.why = fmt.Errorf("%w; and what was prepared is not all given back: %w", o.why, why)
	}
	switch {
	case o.step == MakePlan && r == OK:
		o.step, o.begun = Begin, true
	case o.step == MakePlan && r == Nothing:
		o.end(Done)
	case o.step == MakePlan && r == Failed:
		o.end(Aborted)
	case o.step == Begin && r == OK:
		o.state, o.step = Prepare, Copy
	case o.step == Begin && r == Failed:
		o.begun = false
		o.end(Aborted)
	case o.step == Begin && r == Unclear:
		o.state, o.step = Abort, Settle
	case o.step == Begin && r == Lost:
		o.end(Aborted)
	case o.step == Copy && r == OK:
		o.state, o.step = Commit, Store
	case o.step == Copy && r == Failed, o.step == Store && r == Failed:
		o.state, o.step = Abort, Undo
	case o.step == Store && (r == OK), o.step == Settle && r == Committed:
		o.state, o.step, o.committed, o.begun, o.why = Commit, Switch, true, false, nil
	case o.step == Store && r == Unclear:
		o.step = Settle // both layouts stay, and so does the state
	case o.step == Store && r == Lost:
		o.state, o.step, o.lost = Abort, Undo, true
	case o.step == Settle && r == OK:
		o.begun = false
		o.undo()
	case o.step == Settle && r == Lost:
		o.lost = true
		o.undo()
	case o.step == Switch && r == OK:
		o.state, o.step = Release, Drop
	case o.step == Switch && r == Failed:
		o.step = Restart
	case o.step == Drop && (r == OK || r == Failed):
		o.end(Done)
	case o.step == Undo && (r == OK || r == Failed):
		o.undone()
	default:
		panic(fmt.Sprintf("BUG: %v of %v in state %s", r, o.step, o.State()))
	}
}

// undo follows a Settle that has left, or brought back, the old epoch.
func (o *Operation) undo() {
	if o.State() == Commit { // what was prepared is still there
		o.state, o.step = Abort, Undo
		return
	}
	o.undone()
}

// undone is next when what was prepared is given back: a record that says that the operation is pending is cleared.
func (o *Operation) undone() {
	if o.begun && !o.lost {
		o.step = Settle
		return
	}
	o.end(Aborted)
}

func (o *Operation) end(s State) { o.state, o.step = s, End }
