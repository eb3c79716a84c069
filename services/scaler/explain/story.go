package explain

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"text/tabwriter"
	"time"

	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/wire"
)

// ErrUnknown is returned by Find for what is no decision of those that are kept.
var ErrUnknown = errors.New("no such decision")

// Story is a decision with what came of it.
type Story struct {
	Time     time.Time     `json:"time"`     // of the decision
	Sequence uint64        `json:"sequence"` // of its event; 0: the event is not kept any more
	Decision *Decision     `json:"decision"` // nil: "
	Outcome  *Outcome      `json:"outcome"`  // nil: there is none yet
	Ended    time.Time     `json:"ended"`    // of Outcome
	Events   []*wire.Event `json:"events"`   // of the operations that were made for it
}

// Find is the decision that is meant by its id, or by the sequence of its event or of the event of its outcome; "": the last one. Events
// are in the order of their sequences; those of operations (wire.EventScalePlan and so on) may be among them.
func Find(events []wire.Event, which string) (*Story, error) {
	id := which
	sequence, notSequence := strconv.ParseUint(which, 10, 64)
	for i := range events {
		e := &events[i]
		if e.Kind != wire.EventScalerDecision && e.Kind != wire.EventScalerOutcome {
			continue
		}
		if which == "" && e.Kind == wire.EventScalerDecision || notSequence == nil && e.Sequence == sequence {
			var named struct{ ID string }
			if json.Unmarshal(e.Data, &named) == nil {
				id = named.ID
			}
		}
	}
	if id == "" {
		return nil, fmt.Errorf("%w: the scaler has decided nothing yet; `trireme scaler status` says what it sees", ErrUnknown)
	}
	s := &Story{}
	for i := range events {
		e := &events[i]
		switch e.Kind {
		case wire.EventScalerDecision:
			var d Decision
			if json.Unmarshal(e.Data, &d) == nil && d.ID == id {
				s.Time, s.Sequence, s.Decision = e.Time, e.Sequence, &d
			}
		case wire.EventScalerOutcome:
			var o Outcome
			if json.Unmarshal(e.Data, &o) == nil && o.ID == id {
				s.Outcome, s.Ended = &o, e.Time
			}
		case wire.EventScalePlan, wire.EventScalePrepare, wire.EventScaleCommit, wire.EventScaleRelease, wire.EventScaleAbort, wire.EventScaleDone:
			var r struct{ ID string }
			if json.Unmarshal(e.Data, &r) == nil && Of(r.ID, id) {
				s.Events = append(s.Events, e)
			}
		}
	}
	if s.Decision == nil && s.Outcome == nil {
		return nil, fmt.Errorf("%w as %s among the events that are kept; `trireme events --kind scaler` shows them", ErrUnknown, which)
	}
	return s, nil
}

// Write tells the story to a person.
func (s *Story) Write(w io.Writer) error {
	var b writer
	if d := s.Decision; d != nil {
		b.decision(s, d)
	} else {
		b.line("Decision %s is not kept any more.", s.Outcome.ID)
	}
	b.outcome(s)
	_, err := w.Write(b.text)
	return err
}

// writer collects text.
type writer struct{ text []byte }

func (b *writer) line(format string, args ...any) {
	b.text = fmt.Appendf(b.text, format+"\n", args...)
}

func (b *writer) decision(s *Story, d *Decision) {
	in := &d.Decision.Inputs
	b.line("Decision %s, event %d, %s, by %s in mode %s", d.ID, s.Sequence, s.Time.Local().Format("2006-01-02 15:04:05"), d.Scaler, d.Mode)
	b.line("")
	b.seen(in, &d.Before, &d.Queues)
	b.ages(&d.Ages)
	b.line("\nWhat was thought about, the best first (of less score), what cannot be last:")
	t := b.table("SCORE\tCHANGE\tASKED OF STAGES THEN\tNPUS\tTAKES\tREFUSED BECAUSE")
	for i := range d.Decision.Alternatives {
		a := &d.Decision.Alternatives[i]
		fmt.Fprintf(t, "%.3g\t%s\t%s\t%d\t%v\t%s\n", a.Score, a.Change.Sentence(), utilisations(a.Effect.Utilisation), a.Effect.NPUs,
			a.Cost.Time.Round(time.Millisecond), cmp.Or(a.Refused, "-"))
	}
	t.Flush() //nolint:errcheck // into memory
	if n := d.Decision.LeftOut; n > 0 {
		b.line("and %d more that were no better.", n)
	}
	b.line("\nWhat was chosen: %s.\nBecause %s.", d.Decision.Change.Sentence(), d.Decision.Why)
	if d.Advice != "" {
		b.line("It is advice. To do it: %s", d.Advice)
	}
}

