// Package protocol is what the HMM daemon and its clients say to each other on the HMM's Unix socket: frames, messages
// and error codes. services/hmm/PROTOCOL.md tells it in prose. It opens no socket: shared/hbm is the client, services/hmm
// the daemon. Messages on NATS are another matter, see shared/wire.
package protocol

import (
	"time"

	"trireme.dev/shared/mem"
)

// Version is the version of the protocol. Both sides refuse another one; it is raised by every change that an older peer
// would misread.
const Version = 4

// Op names a request.
type Op uint8

// The requests, each with its body and the body of its reply.
const (
	OpHello   Op = iota + 1 // Hello, Welcome; the first and only the first
	OpAlloc                 // []Spec, []Grant
	OpAttach                // Attach, []Grant
	OpSeal                  // Seal, []mem.Handle
	OpKeep                  // Keep, nothing
	OpFree                  // []Object, nothing
	OpClaim                 // Claim, Claimed
	OpUnclaim               // Unclaim, nothing
	OpOrphans               // string (stage), []Orphan
	OpEnd                   // string (request), nothing
	OpStats                 // nothing, Stats
	OpBye                   // nothing, nothing; the client has unmapped everything and the connection ends

	OpFindMM      // FindMM, FoundMM
	OpPublishMM   // PublishMM, nothing
	OpAbandonMM   // AbandonMM, nothing
	OpCacheBlocks // CacheBlocks, nothing
	OpFindPrefix  // FindPrefix, Prefix
	OpForget      // []Object, nothing

)

// The requests about successors.
const (
	OpInherit   Op = iota + 29 // Inherit, nothing
	OpGone                     // string (stage), bool
	OpUnclaimed                // []Part, []Part
)

// The requests about NPUs.
const (
	OpJoin Op = iota + 32 // Join, []int: the NPUs granted
	OpPart                // Parting, nothing
	OpUse                 // bool, Use: of this client; true: Most begins anew
)

// More requests about the caches.
const (
	OpCountPrefix Op = 26 // FindPrefix, int
)

// The requests about memory domains.
const (
	OpCopied Op = 23 // []Copy, []mem.Handle
	OpLocate Op = 27 // Locate, Located
)

// MaxBatch is the most objects of one request; clients split larger ones.
const MaxBatch = 1024

// RoleGateway is the role that is given host memory only: it holds no NPU and maps no NPU's memory.
const RoleGateway = "gateway"

// Hello introduces a client.
type Hello struct {
	Version  int
	Instance string // instance id, unique among the running ones
	Role     string // gateway, encode, prefill, decode; several are joined by +
	NPUs     int    // NPUs wanted: those reserved for Name, then the lowest spare ones
	Name     string // stable name, which the instance that comes after this one has, too, and no other; "": none
	Want     []int  // the NPUs wanted, by number, and no others; NPUs is then 0 or how many they are
}

// Join asks for more NPUs, as Hello does for the first ones.
type Join struct {
	NPUs int
	Want []int
}

// Parting gives NPUs up.
type Parting struct {
	NPUs []int
	For  string // name of the instance that they stay reserved for; "": none
}

// Use is how much device memory a client has in use, in bytes of whole pages: what is booked to its NPUs, but for what only a cache keeps, and the
// weights that it holds in their memory domains.
type Use struct{ Now, Most int64 }

// Welcome answers Hello. Descriptors travel with it (SCM_RIGHTS): first the claim table's, then one a space.
type Welcome struct {
	Version int
	Node    string
	NPUs    []int   // granted: as wanted by number, or rising
	Slots   int     // words of the claim table
	Spaces  []Space // host memory, then the memory domains; the gateway gets the first only
	Domains []int   // of each NPU of the node: its memory domain, as an index of Spaces; empty for the gateway
	Board   bool    // the last descriptor is the board's, Slots words for Progress; not for the gateway
}

// Space describes one space of the node.
type Space struct {
	Page  int64 // bytes
	Bytes int64 // address room, which may exceed the memory behind it
}

// Ref names a request hold.
type Ref struct {
	Request string
	Attempt int
	Left    time.Duration // to the request's deadline
}

// Spec describes an object to allocate.
type Spec struct {
	Kind  mem.Kind
	NPU   int   // to book it to; mem.HostNPU for host memory
	Bytes int64 // of the content, at least 1
	Shape []int // of the content in elements of float32; nil for plain bytes
	Ref   Ref   // request hold from the start, beside the connection hold; zero: none
}

// Grant is an object that the client may map.
type Grant struct {
	Handle mem.Handle
	Extent mem.Extent
	Pulled bool // a new object, which the HMM has filled from another node's for this call
}

// Object names an object in the requests of one who holds it.
type Object struct {
	ID         uint64
	Generation uint64
}

