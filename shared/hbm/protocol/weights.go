package protocol

import "time"

// The requests about weights, each with its body and the body of its reply.
const (
	OpOpenWeights  Op = iota + 19 // OpenWeights, OpenedWeights
	OpPlaceWeights                // PlaceWeights, []Grant
	OpSealWeights                 // SealWeights, nothing
	OpCloseWeights                // CloseWeights, nothing
)

// OpenWeights asks for the weight set of a key in the memory domain of an NPU, or for the right to make it. A set is a
// list of objects of fixed sizes in a fixed order; the key names model and layout.
type OpenWeights struct {
	Key     Key
	NPU     int
	Objects int           // of the whole set
	Bytes   int64         // of their content together
	Wait    time.Duration // for another one who makes it
}

// OpenedWeights answers OpenWeights. The client then has a hold on the set, but for Set 0: another one makes it still.
type OpenedWeights struct {
	Set    uint64 // names the set for this connection; 0: see Loaded
	Make   bool   // the client has to make the objects from Sealed on
	Sealed int    // objects that are final, from the first; all of them unless Make or Set is 0
	Loaded int64  // bytes of content that are final
}

// PlaceWeights asks where objects of a set lie whose sizes the client knows. The maker is given memory for those that are
// not there yet, and gets all for writing that are not final; others see final ones only.
type PlaceWeights struct {
	Set   uint64
	First int     // number of the first object
	Sizes []int64 // bytes of content
}

// SealWeights makes the next objects of a set final. With the last one the set is made.
type SealWeights struct {
	Set   uint64
	First int      // number of the first object: as many as are final
	CRCs  []uint32 // CRC-32C of each one's content
}

// CloseWeights ends a hold on a set, and the making of it.
type CloseWeights struct {
	Set   uint64
	Wrong bool // its content was found to be wrong: whoever opens it next makes it anew
}

// WeightsStats is the part of Stats about one weight set.
type WeightsStats struct {
	Key     string `json:"key"`    // hexadecimal
	Domain  int    `json:"domain"` // space of its memory domain
	Objects int    `json:"objects"`
	Bytes   int64  `json:"bytes"`
	Loaded  int64  `json:"loaded"` // of Bytes: final
	Holders int    `json:"holders"`
}