// seen is what a decision was made from.
func (b *writer) seen(in *autoscale.Inputs, m *Measured, queues *[autoscale.Stages]autoscale.Queue) {
	met := fmt.Sprintf("%s of requests met the target of TTFT lately, %s that of TPOT", share(in.TTFT), share(in.TPOT))
	if in.TTFT < 0 && in.TPOT < 0 {
		met = "whether requests met their targets lately is not known"
	}
	b.line("What was seen: %d NPUs with instances, %d spare; %s.", in.NPUs, in.Spare, met)
	t := b.table("STAGE\tNPUS\tNEED\tASKED OF IT\tBUSY\tARRIVES\tAN NPU DOES\tWAITS\tQUEUE")
	units := [autoscale.Stages]string{"visual tokens/s", "prompt tokens/s", "tokens/s"}
	waits := [autoscale.Stages]string{"visual tokens", "prompt tokens", "sequences"}
	for _, k := range stages {
		x := &in.Stages[k]
		does, need := "not known", "not known"
		if x.Capacity > 0 {
			does = figure(x.Capacity)
		}
		if !x.Unknown {
			need = fmt.Sprintf("%.2f", x.Need)
		}
		if x.AtMost {
			need = "at most " + need
		}
		fmt.Fprintf(t, "%s\t%d\t%s\t%s\t%.0f%%\t%s %s\t%s\t%s %s\t%s\n", k, x.NPUs, need, percent(in.Utilisation[k]), 100*m.Busy[k], figure(x.Demand), units[k],
			does, figure(x.Backlog), waits[k], queued(&queues[k]))
	}
	t.Flush() //nolint:errcheck // into memory
}

// figure writes a number with four digits that count, and never as 1.39e+04.
func figure(x float64) string {
	if x >= 1000 {
		return fmt.Sprintf("%.0f", x)
	}
	return fmt.Sprintf("%.4g", x)
}

// queued is the state of a queue.
func queued(q *autoscale.Queue) string {
	text := fmt.Sprintf("%d pending, %d in work", q.Pending, q.InWork)
	if q.Redelivered > 0 {
		text += fmt.Sprintf(", %d again", q.Redelivered)
	}
	if q.Waiting > 0 {
		text += fmt.Sprintf(", %d at the entrance", q.Waiting)
	}
	if q.Oldest > 0 {
		text += fmt.Sprintf(", the oldest for %v", q.Oldest.Round(time.Millisecond))
	}
	return text
}

// ages says how old what was seen was.
func (b *writer) ages(a *Ages) {
	age := func(d time.Duration) string {
		if d < 0 {
			return "not known"
		}
		return fmt.Sprintf("%v old", d.Round(time.Millisecond))
	}
	b.line("signals   demand %s, queues %s, instances %s", age(a.Demand), age(a.Queues), age(a.Instances))
}

func (b *writer) table(head string) *tabwriter.Writer {
	t := tabwriter.NewWriter(b, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, head)
	return t
}

// Write implements io.Writer.
func (b *writer) Write(p []byte) (int, error) {
	b.text = append(b.text, p...)
	return len(p), nil
}

func (b *writer) outcome(s *Story) {
	b.line("\nWhat came of it:")
	for _, e := range s.Events {
		b.line("  %s  %-14s  %s", e.Time.Local().Format("15:04:05.000"), e.Kind, e.Text)
	}
	o := s.Outcome
	switch {
	case o != nil:
		b.line("  %s  %s.", s.Ended.Local().Format("15:04:05.000"), o.Sentence())
	case s.Decision != nil && s.Decision.Advice != "":
		b.line("  the scaler does nothing about advice.")
		return
	default:
		b.line("  it is not known yet.")
		return
	}
	switch {
	case o.Succeeded && o.Expected == nil:
		b.line("  The scaler that had begun it was gone; %s has brought it to its end.", o.Scaler)
	case o.Succeeded:
		b.line("  The scaler that had made it was gone; %s has measured what came of it.", o.Scaler)
	}
	if o.Measured == nil {
		if o.Made {
			b.line("  How the fleet does with it is not measured yet.")
		}
		return
	}
	t := b.table("\t\tNPUS\tSPARE\tASKED OF STAGES\tBUSY\tTTFT MET\tTPOT MET")
	row := func(what string, m *Measured) {
		if m != nil {
			fmt.Fprintf(t, "\t%s\t%d\t%d\t%s\t%s\t%s\t%s\n", what, m.NPUs, m.Spare, utilisations(m.Utilisation), utilisations(m.Busy), share(m.TTFT), share(m.TPOT))
		}
	}
	row("before", o.Before)
	if e := o.Expected; e != nil {
		fmt.Fprintf(t, "\texpected\t%d\t\t%s\t\t\t\n", e.NPUs, utilisations(e.Utilisation))
	}
	row("measured", o.Measured)
	t.Flush() //nolint:errcheck // into memory
}
