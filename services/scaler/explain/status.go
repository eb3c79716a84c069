package explain

import (
	"io"
	"time"

	"trireme.dev/shared/sched/autoscale"
)

// Status is what a scaler answers on wire.SubjectScaler: what it sees and thinks now.
type Status struct {
	Scaler   string             `json:"scaler"`
	Leads    bool               `json:"leads"` // of several, this one decides and acts
	Mode     autoscale.Mode     `json:"mode"`
	Policy   string             `json:"policy,omitempty"`  // file; empty: the defaults
	Refused  string             `json:"refused,omitempty"` // why the file as it is now is not in force
	Turns    uint64             `json:"turns"`             // views decided by so far
	Pending  string             `json:"pending,omitempty"` // what is on its way, so that nothing is changed meanwhile
	UnderWay *Decision          `json:"under_way"`         // what it carries out; null: nothing
	Decision autoscale.Decision `json:"decision"`          // the last one, that nothing is to be done included
	Measured Measured           `json:"measured"`
	Ages     Ages               `json:"ages"`

	Queues [autoscale.Stages]autoscale.Queue `json:"queues"` // by stage
}

// Ages is how old what is known was when the last decision was made; -1: it is not known.
type Ages struct {
	Demand    time.Duration `json:"demand_ns"`
	Queues    time.Duration `json:"queues_ns"`
	Instances time.Duration `json:"instances_ns"` // of the one that was heard of longest ago
}

// AgesOf are the ages of a view's signals.
func AgesOf(v *autoscale.View) Ages {
	age := func(sum *time.Duration, s autoscale.Signal) {
		if !s.Known || *sum < 0 {
			*sum = -1
			return
		}
		*sum = max(*sum, s.Age)
	}
	var a Ages
	age(&a.Demand, v.Demand.Signal)
	for s := range v.Queues {
		age(&a.Queues, v.Queues[s].Signal)
	}
	for i := range v.Instances {
		age(&a.Instances, v.Instances[i].Signal)
	}
	if len(v.Instances) == 0 {
		a.Instances = -1
	}
	return a
}

// Write tells the status to a person.
func (s *Status) Write(w io.Writer) error {
	var b writer
	leads := "does not act (another scaler does, or none yet)"
	if s.Leads {
		leads = "acts"
	}
	b.line("%s %s, mode %s", s.Scaler, leads, s.Mode)
	if s.Refused != "" {
		b.line("policy    %s cannot be used, the one before is in force: %s", s.Policy, s.Refused)
	} else if s.Policy != "" {
		b.line("policy    %s", s.Policy)
	}
	b.ages(&s.Ages)
	if s.UnderWay != nil {
		b.line("under way %s: %s", s.UnderWay.ID, s.UnderWay.Decision.Change.Sentence())
	}
	if s.Pending != "" {
		b.line("pending   %s", s.Pending)
	}
	b.line("now       %s", s.Decision.Why)
	if !s.Decision.Blind {
		b.line("")
		b.seen(&s.Decision.Inputs, &s.Measured, &s.Queues)
	}
	_, err := w.Write(b.text)
	return err
}
