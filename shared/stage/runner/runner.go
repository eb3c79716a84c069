// Package runner is the one goroutine of a stage process that uses its NPUs. It forms steps of what the process' roles have
// to compute (shared/sched), on all NPUs together, runs them through the language model, and gives the logits back; vision encoding,
// which is no part of a step, is done in pieces between steps. A process with one role and one with all run the same way.
package runner

import (
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"trireme.dev/shared/engine"
	"trireme.dev/shared/model"
	"trireme.dev/shared/sched"
	"trireme.dev/shared/sched/placement"
)

// Source brings sequences to the steps. All its methods are called by the runner's goroutine.
type Source interface {
	// Form adds the sequences that are to be in the next step, as far as the step grants them room. What it adds, and the
	// memory that this names, must stay as it is until Computed.
	Form(*Step)
	// Computed gets what the step made of the sequences that Form has added, if there were any: logits[i] belongs to
	// seqs[i], valid during the call (engine.Text.Forward). With err nothing was computed.
	Computed(seqs []engine.Seq, logits [][]float32, err error)
}

// Step is the step that is being formed.
type Step struct {
	sched.Step
	seqs []engine.Seq
}

// Add puts a sequence into the step, of as many tokens as Token or Chunk has just granted for its NPU.
func (s *Step) Add(q engine.Seq) { s.seqs = append(s.seqs, q) }

// Piece computes the next piece of work that is no part of a step, and reports whether there is more of it. It is called
// by the runner's goroutine. Steps wait for a piece, so that it should take no longer than a step.
type Piece func() (more bool)

// Observer is told how long something took, in seconds.
type Observer interface{ Observe(seconds float64) }

// Runner owns the NPUs once it runs. Its methods up to Start are called before that.
type Runner struct {
	sources []*source // as they were added; their names are joined in this order
	turns   []*source // those that decode, then the others: see sched.Step
	pieces  []Piece
	config  model.Config
	limits  sched.Limits // of a step; see sched.NewStep
	present *epoch       // the goroutine's; read by others with mu
	inbox   chan func()
	stop    chan struct{} // closed when the goroutine shall end
	ended   chan struct{} // closed when it has
	took    []Observer    // of steps, by the set of sources in them
	busy    atomic.Int64  // nanoseconds in which it has computed

	mu     sync.Mutex     // guards the rest, and who replaces present
	past   placement.Load // load of experts in epochs that are over
	change sync.Mutex     // held by who changes epochs or experts
}

type source struct {
	Source
	name       string
	decodes    bool
	bit        int // in a set of sources
	rows, seqs int
	from, to   int // its sequences in the step
}

// New returns a runner without work.
func New() *Runner {
	return &Runner{inbox: make(chan func(), 64), stop: make(chan struct{}), ended: make(chan struct{})}
}

// AddDecoding adds a source of at most seqs sequences an NPU that decode: a step has at most one token of each. name is for metrics.
func (r *Runner) AddDecoding(name string, src Source, seqs int) {
	r.add(&source{Source: src, name: name, decodes: true, rows: seqs, seqs: seqs})
}

// AddPrompts adds a source of prompts: at most rows new tokens of seqs sequences a step and NPU. name is for metrics.
func (r *Runner) AddPrompts(name string, src Source, rows, seqs int) {
	r.add(&source{Source: src, name: name, rows: rows, seqs: seqs})
}

func (r *Runner) add(s *source) {
	s.bit = 1 << len(r.sources)
	r.sources = append(r.sources, s)
}

// AddPieces adds work that is done between steps.
func (r *Runner) AddPieces(p Piece) { r.pieces = append(r.pieces, p) }

// Start prepares the language model, if anybody wants it, on the NPUs in the instance's slots (engine.NewText), and starts the
// goroutine. mixed bounds steps in which sequences
// decode and prompts are computed. took gives, for the names of the sources that had part in a step, joined with +, whoever
// is told how long it took.
func (r *Runner) Start(cfg model.Config, npus []engine.NPU, mixed sched.Mixed, took func(names string) Observer) error {
	r.config, r.limits = cfg, sched.Limits{Mixed: mixed}
	for _, s := range r.sources {
		r.limits.Rows += s.rows
		r.limits.Seqs += s.seqs
		if !s.decodes {
			r.limits.Prompt += s.rows
		}
	}
	var err error
	if r.present, err = r.reserve(npus); err != nil {
		return err
	}
	if err := r.present.load(npus); err != nil {
		r.present.close()
		return err
	}
	for _, decodes := range []bool{true, false} {
		for _, s := range r.sources {
			if s.decodes == decodes {
				r.turns = append(r.turns, s)
			}
		}
	}
	for set := range 1 << len(r.sources) {
		var names []string
		for _, s := range r.sources {
			if set&s.bit != 0 {
				names = append(names, s.name)
			}
		}
		r.took = append(r.took, nil)
		if set != 0 {
			r.took[set] = took(strings.Join(names, "+"))
		}
	}
	go func() {
		defer close(r.ended)
		r.run()
	}()
	return nil
}

// Stop ends the goroutine between two steps and waits for that. Nobody may wait for an answer of a function given to Do any
// more.
func (r *Runner) Stop() {
	close(r.stop)
	<-r.ended
	r.change.Lock()
	defer r.change.Unlock()
	r.present.close()
}

// Do runs f on the runner's goroutine between two steps, now or later. It returns false, without running f, when the runner
// has been stopped.
func (r *Runner) Do(f func()) bool {
	select {
	case r.inbox <- f:
		return true
	case <-r.stop:
		return false
	}
}

// Wake makes the runner ask its sources again if they had nothing to compute. It never blocks.
func (r *Runner) Wake() {
	select {
	case r.inbox <- func() {}:
	default: // whatever is in a full inbox wakes it
	}
}

func (r *Runner) run() {
	for idle := false; r.listen(idle); {
		start := time.Now()
		idle = !r.compute()
		for _, piece := range r.pieces {
			if piece() {
				idle = false
			}
		}
		r.busy.Add(int64(time.Since(start)))
	}
}

// Busy is how long the runner has computed so far, steps and pieces. It may be called at any time by any goroutine.
func (r *Runner) Busy() time.Duration { return time.Duration(r.busy.Load()) }

// listen runs what others have asked for; with wait it blocks until there is something. It returns false when the
// goroutine shall end.
func (r *Runner) listen(wait bool) bool {
	if wait {
		select {
		case f := <-r.inbox:
			f()
		case <-r.stop:
			return false
		}
	}
	for {
		select {
		case f := <-r.inbox:
			f()
		case <-r.stop:
			return false
		default:
			return true
		}
	}
}

// compute forms a step, computes it and hands the results out. It returns false when there was nothing to compute.
func (r *Runner) compute() bool {
	step := &r.present.step
	step.Begin()
	step.seqs = step.seqs[:0]
	set := 0
	for _, s := range r.turns {
		s.from = len(step.seqs)
		s.Form(step)
		if s.to = len(step.seqs); s.to > s.from {
			set |= s.bit
		}
	}
	if set == 0 {
		return false
	}
	start := time.Now()
	logits, err := r.present.text.Forward(step.seqs)
	r.took[set].Observe(time.Since(start).Seconds())
	for _, s := range r.turns {
		switch {
		case s.from == s.to:
		case err != nil:
			s.Computed(step.seqs[s.from:s.to], nil, err)
		default:
			s.Computed(step.seqs[s.from:s.to], logits[s.from:s.to], nil)
		}
	}
	clear(step.seqs) // the memory that they name may be unmapped from now on
	return true
}
