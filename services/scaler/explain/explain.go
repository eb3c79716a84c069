// Package explain is what the scaler says of its decisions: the data of its events, and how they read for people.
package explain

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/wire"
)

// Decision is the data of an event wire.EventScalerDecision: a change was chosen.
type Decision struct {
	ID       string             `json:"id"`     // of the decision, and of the operation that carries it out
	Scaler   string             `json:"scaler"` // instance that has decided
	Mode     autoscale.Mode     `json:"mode"`
	Decision autoscale.Decision `json:"decision"`
	// Advice is how a person makes the change; empty: the scaler makes it.
	Advice string   `json:"advice,omitempty"`
	Before Measured `json:"before"`
	// What was seen besides.
	Queues [autoscale.Stages]autoscale.Queue `json:"queues"` // by stage
	Ages   Ages                              `json:"ages"`
}

// Outcome is the data of an event wire.EventScalerOutcome: what became of a decision. There is one when the change has ended, and, when it
// was made, another one later, with what was measured then.
type Outcome struct {
	ID     string           `json:"id"`     // the decision's
	Scaler string           `json:"scaler"` // that tells
	Change autoscale.Change `json:"change"`
	Made   bool             `json:"made"`
	Why    string           `json:"why,omitempty"` // it was not made, or what went wrong beside
	Took   time.Duration    `json:"took_ns"`       // to be made, or to fail
	// Succeeded says that the scaler which has decided is gone. This one has brought the change to its end, and does not know what was
	// expected; or only measured what came of it, and After is counted from when it began to lead.
	Succeeded bool `json:"succeeded,omitempty"`

	Expected *autoscale.Effect `json:"expected,omitempty"` // of changes that were made
	Before   *Measured         `json:"before,omitempty"`   // when it was decided
	After    time.Duration     `json:"after_ns,omitempty"` // the end of the change, Measured was measured
	Measured *Measured         `json:"measured,omitempty"` // nil: not yet
}

// Measured is how the fleet did at a moment.
type Measured struct {
	NPUs        int                       `json:"npus"` // that instances have
	Spare       int                       `json:"spare"`
	Stage       [autoscale.Stages]int     `json:"stage_npus"`  // that have the role, by stage
	Need        [autoscale.Stages]float64 `json:"need"`        // NPUs, by stage
	Utilisation [autoscale.Stages]float64 `json:"utilisation"` // need over NPUs, as autoscale.Effect has it
	Busy        [autoscale.Stages]float64 `json:"busy"`        // part of the time that NPUs with the role computed lately
	TTFT        float64                   `json:"ttft_met"`    // part of requests that met the target lately; -1: not known
	TPOT        float64                   `json:"tpot_met"`    // "
}

// Measure is how the fleet does in a view, by the decision that was made of it.
func Measure(v *autoscale.View, d *autoscale.Decision) Measured {
	m := Measured{NPUs: d.Inputs.NPUs, Spare: d.Inputs.Spare, Utilisation: d.Inputs.Utilisation, TTFT: d.Inputs.TTFT, TPOT: d.Inputs.TPOT}
	for s := range m.Stage {
		m.Stage[s], m.Need[s] = d.Inputs.Stages[s].NPUs, d.Inputs.Stages[s].Need
		npus := 0.0
		for k := range v.Instances {
			if i := &v.Instances[k]; i.Ready && i.Has(autoscale.Stage(s)) {
				npus += float64(len(i.NPUs))
				m.Busy[s] += i.Busy * float64(len(i.NPUs))
			}
		}
		m.Busy[s] /= max(1, npus)
	}
	return m
}

// Policy is the data of an event wire.EventScalerPolicy.
type Policy struct {
	Scaler  string         `json:"scaler"`
	File    string         `json:"file"`
	Refused string         `json:"refused,omitempty"` // why the file cannot be used; the policy before stays
	Mode    autoscale.Mode `json:"mode"`              // in force
}

// Lead is the data of an event wire.EventScalerLead.
type Lead struct {
	Scaler string `json:"scaler"`
	// Operation is what a predecessor had begun, which this scaler brings to its end first; empty: nothing.
	Operation string            `json:"operation,omitempty"`
	Change    *autoscale.Change `json:"change,omitempty"`
}

// room is the most bytes of an event's data: what is over it would be lost.
const room = wire.MaxMessage - 4<<10

