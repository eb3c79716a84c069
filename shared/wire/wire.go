// Package wire holds what services say to each other: message structs (msgpack), subject names and versions. It knows
// no transport (shared/bus does) and no memory (handles are values of shared/mem).
//
// Every message is at most MaxMessage bytes. Messages are msgpack arrays in field order: a field is only ever added at
// the end, and Version is raised when a meaning changes.
package wire

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/vmihailenco/msgpack/v5"

	"trireme.dev/shared/mem"
	"trireme.dev/shared/wellformed"
)

// Version is the version of all messages; a receiver refuses others with ErrVersion.
const Version = 1

// MaxMessage is the most bytes that one message on NATS may have (DESIGN.md, path of a request).
const MaxMessage = 64 << 10

// MaxInline is the most bytes of an encoded Spec that travel inside messages; larger ones go by handle.
const MaxInline = 16 << 10

// Sentinel errors of Marshal and Unmarshal.
var (
	// ErrTooLarge is returned by Marshal for a message over MaxMessage.
	ErrTooLarge = errors.New("message is over 64 KiB")
	// ErrVersion is returned by Unmarshal for a message of another version.
	ErrVersion = errors.New("message has an unknown version")
	// ErrMalformed is returned by Unmarshal for bytes that are no such message.
	ErrMalformed = errors.New("malformed message")
)

// Request names a try at a request on every message about it.
type Request struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	ID      string        // 22 letters and digits, made by the gateway
	Attempt int           // tries made by the gateway, from 1
	Gateway string        // instance id of the gateway that owns it
	Left    time.Duration // time to the request's deadline when the message was published; never a wall clock
}

// Picture is one picture of a prompt.
type Picture struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Offset  int      // index in Spec.Prompt of the first of its placeholder tokens
	Grid    [3]int   // patches: frames, rows, columns
	Content [32]byte // SHA-256 of the encoded picture bytes
}

// Spec is what the stages need to know of a request; it is the same for all stages and attempts but for Resume.
type Spec struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Model    [32]byte // model.Config.Digest; a stage with another model refuses the request
	Prompt   []int32  // token ids, picture placeholders expanded
	Pictures []Picture
	Sampling Sampling
	Choices  int       // n: parts numbered 0 to Choices-1
	Resume   [][]int32 // by choice: tokens that the client already has, of an earlier attempt; nil at the first
	Salt     string    // of the tenant (cache_salt): caches are shared under the same salt only
}

// Sampling holds the parameters of generation, defaults already filled in by the gateway.
type Sampling struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	MaxTokens   int     // tokens to generate at most, of each choice
	MinTokens   int     // stop ids are not sampled before this many
	Temperature float32 // 0: greedy
	TopP        float32 // 1: off
	TopK        int     // 0: off
	MinP        float32 // 0: off
	Seed        uint64
	Presence    float32
	Frequency   float32
	Repetition  float32 // 1: off
	Stop        []int32 // ids that end a choice: eos ids (unless ignored) and stop_token_ids
	Logprobs    int     // alternatives reported beside each token; -1: no logprobs at all
}

// Encode asks an encoder for one picture's MM object. Published by the gateway to SubjectEncode.
type Encode struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Request Request
	Part    int        // index of the picture; the bit in the join record
	Pixels  mem.Handle // encoded picture bytes
	Grid    [3]int
	Content [32]byte
	Model   [32]byte
	Salt    string // see Spec
}

// Prefill asks a prefill instance to compute a prompt. Published by the gateway (text only), or by the encoder that
// sees the join record complete, to SubjectPrefill.
type Prefill struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Request Request
	Inline  []byte       // encoded Spec when at most MaxInline bytes
	Spec    *mem.Handle  // else the object that holds it
	MM      []mem.Handle // one MM object a picture, in order
	Hits    int          // of MM: taken from the cache
	Place   Place
}

// Place is what puts a request in order among others that a stage has taken (sched.Item).
type Place struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Tenant   string
	Weight   float64 // of the tenant; 0 is 1
	Priority int     // lower ones go first
	// Waited is how long ago the client's request had come when the message was published, and Left the time left then until
	// its first token was due, below 0 when it was late; only with Target.
	Waited time.Duration
	Target bool
	Left   time.Duration
}

