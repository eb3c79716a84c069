package wire

import (
	"encoding/base64"
	"strconv"
	"time"
)

// Dead letters: the stream of what is known of requests that failed for good, one subject a letter, and the object store with
// the requests themselves. Both are made with the first letter.
const (
	StreamDead = "TRIREME_DEAD"
	BucketDead = "trireme_dead"
)

// Reasons why a request is a dead letter.
const (
	DeadQuarantined = "quarantined" // instances died while they ran it, again and again
	DeadAttempts    = "attempts"    // all attempts were lost
	DeadFault       = "fault"       // a stage cannot run it, and that is not the client's fault
)

// HeaderReplayOf is the HTTP header of a request that is made from a dead letter: the letter's id.
const HeaderReplayOf = "X-Trireme-Replay-Of"

// CodeQuarantined is the error code of a request that was quarantined, in Lost and for the client.
const CodeQuarantined = "request_quarantined"

// DeadLetter is what is known of a request that failed for good and not by its client's fault. It is stored as JSON, so that the tools
// of NATS show it, too.
type DeadLetter struct {
	ID     string    `json:"id"` // letters and digits that sort by time
	Time   time.Time `json:"time"`
	Reason string    `json:"reason"`

	Trace    string `json:"trace"`   // X-Request-Id of the HTTP request
	Request  string `json:"request"` // id of the request inside, which is the answer's behind its chatcmpl- or cmpl-
	Tenant   string `json:"tenant,omitempty"`
	Class    string `json:"class,omitempty"`
	Model    string `json:"model"`
	Gateway  string `json:"gateway"`
	Stage    string `json:"stage,omitempty"` // that told the last failure; "": none did
	Attempts int    `json:"attempts"`
	Status   int    `json:"status"` // what the client was told
	Code     string `json:"code,omitempty"`
	Error    string `json:"error"`
	ReplayOf string `json:"replay_of,omitempty"` // the dead letter that the request was made from

	Path         string `json:"path"`           // of the HTTP request
	PromptTokens int    `json:"prompt_tokens"`  // of all prompts
	Pictures     int    `json:"pictures"`       // in them
	Stream       bool   `json:"stream"`         // the client wanted the answer as a stream
	Seed         int64  `json:"seed,omitempty"` // that was drawn because the request names none, as a request would name it; 0: it does, or has several prompts

	Headers map[string]string `json:"headers,omitempty"` // of the request, that have a meaning for the gateway
	Body    int64             `json:"body"`              // bytes of the request's body, kept in an object; 0: it is not kept
	Fetched []DeadPicture     `json:"fetched,omitempty"` // pictures that the body names by http: and https: URLs, in the order of their first mention
	Missing string            `json:"missing,omitempty"` // why the request itself is not kept
}

// DeadPicture is a picture that was fetched for a request, kept in an object.
type DeadPicture struct {
	URL   string `json:"url"` // its beginning
	Bytes int64  `json:"bytes"`
}

// SubjectDead is where a tenant's dead letter is stored; * stands for any tenant or letter.
func SubjectDead(tenant, id string) string { return "trireme.dead." + tenant + "." + id }

// DeadTenant is a tenant's name in subjects and object names.
func DeadTenant(tenant string) string {
	return "t" + base64.RawURLEncoding.EncodeToString([]byte(tenant))
}

// DeadBody names the object with the body of a dead letter's request.
func DeadBody(l *DeadLetter) string { return deadObjects(l) + "body" }

// DeadFetched names the object with the nth picture of Fetched.
func DeadFetched(l *DeadLetter, n int) string { return deadObjects(l) + "picture-" + strconv.Itoa(n) }

func deadObjects(l *DeadLetter) string { return DeadTenant(l.Tenant) + "/" + l.ID + "/" }
