package autoscale

import "time"

// Action is a kind of change.
type Action string

// The actions.
const (
	None      Action = "none"
	Widen     Action = "widen"     // an instance takes spare NPUs of its node
	Narrow    Action = "narrow"    // an instance gives NPUs up, which are spare then
	Move      Action = "move"      // an NPU leaves one instance and joins another of the same node, for another role
	Add       Action = "add"       // processes are started on spare NPUs
	Remove    Action = "remove"    // processes hand over what they have, and end
	Promote   Action = "promote"   // a standby takes spare NPUs
	Rebalance Action = "rebalance" // an instance's experts are placed anew
)

// Actions are all that change something.
var Actions = []Action{Widen, Narrow, Move, Add, Remove, Promote, Rebalance}

// Change is a change of the fleet. What each action needs of it:
//
//	widen      Instance gets Numbers, and has NPUs then
//	narrow     Instance gives Numbers up, and has NPUs then
//	move       From gives Numbers to Instance, which may be a standby; From has FromNPUs then (0: it is a standby, or ended), Instance NPUs
//	add        Count more processes with Roles are started on Node, each with NPUs, on Numbers or others that are spare there
//	remove     Instance ends; its Numbers are spare then
//	promote    the standby Instance gets Numbers, and has NPUs then
//	rebalance  Instance
type Change struct {
	Action   Action `json:"action"`
	Stage    Stage  `json:"stage"` // for whose sake; of narrow and remove, which has too much
	Instance string `json:"instance,omitempty"`
	From     string `json:"from,omitempty"`
	Node     string `json:"node,omitempty"`
	Roles    string `json:"roles,omitempty"` // letters, of Instance or of the new processes
	Numbers  []int  `json:"numbers,omitempty"`
	NPUs     int    `json:"npus,omitempty"`
	FromNPUs int    `json:"from_npus,omitempty"`
	Count    int    `json:"count,omitempty"`
}

// Decision is what is to be done now, and why. It can be written as JSON.
type Decision struct {
	Now    time.Duration `json:"now_ns"` // of the View
	Change Change        `json:"change"` // its Action is None where there is nothing to do
	Why    string        `json:"why"`    // one sentence
	// Blind says that signals are missing or too old, so that nothing could be decided.
	Blind bool `json:"blind,omitempty"`

	Inputs       Inputs        `json:"inputs"`
	Alternatives []Alternative `json:"alternatives,omitempty"` // the choice first, what was refused last
	LeftOut      int           `json:"alternatives_left_out,omitempty"`
}

// Inputs is what a Decision was made from, as seen.
type Inputs struct {
	Stages [Stages]StageInputs `json:"stages"`   // by Stage
	NPUs   int                 `json:"npus"`     // that instances have
	Spare  int                 `json:"spare"`    //
	TTFT   float64             `json:"ttft_met"` // part of requests; -1: not known
	TPOT   float64             `json:"tpot_met"` // "
	// Utilisation is Effect's, of the fleet as it is and Need as it is now.
	Utilisation [Stages]float64 `json:"utilisation"`
}

func (in *Inputs) needs() (need [Stages]float64) {
	for s := range need {
		need[s] = in.Stages[s].Need
	}
	return need
}

// StageInputs is what is known of a stage.
type StageInputs struct {
	Demand   float64 `json:"demand"`   // units a second that arrive: Visual, Prompt, Output tokens
	Capacity float64 `json:"capacity"` // units a second that an NPU of the stage does at the wanted utilisation; 0: not known
	Backlog  float64 `json:"backlog"`  // units that wait
	Batch    int     `json:"batch"`    // of decode: most sequences of an NPU with which the target of TPOT is kept; 0: not known
	Need     float64 `json:"need"`     // NPUs: for the demand, and to do away with the backlog in the policy's time
	Unknown  bool    `json:"unknown"`  // there is work and no capacity was measured yet: Need is 0, and nothing of the stage is taken away
	AtMost   bool    `json:"at_most"`  // Need may be far too much: only small batches were seen. It is no reason to give NPUs, but one to take them away
	Grow     float64 `json:"grow"`     // the least Need of the window for growing, a standard error of the demand less
	Shrink   float64 `json:"shrink"`   // the greatest Need of the window for shrinking, a standard error more
	NPUs     int     `json:"npus"`     // that have the role
}

// Alternative is a change that was thought about.
type Alternative struct {
	Change  Change  `json:"change"`
	Refused string  `json:"refused,omitempty"` // why it cannot be; empty: it can
	Effect  Effect  `json:"effect"`
	Cost    Cost    `json:"cost"`
	Score   float64 `json:"score"` // less is better: see Weights
}

// Effect is what a change is expected to lead to.
type Effect struct {
	// Utilisation is Need over NPUs, of the role and those that share its NPUs, by Stage: 1 is what is wanted.
	Utilisation [Stages]float64 `json:"utilisation"`
	NPUs        int             `json:"npus"` // that instances have then
}

// Cost is what a change itself takes.
type Cost struct {
	Time  time.Duration `json:"time_ns"` // to its effect
	Bytes int64         `json:"bytes"`   // that are copied or read
}
