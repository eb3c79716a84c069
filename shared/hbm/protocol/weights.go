package protocol

import "time"

// The requests about weights, each with its body and the body of its reply. What they give is freed and forgotten as all objects are.
const (
	OpWeights     Op = iota + 19 // Weights, []Placed
	OpSealWeights                // []Sealing, nothing
)

// Weights asks for objects of the weight set of a key in the memory domain of an NPU, or for the right to make them. A set is a list
// of objects of fixed sizes, of which a domain has some; the key names model and layout.
type Weights struct {
	Key     Key
	NPU     int
	Numbers []int   // of the objects, rising
	Sizes   []int64 // bytes of content of each
	Most    int64   // bytes to be given for making: at least one object, unless 0
	Need    int64   // bytes that the client will ask for in all, to be told at once that there is no room; 0: not told
	Wait    time.Duration
}

// States of an object in the reply to Weights.
const (
	PlacedNot   = iota // another client makes it still, or it is more than Most
	PlacedFinal        // it has its content
	PlacedMake         // this client has to make it
)

// Placed is an object of the reply to Weights. The client has a hold on what it is given.
type Placed struct {
	State  int
	Grant  *Grant // nil: not given
	Source *Grant // of one to be made: the same object of another memory domain, to be copied; the client frees it. nil: there is none
	Check  bool   // of a final one: who made it has given up others since, so whoever uses it compares it with its checksum
}

// WeightsStats is the part of Stats about what a memory domain has of a weight set.
type WeightsStats struct {
	Key     string `json:"key"`     // hexadecimal
	Domain  int    `json:"domain"`  // space of its memory domain
	Objects int    `json:"objects"` // that have memory there
	Bytes   int64  `json:"bytes"`   // their content
	Loaded  int64  `json:"loaded"`  // of Bytes: final
	Wanted  int64  `json:"wanted"`  // the most that one client has asked for in all
	Holders int    `json:"holders"` // clients that hold any
}
