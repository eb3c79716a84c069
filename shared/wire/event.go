package wire

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

// StreamEvents keeps what has happened to the system, for operators: an Event a message, as JSON, on a subject of its kind.
const StreamEvents = "TRIREME_EVENTS"

// Kinds of events. The part before the dot is a group that can be asked for.
const (
	EventReady    = "instance.ready"   // an instance takes work
	EventStandby  = "instance.standby" // an instance has no NPUs and stands by
	EventStopped  = "instance.stopped" // it ends because it was told to; its work is done or handed over
	EventGone     = "instance.gone"    // its connection to its HMM has ended; without a stop before it, it has died
	EventFailed   = "instance.failed"  // it ends by itself, because it cannot go on
	EventReached  = "nats.reached"     // an instance is connected to NATS again
	EventDead     = "request.dead"     // a request has failed for good and is kept as a dead letter
	EventHMMReady = "hmm.ready"        // a node's device memory can be used; what was in it before is lost
)

// Kinds of events of the scaler. Their data is in services/scaler/explain.
const (
	EventScalerDecision = "scaler.decision" // a change of the fleet was chosen, to be made or as advice
	EventScalerOutcome  = "scaler.outcome"  // what became of one that was to be made: when it has ended, and measured later
	EventScalerPolicy   = "scaler.policy"   // another policy is in force, or one that cannot be used was refused
	EventScalerLead     = "scaler.lead"     // of several scalers this one acts now
)

// Event is something that has happened to the system. Events are for people and for tools that explain what was done; nothing
// that serves requests depends on one. They are sent without waiting and may be lost.
type Event struct {
	Kind     string          `json:"kind"`
	Time     time.Time       `json:"time"`               // when NATS has stored it, by the clock of its server; set by the reader
	Sequence uint64          `json:"sequence"`           // of the stream; set by the reader
	Node     string          `json:"node,omitempty"`     // what it is about
	Instance string          `json:"instance,omitempty"` // "
	Role     string          `json:"role,omitempty"`     // of the instance
	Request  string          `json:"request,omitempty"`  // "
	Text     string          `json:"text"`               // for people: one sentence without the names above
	Data     json.RawMessage `json:"data,omitempty"`     // what tools want to know beside; its shape is the kind's
}

// Message is the subject and the content that an event is published with. It fails for one that is over MaxMessage.
func (e *Event) Message() (subject string, data []byte, err error) {
	data, err = json.Marshal(e)
	if err == nil && len(data) > MaxMessage {
		err = fmt.Errorf("of %d bytes: %w", len(data), ErrTooLarge)
	}
	if err != nil {
		return "", nil, fmt.Errorf("encoding an event %s: %w", e.Kind, err)
	}
	return EventSubjects(e.Kind), data, nil
}

// EventSubjects covers the events of a kind (instance.ready), of a group (instance), or all ("").
func EventSubjects(kind string) string {
	switch {
	case kind == "":
		return "trireme.event.>"
	case !strings.Contains(kind, "."):
		return "trireme.event." + kind + ".>"
	}
	return "trireme.event." + kind
}
