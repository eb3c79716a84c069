package wire

// SubjectReplicas is where whoever starts the processes of a node (`trireme up`) answers Replicas.
func SubjectReplicas(node string) string { return "trireme.node." + node + ".replicas" }

// Replicas asks for so many instances with certain roles on a node: request/reply on SubjectReplicas, answered with a ReplicasReport
// at once. That new ones are ready and old ones have gone their heartbeats tell.
type Replicas struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Roles string // letters, as in a topology: E, EP, EPD
	Count int
	Check bool // only say what would be done

	// Instead of Count, which depends on how many there are: so many more, and those of certain names to end.
	Start int
	Stop  []string
	NPUs  int // of each new one; 0: as those that there are

	// ID, if not empty, makes asking again harmless: who has done what was asked for under one lately does not do it twice, and answers
	// as it has then.
	ID    string
	Fence uint64 // of the scaler that asks, see Fence; 0: an operator asks
}

// ReplicasReport says which instances there are then.
type ReplicasReport struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Instances []string `json:"instances"`       // names of all that have the roles
	Started   []string `json:"started"`         // of them
	Stopped   []string `json:"stopped"`         // that hand over what they have in work, and end
	NPUs      int      `json:"npus"`            // that each new one has
	Why       string   `json:"why,omitempty"`   // nothing was done, and what to do
	Again     bool     `json:"again,omitempty"` // it was done before, under the same ID
	Fence     uint64   `json:"fence,omitempty"` // of what was refused for an older one: the newest that was seen

	// Of a Check that starts any: bytes of weights of each, and how many memory domains of the node have to get for all of them, at most.
	Weights int64 `json:"weights_bytes,omitempty"`
	Fresh   int64 `json:"fresh_bytes,omitempty"`
}
