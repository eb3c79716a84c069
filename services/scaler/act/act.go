// Package act carries out what the scaler has decided: changes of instances over NATS (bus.Change), of the number of processes by
// whoever starts them on a node (`trireme up`, wire.Replicas), or by Kubernetes. Which of these, Config says, and New chooses.
//
// Whatever is asked for has ids that are made from the operation's, so that a scaler that comes after one that was killed asks again and
// only finds out how it ended. It also has the fence of the term (lead.Term), which whoever carries it out compares with the newest
// that it has seen.
package act

import (
	"context"
	"time"

	"trireme.dev/services/scaler/lead"
	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/wire"
)

// Actuator makes changes.
type Actuator interface {
	// Able says whether the change can be made here; if not, advice is the command for a person to run. It may ask who starts processes,
	// for a second at the most.
	Able(ctx context.Context, c autoscale.Change) (advice string, ok bool)
	// Do makes the change that op is about, which the caller has noted in the record (lead.Term.Note) and clears from there behind it. A
	// successor calls it again with the operation that it has found. Do notes by itself how far a change in several halves is. An error says
	// that it is not known how the operation ended, or that it goes on: it stays in the record, and Do is to be called again, by this
	// leader or the next. What was refused or given up is an Outcome.
	Do(ctx context.Context, term *lead.Term, op *lead.Operation) (Outcome, error)
}

// Outcome is how an operation has ended.
type Outcome struct {
	Done  bool          `json:"done"`            // the change is in force; false: everything is as it was, but for what Why says
	Why   string        `json:"why,omitempty"`   // it is not done, or what went wrong behind its commit
	Again bool          `json:"again,omitempty"` // it was found to have ended before it was asked for this time: by a leader before
	Took  time.Duration `json:"took_ns"`         // of this call of Do
	Bytes int64         `json:"bytes,omitempty"` // that were copied, of Reports
	// Reports are of the operations on instances, in their order: of a move who gives, then who takes.
	Reports []*wire.ChangeReport `json:"reports,omitempty"`
	Started []string             `json:"started,omitempty"` // names of instances, or of pods' owner where nobody says which
	Stopped []string             `json:"stopped,omitempty"`
}