// After is the place when some time has passed.
func (p Place) After(d time.Duration) Place {
	p.Waited += d
	p.Left -= d
	return p
}

// Join is the value of the join record of a request and attempt in BucketJoin: made by the gateway before it publishes
// the Encode messages, updated by compare-and-set.
type Join struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Prefill Prefill // what to publish once all are there; MM filled in by the encoders
	Have    []bool  // by picture
}

// Complete reports whether all pictures are encoded.
func (j *Join) Complete() bool {
	for _, ok := range j.Have {
		if !ok {
			return false
		}
	}
	return true
}

// Decode asks a decoder to go on with one choice from its KV and token log. Published by prefill to SubjectDecode.
type Decode struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Request  Request
	Choice   int
	Inline   []byte      // see Prefill
	Spec     *mem.Handle // see Prefill
	Log      mem.Handle  // token log; names the KV slabs
	RopeBase int         // M-RoPE position delta: position of token i is i + RopeBase
}

// Tokens carries new tokens of one or more choices of one gateway: one message a decode step. Core NATS, SubjectTokens.
type Tokens struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Instance string // sender, for Resend
	Items    []Run
}

// Run is a piece of one choice's answer. The gateway takes only the next index of a choice, and drops lower ones and,
// among runs with a generation, those older than one it has taken.
type Run struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Request    string
	Attempt    int
	Choice     int
	Generation uint64 // decode claim of the writer; 0 in the first token, which prefill sends under a claim of its own
	Index      int    // of IDs[0] in the answer, from 0
	IDs        []int32
	Logprobs   []Logprob // by token; nil when not asked for
	Finish     Finish    // set with the last token
	Cached     int       // prompt tokens taken from the prefix cache; set with index 0
	Computed   int       // prompt tokens computed; set with index 0
	Pictures   int       // pictures of the prompt that were looked for in the MM cache; set with index 0
	Hits       int       // of Pictures: not encoded for this request; set with index 0
}

// Logprob is a token's log probability under the raw logits and its best alternatives.
type Logprob struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Own float32
	IDs []int32 // falling probability
	Top []float32
}

// Finish says why a choice ended.
type Finish uint8

// Why a choice ended; FinishNone while it goes on. Stop strings are matched by the gateway and are not among these.
const (
	FinishNone   Finish = iota
	FinishStop          // a stop id was sampled; it is the last token
	FinishLength        // MaxTokens or the context was reached
)

// Confirm asks a gateway which tokens of a choice it has: request/reply on SubjectConfirm. A decoder sends it when half
// its window is unconfirmed and, with Finish set, until the end is confirmed.
type Confirm struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Instance   string
	Request    string
	Attempt    int
	Choice     int
	Generation uint64
	Next       int // index after the last token sent
	Finish     Finish
}

// Confirmed is the answer to Confirm.
type Confirmed struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Next int  // index after the last token that the gateway has in order; the sender publishes from here again when lower
	Over bool // the gateway needs no more of this choice: finished, stopped by a string, cancelled, or unknown to it
	// Ended says that the gateway does not have the request any more. Who asks may be the only one on its node that knows of
	// the request: an HMM that has started since has not heard of the end.
	Ended bool
}

// Resend asks an instance to publish tokens again from its log: SubjectResend, sent by a gateway that sees a gap.
type Resend struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Request string
	Choice  int
	From    int
}

// Lost tells a gateway that an attempt cannot go on (bytes missing or wrong): SubjectLost. The gateway answers with an empty
// Confirmed, before which the stage does not ack. Final means that another
// attempt would end the same way, and Why is then for the client.
type Lost struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Request string
	Attempt int
	Why     string
	Final   bool
	Status  int    // HTTP status for the client when Final: 400 for a picture that cannot be decoded, else 500
	Param   string // what is at fault, if the stage can tell: a request parameter or a PictureParam
	NoRoom  bool   // nothing is wrong but that device memory ran out: the attempt gave its place to others
	Stage   string // that tells it
	Code    string // when Final: what is wrong, for programs; "" when Status says enough
}

// PictureParam is the Lost.Param for picture n of Spec.Pictures: a stage does not know how the client's request named it.
func PictureParam(n int) string { return fmt.Sprintf("pictures[%d]", n) }

