// Package autoscale decides which change of the fleet, if any, serves the load best: from what gateways, queues and NPUs tell (View)
// and what the operator wants (Policy) to one change at a time, explained (Decision). It is a pure state machine without a clock,
// goroutine or chance: the same Views give the same Decisions, in the scaler, in a simulator, and when a record is replayed.
//
//	demand, at the gateways ──> need by stage ──┐
//	capacity of an NPU, as measured ────────────┤──> changes that are possible, each with effect and cost ──> one of them, or none
//	who has which NPUs ─────────────────────────┘
//
// All times are durations since some moment of the caller's choice, the same for all of them.
package autoscale

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Stage is a stage of the path of a request.
type Stage uint8

// The stages.
const (
	Encode Stage = iota
	Prefill
	Decode
	Stages = 3 // how many there are
)

var stageNames = [Stages]string{"encode", "prefill", "decode"}

// String is the stage's name: encode, prefill or decode.
func (s Stage) String() string { return stageNames[s] }

// Letter is the stage in the notation of topologies: E, P or D.
func (s Stage) Letter() string { return "EPD"[s : s+1] }

// MarshalText writes the stage's name.
func (s Stage) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads a stage's name.
func (s *Stage) UnmarshalText(text []byte) error {
	i := slices.Index(stageNames[:], string(text))
	if i < 0 {
		return fmt.Errorf("there is no stage %q; there are %s", text, strings.Join(stageNames[:], ", "))
	}
	*s = Stage(i)
	return nil
}

// Signal says whether something is known and how old it is. The zero value: nothing is known.
type Signal struct {
	Known bool          `json:"known"`
	Age   time.Duration `json:"age_ns"`
}

// View is what is known at a moment. What is not known is left out and its Signal says so; a zero that is known is a signal too.
type View struct {
	Now time.Duration `json:"now_ns"` // never goes back from one View to the next

	Demand    Demand           `json:"demand"`
	Queues    [Stages]Queue    `json:"queues"` // by Stage
	Instances []Instance       `json:"instances"`
	Spare     map[string][]int `json:"spare"` // numbers of NPUs that nobody has, by node

	TTFT Attainment `json:"ttft"`
	TPOT Attainment `json:"tpot"`

	// Pending is set while a change is under way, whoever asked for it: nothing else is decided meanwhile.
	Pending bool `json:"pending"`
	// Failed are changes that failed lately: they are not tried again for a while.
	Failed []Failure `json:"failed,omitempty"`
	// Costs is what changes took lately, by action. What is not here is as Policy.Costs says.
	Costs map[Action]Cost `json:"costs,omitempty"`
}

// Demand is what has arrived at all gateways so far, refused or queued requests included: totals since some moment, which never
// become less. What a stage before lets through is no measure of demand, as it is throttled itself. A total that becomes less all
// the same (a gateway started anew and nobody has made up for it) is a beginning: nothing is concluded from the difference.
type Demand struct {
	Signal
	Requests float64 `json:"requests"`
	Pictures float64 `json:"pictures"`
	Visual   float64 `json:"visual_tokens"` // multimodal tokens of the pictures
	Prompt   float64 `json:"prompt_tokens"` // those of pictures included
	Output   float64 `json:"output_tokens"` // that the answers were expected to have when the requests arrived
}

// Queue is the state of a stage's queue.
type Queue struct {
	Signal
	Pending     int           `json:"pending"`     // messages that nobody has taken yet
	InWork      int           `json:"in_work"`     // taken and not acked: of decode, sequences that decode
	Redelivered int           `json:"redelivered"` // of those
	Oldest      time.Duration `json:"oldest_ns"`   // age of the oldest message; 0: there is none
	// Waiting is what waits for this stage before its queue: for encode, or prefill where a request has no pictures, requests
	// that wait at the entrance (admission).
	Waiting int `json:"waiting"`
}

// Instance is a running instance, or a standby.
type Instance struct {
	Signal
	ID    string `json:"id"`    // of the process
	Name  string `json:"name"`  // that it keeps over its processes; Changes name it so
	Node  string `json:"node"`  //
	Roles string `json:"roles"` // letters, as in a topology: E, EP, EPD; of a standby, those that it is promoted to
	NPUs  []int  `json:"npus"`  // on the node; a standby has none
	Ready bool   `json:"ready"` // it takes work; a standby: it can be promoted
	// Replica says that its process can be stopped and others like it started (trireme up, Kubernetes).
	Replica bool `json:"replica"`

	// Busy is the part of the time that its NPUs computed lately, 0 to 1.
	Busy float64 `json:"busy"`
	// Rate is the work done in a second in which one NPU of it computed for the stage, in Visual tokens, Prompt tokens, and
	// Output tokens, by Stage; 0: not known, as where it did none. Of an instance with several roles each has its own seconds.
	Rate [Stages]float64 `json:"rate"`
	// Steps are recent decoding steps, a handful of different batches, at most a few dozen.
	Steps []Step `json:"steps,omitempty"`
	// Batch is how many sequences decode on it now, on all of its NPUs.
	Batch   int     `json:"batch"`
	KV      float64 `json:"kv"`      // part of its KV memory in use, 0 to 1
	MM      float64 `json:"mm"`      // part of its memory for encoded pictures in use
	Balance float64 `json:"balance"` // of experts: the part of the time in which its NPUs do not wait for the busiest; 0: not known
	Planned float64 `json:"planned"` // Balance that a rebalance would reach; 0: not known
}

// Step is a decoding step as measured: with so many sequences on the NPU that had most it took so long.
type Step struct {
	Batch int           `json:"batch"`
	Took  time.Duration `json:"took_ns"`
}

// Has reports whether the instance has a role.
func (i *Instance) Has(s Stage) bool { return strings.Contains(i.Roles, s.Letter()) }

// Standby reports whether it has no NPUs, and waits to be promoted.
func (i *Instance) Standby() bool { return len(i.NPUs) == 0 }

// Attainment is which part of requests met a target over a sliding window, from their arrival: time in queues counts, and who was
// refused for want of room or time has missed it.
type Attainment struct {
	Signal
	Requests int     `json:"requests"` // in the window; 0: it says nothing
	Met      float64 `json:"met"`      // part of them
	// Quantile is the time at the policy's percentile.
	Quantile time.Duration `json:"quantile_ns"`
}

// Failure is a change that failed.
type Failure struct {
	Change Change        `json:"change"`
	Ago    time.Duration `json:"ago_ns"`
	Why    string        `json:"why"`
}