// Event makes an event. Of a Decision that would be too large the alternatives that are worst are left out, and counted.
func Event(kind, scaler, text string, data any) wire.Event {
	raw, err := json.Marshal(data)
	for d, ok := data.(Decision); ok && err == nil && len(raw) > room && len(d.Decision.Alternatives) > 0; {
		d.Decision.Alternatives = d.Decision.Alternatives[:len(d.Decision.Alternatives)-1]
		d.Decision.LeftOut++
		raw, err = json.Marshal(d)
	}
	if err != nil {
		panic("BUG: an event of the scaler that cannot be written: " + err.Error())
	}
	return wire.Event{Kind: kind, Instance: scaler, Role: "scaler", Text: text, Data: raw}
}

// DecisionEvent is the event of a decision.
func DecisionEvent(d Decision) wire.Event {
	text := fmt.Sprintf("%s: %s", d.ID, d.Decision.Why)
	if d.Advice != "" {
		text = fmt.Sprintf("%s: advice, %s; to do it: %s", d.ID, d.Decision.Why, d.Advice)
	}
	return Event(wire.EventScalerDecision, d.Scaler, text, d)
}

// OutcomeEvent is the event of an outcome.
func OutcomeEvent(o Outcome) wire.Event {
	return Event(wire.EventScalerOutcome, o.Scaler, o.ID+": "+o.Sentence(), o)
}

// PolicyEvent is the event of a policy.
func PolicyEvent(p Policy) wire.Event {
	text := fmt.Sprintf("%s is in force, mode %s", p.File, p.Mode)
	if p.Refused != "" {
		text = fmt.Sprintf("%s cannot be used, the policy before stays: %s", p.File, p.Refused)
	}
	return Event(wire.EventScalerPolicy, p.Scaler, text, p)
}

// LeadEvent is the event of a scaler that leads.
func LeadEvent(l Lead) wire.Event {
	text := "decides from now on"
	if l.Operation != "" {
		text = fmt.Sprintf("decides from now on, and first ends what its predecessor has begun: %s: %s", l.Operation, l.Change.Sentence())
	}
	return Event(wire.EventScalerLead, l.Scaler, text, l)
}

// near reports whether a utilisation is what was expected, as nearly as measurements of a load by chance are.
func near(got, want float64) bool {
	return got <= want+max(0.1, 0.2*want) && got >= want-max(0.1, 0.2*want)
}

// Sentence says for people what became of a decision.
func (o *Outcome) Sentence() string {
	took := o.Took.Round(time.Millisecond)
	if !o.Made {
		return fmt.Sprintf("was not made after %v: %s", took, o.Why)
	}
	text := fmt.Sprintf("made in %v", took)
	if o.Why != "" {
		text += " (" + o.Why + ")"
	}
	if o.Measured == nil {
		return text
	}
	s := o.Change.Stage
	text += fmt.Sprintf("; %v later %s", o.After.Round(time.Second), asked(s, o.Measured.Utilisation[s]))
	if o.Expected == nil {
		return text
	}
	want := o.Expected.Utilisation[s]
	less := o.Change.Action == autoscale.Narrow || o.Change.Action == autoscale.Remove // sized by the most that was needed lately
	switch {
	case less && (o.Measured.Utilisation[s] < want || near(o.Measured.Utilisation[s], want)):
		text += fmt.Sprintf(", at most %s were expected", percent(want))
	case near(o.Measured.Utilisation[s], want):
		text += ", as expected"
	case o.Before != nil && !near(o.Measured.Need[s], o.Before.Need[s]):
		text += fmt.Sprintf(", expected were %s: it needs %.1f NPUs now and %.1f then", percent(want), o.Measured.Need[s], o.Before.Need[s])
	default:
		text += fmt.Sprintf(", expected were %s", percent(want))
	}
	return text
}

// asked says how much is asked of a stage.
func asked(s autoscale.Stage, u float64) string {
	return fmt.Sprintf("%s of what %s is sized for is asked of it", percent(u), s)
}

func percent(u float64) string {
	if u >= 1e5 { // nobody is there to do it
		return "more than any part"
	}
	return fmt.Sprintf("%.0f%%", 100*u)
}

func share(met float64) string {
	if met < 0 {
		return "-"
	}
	return fmt.Sprintf("%.0f%%", 100*met)
}

// stages are all, in the order of the path.
var stages = []autoscale.Stage{autoscale.Encode, autoscale.Prefill, autoscale.Decode}

// utilisations are three numbers in a row.
func utilisations(u [autoscale.Stages]float64) string {
	var all []string
	for _, s := range stages {
		all = append(all, fmt.Sprintf("%s %s", s.Letter(), percent(u[s])))
	}
	return strings.Join(all, ", ")
}

// Of reports whether an operation on an instance was made for a decision.
func Of(operation, decision string) bool {
	return decision != "" && strings.HasPrefix(operation, decision)
}
