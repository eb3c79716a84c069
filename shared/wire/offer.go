package wire

import "time"

// Offer asks an instance of the same stage whether it takes a message that the sender has taken off the queue and not claimed:
// request/reply on SubjectOffer. Who takes it settles it, under the same acknowledgement subject, and the sender forgets it.
type Offer struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Instance string // sender
	Stage    string // whose queue it is from
	Data     []byte // the message
	Reply    string // its acknowledgement subject

	// The bounds within which it is better off there.
	Wait   time.Duration // of a prompt: for what is to be computed before it
	Tokens int           // of a prompt: to be computed
	Level  int           // of a sequence: at which the instance may ask for others
}

// Offered answers Offer. An offer that is not answered may have been taken all the same.
type Offered struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Taken bool
}

// Reach asks the HMMs of all nodes how much of a prompt is cached with them: request/reply on SubjectReach, each answers.
type Reach struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Role string   // of the instances that could compute it; a node without one does not count
	Keys [][]byte // of blocks, 32 bytes each, in the prompt's order; not all of its blocks need be among them
}

// Reached answers Reach.
type Reached struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Node  string
	Count int // of the first keys
}
