package wire

import "time"

// SubjectStats is where every gateway and stage answers with its Stats: request/reply, to any message. What is counted is counted since
// the process began, so that whoever asks twice knows what has happened between, and misses nothing when an answer is lost.
const SubjectStats = "trireme.stats"

// Stats is what a gateway or a stage instance says of its work. HMMs say who has which memory (SubjectHMM), JetStream what waits.
type Stats struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Instance string      `json:"instance"`
	Role     string      `json:"role"`
	Node     string      `json:"node"`
	Demand   *Demand     `json:"demand,omitempty"` // of a gateway
	Work     *StageStats `json:"work,omitempty"`   // of a stage
}

// Demand is what clients ask of a gateway, and what they get.
type Demand struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	// Counted since the gateway began, when a request has come and its size is known, whether it is let in or not.
	Requests      uint64 `json:"requests"` // prompts: an HTTP request may have several
	Pictured      uint64 `json:"pictured"` // of them, with pictures
	Pictures      uint64 `json:"pictures"`
	PictureTokens uint64 `json:"picture_tokens"`
	PromptTokens  uint64 `json:"prompt_tokens"` // those of pictures included
	Refused       uint64 `json:"refused"`       // for want of capacity
	// Counted when it happens.
	Computed uint64 `json:"computed_tokens"` // prompt tokens that prefill computed
	Cached   uint64 `json:"cached_tokens"`   // prompt tokens taken from a cache
	Output   uint64 `json:"output_tokens"`
	Ended    uint64 `json:"ended"`           // answers that ended well
	Lengths  uint64 `json:"ended_tokens"`    // their tokens
	Expected uint64 `json:"expected_tokens"` // of output, when the requests came: as long as answers were lately, if they may be
	MMHits   uint64 `json:"mm_hits"`         // pictures that need not be encoded
	MMAsked  uint64 `json:"mm_queries"`      // pictures looked for

	// Now.
	Open     int           `json:"open"`      // requests that have not ended, waiting ones included
	Waiting  int           `json:"waiting"`   // for capacity
	Awaiting int           `json:"awaiting"`  // their first token, waiting ones included
	Oldest   time.Duration `json:"oldest_ns"` // how long the one of these that came first has been awaiting

	Window  time.Duration `json:"window_ns"` // of the latencies
	Classes []ClassStats  `json:"classes"`   // those of which there was a request in the window
}

// ClassStats are the latencies of one class of requests in the window, from the client's request on: time in the queue counts.
type ClassStats struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Class string  `json:"class"`
	TTFT  Latency `json:"ttft"`
	TPOT  Latency `json:"tpot"`
}

// Latency is how long something took, of requests in a window.
type Latency struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Sketch  []byte `json:"sketch"`  // of seconds (shared/obs/quantile); nil: nothing happened
	Judged  uint64 `json:"judged"`  // of them, those that had a target
	Met     uint64 `json:"met"`     // of those
	Refused uint64 `json:"refused"` // requests that were not let in, of TTFT only; they are in none of the above
	// Overdue are requests that have no first token yet although their target has passed, or, without a target, have none for longer
	// than the Window; of TTFT only. They are not in Sketch, Judged and Met.
	Overdue int `json:"overdue"`
}

// StageStats is the work of a stage instance. Times and counts are since the process began.
type StageStats struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Busy    time.Duration `json:"busy_ns"` // its NPUs were computing, together
	Roles   []RoleStats   `json:"roles"`
	NPUs    []NPUWork     `json:"npus"`         // by slot, without holes
	Balance float64       `json:"balance"`      // of experts, of the load of the last minutes: see ChangePlan; 1 where there are none
	Rows    uint64        `json:"balance_rows"` // that it is of; 0: there was no load

	// Of a paced instance, as in Instance, but now.
	PacedBusy   time.Duration `json:"paced_busy_ns,omitempty"`
	PacedBehind time.Duration `json:"paced_behind_ns,omitempty"`
}

// RoleStats is the work of one role of an instance. A step in which several roles have part counts for each.
type RoleStats struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Role   string        `json:"role"`
	InWork int           `json:"in_work"`  // messages
	Room   int           `json:"room"`     // messages in work at once, at most
	Done   uint64        `json:"done"`     // messages settled, however they ended
	Steps  uint64        `json:"steps"`    // forward passes; of encode: pictures
	Spent  time.Duration `json:"spent_ns"` // in them
	Rows   uint64        `json:"rows"`     // tokens computed; of encode: multimodal tokens made
}

// NPUWork is what one NPU of an instance was computing.
type NPUWork struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	NPU  int           `json:"npu"` // on the node
	Busy time.Duration `json:"busy_ns"`
}