// Attach asks for objects by handle, all or none.
type Attach struct {
	Access  mem.Access
	NPU     int // to book NPU memory to; negative: leave it
	Handles []mem.Handle
}

// Seal makes objects final and adds a request hold.
type Seal struct {
	Ref   Ref
	Items []Sealing
}

// Sealing is one object of Seal.
type Sealing struct {
	Object Object
	CRC    uint32 // CRC-32C of the content
}

// Keep adds a request hold.
type Keep struct {
	Ref     Ref
	Objects []Object
}

// Part names what a claim is for: one part of one stage of one attempt at a request.
type Part struct {
	Request string
	Attempt int
	Stage   string
	Part    int           // picture of encode, 0 of prefill, choice of decode
	Left    time.Duration // to the request's deadline; 0: not known
}

// Claim asks for the claim of a part. It always succeeds over an older claim.
type Claim struct {
	Part  Part
	Reply string // JetStream subject that acknowledges the message being worked on
}

// Claimed answers Claim: the claim is held while the word Slot of the claim table reads Generation.
type Claimed struct {
	Generation uint64
	Slot       int
	Log        *mem.Handle // token log of the part's last writer, as Inherit named it; nil: there was none
	// Strikes is how many claimants in a row have died while they ran the part and came no further than Reached, which is how far
	// anyone has come at this attempt.
	Strikes int
	Reached uint32
}

// Inherit makes the claimant of a part the writer of its sequence. Keep[0] is the sequence's token log from now on.
type Inherit struct {
	Part       Part
	Generation uint64
	Keep       []Object // get the request hold; the client holds them
	Drop       []Object // lose it
}

// Unclaim gives a claim up.
type Unclaim struct {
	Part       Part
	Generation uint64
}

// Orphan is a claim whose claimant's connection has ended.
type Orphan struct {
	Part       Part
	Generation uint64
	Reply      string
}

// Stats is the state of a node's memory. Bytes everywhere.
type Stats struct {
	Node        string     `json:"node"`
	Memory      []NPUStats `json:"memory"`   // host memory (NPU -1), then the NPUs
	Cached      int64      `json:"cached"`   // freed, kept to be used again
	Objects     int        `json:"objects"`  // other than weights
	Holds       int        `json:"holds"`    // objects x holders, connections and requests
	Requests    int        `json:"requests"` // known and not ended
	Ended       int        `json:"ended"`    // ended and remembered
	Claims      int        `json:"claims"`
	Orphans     int        `json:"orphans"` // of the claims
	Connections int        `json:"connections"`

	Resting      int `json:"resting"`       // of the objects: nobody holds them, a cache keeps them
	CachedMM     int `json:"cached_mm"`     // MM objects in the cache, resting or held
	CachedBlocks int `json:"cached_blocks"` // KV blocks in the prefix index

	Peer   string `json:"peer,omitempty"` // where the HMM serves objects to those of other nodes
	Copied int64  `json:"copied"`         // bytes of objects that clients have copied between memory domains since the HMM started

	Spaces []SpaceStats `json:"spaces"` // host memory, then the memory domains

	Shared  []NPUStats     `json:"shared"`  // of each memory domain: what its NPUs share (NPU mem.Shared)
	Weights []WeightsStats `json:"weights"` // sets, by key and domain
}

// SpaceStats is the part of Stats about one space: the memory behind the accounts of those whose memory lies there.
type SpaceStats struct {
	Name     string `json:"name"`     // of its memory file, as /proc shows it
	Booked   int64  `json:"booked"`   // Used + Padded of all accounts
	Kept     int64  `json:"kept"`     // freed, kept to be used again, or taken from the system ahead
	Unready  int64  `json:"unready"`  // to be taken ahead, and not yet there
	Resident int64  `json:"resident"` // what the system says that the file takes: Booked + Kept while nobody allocates or frees
}

// NPUStats is the part of Stats about the memory booked to one NPU.
type NPUStats struct {
	NPU      int              `json:"npu"`
	Instance string           `json:"instance,omitempty"` // whom the NPU is granted to
	Name     string           `json:"name,omitempty"`     // its stable name
	Reserved string           `json:"reserved,omitempty"` // nobody has the NPU, which is kept for an instance of this name
	Capacity int64            `json:"capacity"`
	Free     int64            `json:"free"` // Capacity - Used - Padded; who needs room is given what is Cached besides
	Usage                     // of all kinds
	Kinds    map[string]Usage `json:"kinds"`
}

// Usage is memory in use.
type Usage struct {
	Used   int64 `json:"used"`   // content
	Padded int64 `json:"padded"` // lost to whole pages
	Peak   int64 `json:"peak"`   // most of Used + Padded so far
	Cached int64 `json:"cached"` // of Used + Padded: only a cache keeps it, so it is given to whoever needs room
}