// Done tells every HMM and stage that a request needs nothing any more: finished, failed or cancelled. SubjectDone.
type Done struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Request string
	Choice  int // the one choice that ended early (a stop string matched), or -1 for the whole request
	Attempt int // the last attempt that it is about: later ones go on; 0: all attempts
}

// Covers reports whether the event ends an attempt at its request, or at its choice.
func (m *Done) Covers(attempt int) bool { return m.Attempt == 0 || attempt <= m.Attempt }

// Gone tells that an instance's connection to its HMM ended. SubjectGone.
type Gone struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Node, Instance, Role string // Role as the instance has named itself: see Roles
}

// RoleSeparator joins the roles of an instance that has several, as in prefill+decode.
const RoleSeparator = "+"

// Roles takes the role of an instance apart.
func Roles(role string) []string { return strings.Split(role, RoleSeparator) }

// HasRole reports whether a role is among those of an instance.
func HasRole(of, role string) bool { return slices.Contains(Roles(of), role) }

// Instance is the heartbeat of one running stage process in BucketInstances, as JSON so that operators can read it.
type Instance struct {
	ID      string `json:"id"`
	Name    string `json:"name,omitempty"` // that its successor will have, too, when it is started again
	Role    string `json:"role"`           // gateway, encode, prefill, decode; of several, joined: see Roles
	Node    string `json:"node"`
	PID     int    `json:"pid"`
	NPUs    []int  `json:"npus"`
	Epoch   uint64 `json:"epoch,omitempty"`   // of its layout (Layout)
	Ready   bool   `json:"ready"`             // takes work, or, as a standby, NPUs
	Standby bool   `json:"standby,omitempty"` // a stage without NPUs: it takes no work
	Model   string `json:"model,omitempty"`
	Digest  string `json:"digest,omitempty"` // hex of model.Config.Digest
	Kernels string `json:"kernels,omitempty"`
	Running int    `json:"running"`           // requests or sequences in work
	Metrics string `json:"metrics,omitempty"` // address of its /metrics, if any

	Changing string `json:"changing,omitempty"` // id of the operation that is changing it (Change)

	Waiting map[string]int `json:"waiting,omitempty"` // of a gateway: requests waiting for capacity, by class
	Paced   string         `json:"paced,omitempty"`   // profile that its NPUs are slowed down to (shared/npu/pace): its figures are that one's

	// Of a paced instance, seconds so far: what the profile has asked for, and by how much the host was too slow for that. Busy /
	// (Busy + Behind) is the part of the profile's rate that was achieved.
	Busy   float64 `json:"paced_busy_s,omitempty"`
	Behind float64 `json:"paced_behind_s,omitempty"`
}

// Marshal encodes a message with its version in front.
func Marshal(m any) ([]byte, error) {
	b, err := encode(m)
	if err != nil {
		return nil, err
	}
	if len(b) > MaxMessage {
		return nil, fmt.Errorf("encoding %T of %d bytes: %w", m, len(b), ErrTooLarge)
	}
	return b, nil
}

// MarshalSpec encodes a Spec of any size: over MaxInline it goes into an object of kind spec, where no message limit
// holds. Unmarshal reads it.
func MarshalSpec(s *Spec) ([]byte, error) { return encode(s) }

func encode(m any) ([]byte, error) {
	b, err := msgpack.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encoding %T: %w", m, err)
	}
	return append([]byte{Version}, b...), nil
}

// Unmarshal decodes a message made by Marshal into m, a pointer. It never panics on bad bytes.
func Unmarshal(data []byte, m any) error {
	if len(data) == 0 {
		return fmt.Errorf("decoding %T: empty: %w", m, ErrMalformed)
	}
	if data[0] != Version {
		return fmt.Errorf("decoding %T: version %d, this program speaks %d: %w", m, data[0], Version, ErrVersion)
	}
	// An element takes a byte at least, so the message's length bounds what its arrays may promise.
	if err := wellformed.Msgpack(data[1:], len(data)); err != nil {
		return fmt.Errorf("decoding %T: %w: %w", m, ErrMalformed, err)
	}
	if err := msgpack.Unmarshal(data[1:], m); err != nil {
		return fmt.Errorf("decoding %T: %w: %w", m, ErrMalformed, err)
	}
	return nil
}
