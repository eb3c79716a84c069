package elastic

import (
	"errors"
	"fmt"
	"testing"
)

// outcomes are what each step may come to.
var outcomes = map[Step][]Result{
	MakePlan: {OK, Nothing, Failed},
	Begin:    {OK, Failed, Unclear, Lost},
	Copy:     {OK, Failed},
	Store:    {OK, Failed, Unclear, Lost},
	Settle:   {OK, Committed, Lost},
	Switch:   {OK, Failed},
	Drop:     {OK, Failed},
	Undo:     {OK, Failed},
}

// world is what the steps of an operation do to the record and to the layouts, as a driver would.
type world struct {
	pending, stored bool // in the record
	stolen          bool // the record is another process's
	prepared        bool // the new layout is there
	old             bool // the old layout is there
	on              int  // epoch that is computed: 0 old, 1 new
	maybe           bool // Store may have happened
}

// do has a step come to a result, or reports that it cannot, as things are.
func (w *world) do(s Step, r Result) (possible bool) {
	switch s {
	case Begin:
		w.pending = r == OK || r == Unclear // if it is unclear it has to be cleared
		w.stolen = r == Lost
	case Copy:
		w.prepared = true // also in part
	case Store:
		w.stored, w.maybe = r == OK, r == Unclear
		w.pending = w.pending && r != OK
		w.stolen = r == Lost
	case Settle:
		switch r {
		case Committed:
			if !w.maybe {
				return false
			}
			w.stored, w.pending = true, false
		case OK:
			w.pending = false
		case Lost:
			w.stolen = true
		}
		w.maybe = false
	case Switch:
		if r == OK {
			w.on = 1
		}
	case Drop:
		w.old = false
	case Undo:
		w.prepared = false
	}
	return true
}

// Every course that an operation can take ends, in the new epoch if the record says so and else in the old one, with nothing
// pending in a record that is its own; the layout that is computed is there at every moment, both are as long as it is unclear
// which one it is to be, and no step but an ending one follows when another process has the record.
func TestEveryCourse(t *testing.T) {
	courses, ended := 0, map[string]int{}
	var follow func(o Operation, w world, course string, depth int)
	follow = func(o Operation, w world, course string, depth int) {
		if depth > 20 {
			t.Fatalf("%s does not end", course)
		}
		step := o.Next()
		if w.maybe && !(w.old && w.prepared) || w.on == 0 && !w.old || w.on == 1 && !w.prepared {
			t.Fatalf("%s: a layout is missing that may be needed: %+v", course, w)
		}
		if step == End || step == Restart {
			courses++
			ended[fmt.Sprint(o.State(), step)]++
			if o.Committed() != w.stored || w.maybe || step == End && (w.on == 1) != w.stored || w.pending && !w.stolen {
				t.Errorf("%s ends as %s, committed %v: %+v", course, o.State(), o.Committed(), w)
			}
			if step == End && !o.State().Ended() {
				t.Errorf("%s ends in state %s", course, o.State())
			}
			if (o.State() == Aborted || step == Restart) && o.Why() == nil {
				t.Errorf("%s: nobody knows why", course)
			}
			return
		}
		if w.stolen && step != Undo {
			t.Fatalf("%s: %v although another process has the record", course, step)
		}
		for _, r := range outcomes[step] {
			next, after := o, w
			if !after.do(step, r) {
				continue
			}
			var why error
			if r != OK && r != Nothing && r != Committed {
				why = errors.New("why")
			}
			next.Outcome(r, why)
			follow(next, after, fmt.Sprintf("%s %v:%v", course, step, r), depth+1)
		}
	}
	follow(Operation{}, world{old: true}, "", 0)
	if courses < 20 || len(ended) != 3 {
		t.Errorf("%d courses, ended %v: the test follows too few", courses, ended)
	}
}

// What operators see of the usual courses.
func TestStates(t *testing.T) {
	type in struct {
		r    Result
		want State
	}
	fail := errors.New("no room")
	for name, course := range map[string][]in{
		"done":            {{OK, Plan}, {OK, Prepare}, {OK, Commit}, {OK, Commit}, {OK, Release}, {OK, Done}},
		"nothing to do":   {{Nothing, Done}},
		"no room":         {{OK, Plan}, {OK, Prepare}, {Failed, Abort}, {OK, Abort}, {OK, Aborted}},
		"unclear, then":   {{OK, Plan}, {OK, Prepare}, {OK, Commit}, {Unclear, Commit}, {Committed, Commit}, {OK, Release}, {Failed, Done}},
		"unclear, undone": {{OK, Plan}, {OK, Prepare}, {OK, Commit}, {Unclear, Commit}, {OK, Abort}, {OK, Aborted}},
	} {
		var o Operation
		for i, x := range course {
			why := error(nil)
			if x.r == Failed || x.r == Unclear {
				why = fail
			}
			if o.CanStop() != (o.Next() < Store) {
				t.Errorf("%s: before step %d it can be stopped: %v", name, i, o.CanStop())
			}
			o.Outcome(x.r, why)
			if o.State() != x.want {
				t.Errorf("%s: after step %d in state %s, want %s", name, i, o.State(), x.want)
			}
		}
		if o.Next() != End {
			t.Errorf("%s: then comes %v", name, o.Next())
		}
	}
}

// Why an operation was given up is told, and also that something of it could not be given back.
func TestWhyOfAnUndoThatFails(t *testing.T) {
	full, stuck := errors.New("no room"), errors.New("still held")
	var o Operation
	o.Outcome(OK, nil)
	o.Outcome(OK, nil)
	o.Outcome(Failed, full)
	o.Outcome(Failed, stuck)
	if o.Outcome(OK, nil); o.State() != Aborted || !errors.Is(o.Why(), full) || !errors.Is(o.Why(), stuck) {
		t.Errorf("%s, because: %v", o.State(), o.Why())
	}
}

func TestWrongOutcome(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("a plan cannot be unclear")
		}
	}()
	new(Operation).Outcome(Unclear, nil)
}
