package autoscale

import (
	"errors"
	"time"
)

// ErrPolicy is wrapped by errors of policies that cannot be used.
var ErrPolicy = errors.New("invalid policy of the scaler")

// Mode is what becomes of decisions.
type Mode string

// The modes.
const (
	Off    Mode = "off"    // none are made
	Advise Mode = "advise" // they are told
	Auto   Mode = "auto"   // they are told and done
)

// Policy is what the operator wants. Default has the values of what is left out; Parse reads a file.
type Policy struct {
	Mode    Mode
	Targets Targets
	Budget  int            // most NPUs that instances have together; 0: as many as there are
	Bounds  [Stages]Bounds // by Stage
	Actions []Action       // that are allowed

	// Utilisation is the wanted part of the time that the NPUs of a stage compute, above 0 and at most 1, where two of them encode or
	// prefill; with more chance evens out, and they are sized to compute more of the time (see staff). Of decode it is the part of the
	// largest batch.
	Utilisation [Stages]float64
	Band        float64       // so far above and below what is wanted nothing is done, as a part of it
	Drain       time.Duration // in which a backlog should be done away with
	Grow        Direction
	Shrink      Direction
	Stale       time.Duration // signals that are older are as if they were missing
	Retry       time.Duration // until what has failed is tried again
	Weights     Weights
	Costs       map[Action]Cost // what changes take where it was not measured lately
}

// Targets are what requests should meet, and how many of them.
type Targets struct {
	TTFT       time.Duration // from arrival to the first token
	TPOT       time.Duration // between tokens, on average over an answer
	Percentile float64       // of requests that should: 90 is nine of ten
}

// Bounds are the least and most NPUs that have a stage's role.
type Bounds struct{ Min, Max int } // Max 0: no bound

// Direction says when more, or fewer, NPUs are given to a stage.
type Direction struct {
	Window   time.Duration // the need has to be above (below) for all of it
	Cooldown time.Duration // since the last change
}

// Weights say what is worth what in a Score.
type Weights struct {
	NPU    float64 // an NPU in use
	Late   float64 // an NPU that is wanting
	Change float64 // a second until a change has its effect
}

// Default is the policy of an empty file.
func Default() Policy {
	return Policy{
		Mode:        Advise,
		Targets:     Targets{TTFT: 2 * time.Second, TPOT: 100 * time.Millisecond, Percentile: 90},
		Bounds:      [Stages]Bounds{{Min: 1}, {Min: 1}, {Min: 1}},
		Actions:     append([]Action(nil), Actions...),
		Utilisation: [Stages]float64{0.8, 0.8, 0.8},
		Band:        0.15,
		Drain:       5 * time.Second,
		Grow:        Direction{Window: 2 * time.Second, Cooldown: 2 * time.Second},
		Shrink:      Direction{Window: time.Minute, Cooldown: 15 * time.Second},
		Stale:       1500 * time.Millisecond, // signals come once a second, and half as long on their way
		Retry:       time.Minute,
		Weights:     Weights{NPU: 1, Late: 10, Change: 0.05},
		Costs: map[Action]Cost{
			Widen: {Time: 2 * time.Second}, Narrow: {Time: 2 * time.Second}, Move: {Time: 3 * time.Second}, Promote: {Time: 2 * time.Second},
			Add: {Time: 15 * time.Second}, Remove: {Time: 5 * time.Second}, Rebalance: {Time: 3 * time.Second},
		},
	}
}
