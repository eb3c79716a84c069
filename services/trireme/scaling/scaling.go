// Package scaling says what a change of the number of NPUs has cost those who were served meanwhile, and compares ways to make it.
// It is arithmetic on what clients saw (package load) and on samples of memory.
package scaling

import (
	"cmp"
	"errors"
	"slices"
	"time"

	"trireme.dev/services/trireme/load"
)

// Event is a change as its driver saw it.
type Event struct {
	Steady  time.Time // when the load was, before it
	Command time.Time // when it was asked for
	Full    time.Time // when all of the new capacity served
	Window  time.Duration
	Moved   int64         // bytes of weights that were copied or read for it
	Warm    time.Duration // of it: a first step on the NPUs that joined
	// Parts are figures that only some ways have: how long each state took in seconds, and bytes that were copied.
	Parts map[string]float64
}

// Memory is what all NPUs together had in use at a time, caches excluded.
type Memory struct {
	At    time.Time
	Bytes int64
}

// Part is what clients had in a part of the run.
type Part struct {
	Seconds    float64 `json:"seconds"`
	Rate       float64 `json:"tokens_per_second"`
	Requests   float64 `json:"requests_per_second"` // that ended
	Attainment float64 `json:"attainment"`          // of those sent in it, 0 to 1
	Gap        float64 `json:"longest_gap_s"`       // between two tokens of an answer
}

// Figures are what one change has cost.
type Figures struct {
	Strategy string             `json:"strategy"`
	CopyRate int64              `json:"copy_bytes_per_s"`
	From     int                `json:"from_npus"`
	To       int                `json:"to_npus"`
	Latency  float64            `json:"latency_s"`   // from the command to full capacity
	Downtime float64            `json:"downtime_s"`  // longest time in which nobody had a token although somebody waited for one
	Before   Part               `json:"before"`      // equally long, as far as the load was steady
	During   Part               `json:"during"`      // from the command to full capacity, or for the window if that is longer
	After    Part               `json:"after"`       // equally long, as far as the load went on
	Ready    int64              `json:"ready_bytes"` // of memory that each NPU had before, beside what was in use
	Held     int64              `json:"held_bytes"`  // most, before the command
	Peak     int64              `json:"peak_bytes"`  // most, from the command to full capacity
	Settled  int64              `json:"after_bytes"` // at the end of After
	Moved    int64              `json:"moved_bytes"` // weights that were copied or read for it
	Warm     float64            `json:"warm_s"`      // a first step on the NPUs that joined
	Sent     int                `json:"requests"`
	Failed   int                `json:"failed"`
	Changed  int                `json:"changed"` // answers other than without a change
	Parts    map[string]float64 `json:"parts,omitempty"`
}

// Measure works out what an event cost. answers are those of a run of the same requests without a change, by their number: Sample.Said, 0
// for one without text, which has not failed then. nil: there was no such run, and no answer is known to be changed or to be empty by mistake.
func Measure(r *load.Report, e Event, g load.Goodput, memory []Memory, answers map[int]uint64) Figures {
	changed := later(e.Full, e.Command.Add(e.Window)) // a change may be over before a token has come
	length := changed.Sub(e.Command)
	last := r.Began // after the last was sent the load ends
	for i := range r.Samples {
		last = later(last, r.Samples[i].Sent)
	}
	before := earlier(e.Command, later(e.Steady, e.Command.Add(-length)))
	after := later(changed, earlier(last, changed.Add(length)))
	f := Figures{
		Parts: e.Parts, Latency: e.Full.Sub(e.Command).Seconds(), Moved: e.Moved, Warm: e.Warm.Seconds(),
		During:   part(r.Between(e.Command, changed, g)),
		After:    part(r.Between(changed, after, g)),
		Downtime: Silence(r, e.Command, e.Full).Seconds(),
		Sent:     len(r.Samples), Failed: r.Failed,
	}
	quiet := r.Between(before, e.Command, g)
	f.Before = part(quiet)
	f.Before.Gap = quiet.Closed.Seconds() // a gap that is still open then is the change's
	for _, m := range memory {
		switch {
		case m.At.Before(e.Command):
			if !m.At.Before(before) {
				f.Held = max(f.Held, m.Bytes)
			}
		case !m.At.After(e.Full):
			f.Peak = max(f.Peak, m.Bytes)
		case !m.At.Before(changed) && m.At.Before(after):
			f.Settled = m.Bytes
		}
	}
	f.Peak = max(f.Peak, f.Held)
	for i := range r.Samples {
		s := &r.Samples[i]
		want, ok := answers[s.Number]
		empty := errors.Is(s.Err, load.ErrEmpty)
		switch {
		case empty && (answers == nil || ok && want == 0): // so it is without a change
			f.Failed--
		case (empty || s.Err == nil) && ok && s.Said != want:
			f.Changed++
		}
	}
	return f
}

func part(w load.Window) Part {
	p := Part{Seconds: w.Seconds(), Rate: w.Rate(), Attainment: w.Attainment(), Gap: w.Gap.Seconds()}
	if p.Seconds > 0 {
		p.Requests = float64(w.Ended) / p.Seconds
	}
	return p
}

// Silence is the longest time, within a part of a run, in which no answer got a token although at least one request was open all
// the time.
func Silence(r *load.Report, from, to time.Time) time.Duration {
	var came []time.Time
	type edge struct {
		at time.Time
		by int
	}
	var edges []edge
	for i := range r.Samples {
		s := &r.Samples[i]
		came = append(came, s.Pieces...)
		edges = append(edges, edge{s.Sent, 1}, edge{s.Sent.Add(s.E2EL), -1})
	}
	slices.SortFunc(came, time.Time.Compare)
	slices.SortFunc(edges, func(a, b edge) int { return cmp.Or(a.at.Compare(b.at), b.by-a.by) })
	var longest time.Duration
	open, at := 0, from // somebody waits since at, and has got nothing
	next := 0
	until := func(t time.Time) { // what came up to t
		for ; next < len(came) && !came[next].After(t); next++ {
			if open > 0 && came[next].After(at) {
				longest = max(longest, earlier(came[next], to).Sub(at))
			}
			at = later(at, came[next])
		}
	}
	for _, e := range edges {
		t := e.at
		if t.After(to) {
			break
		}
		until(t)
		if open > 0 && e.by < 0 && open == 1 && t.After(at) {
			longest = max(longest, t.Sub(at))
		}
		if open == 0 {
			at = later(at, t)
		}
		open += e.by
	}
	until(to)
	if open > 0 && to.After(at) {
		longest = max(longest, to.Sub(at))
	}
	return longest
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}
