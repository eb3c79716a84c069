package stage

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/stage/runner"
	"trireme.dev/shared/wire"
)

// A request whose worker died while it ran has a strike, and may be what killed it. It runs alone then: if the process dies again,
// nobody else was running, so nobody else gets a strike, and what it was has no excuse. What a process does for requests is
// of two kinds: sections of the handlers (decoding a picture, attaching KV), each between Enter and the leave that it
// returns, and what the runner computes, of which each part is asked for its Turn before each step or piece. The rest (asking the
// HMM, waiting for others, settling) kills nobody and is not stopped. What waits is not running and gets no strike.

// Quarantine is how many strikes in a row a part may have at most: one in company, or alone by chance, and three more alone.
const Quarantine = 1 + 3

// claim takes a part for this instance, as hbm.Client.Claim does. The error of one that is quarantined is a *Fault, with the claim
// for Settle.
func (s *Stage) claim(ctx context.Context, p hbm.Part, reply string) (*hbm.Claim, error) {
	claim, err := s.HBM.Claim(ctx, p, reply)
	if err != nil {
		return nil, err
	}
	if n := claim.Strikes(); n >= Quarantine {
		return claim, &Fault{Status: http.StatusInternalServerError, Code: wire.CodeQuarantined, Err: fmt.Errorf(
			"the request is quarantined: %d instances in a row died while they ran it (%s, part %d), the last ones alone with it", n,
			p.Stage, p.Part)}
	} else if n > 0 {
		s.Log.Warn("runs alone, as an instance died while it ran it", "request", p.Request, "stage", p.Stage, "part", p.Part, "strikes", n)
	}
	return claim, nil
}

// gate is the turns of a process.
type gate struct {
	runner   *runner.Runner
	suspects atomic.Int32 // in line; what the crowd looks at first

	mu      sync.Mutex // guards the rest
	turns   turns[*hbm.Claim]
	changed chan struct{} // closed and replaced when somebody's turn may have come; nil: nobody waits
}

// tell wakes those who wait for their turn. g.mu is held.
func (g *gate) tell() {
	g.suspects.Store(int32(len(g.turns.line)))
	if g.changed != nil {
		close(g.changed)
		g.changed = nil
	}
	g.runner.Wake()
}

// wait returns when ok, called with g.mu held, returns true, or with ctx's cause.
func (g *gate) wait(ctx context.Context, ok func() bool) error {
	for {
		g.mu.Lock()
		if ok() {
			g.mu.Unlock()
			return nil
		}
		if g.changed == nil {
			g.changed = make(chan struct{})
		}
		changed := g.changed
		g.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Enter waits until a section of a handler's work under a claim may begin, and notes that it runs until leave is called. A section
// must not wait for other work of the process. Its error is the cause of ctx's end.
func (s *Stage) Enter(ctx context.Context, claim *hbm.Claim) (leave func(), err error) {
	g := &s.gate
	if claim.Strikes() == 0 {
		err = g.wait(ctx, func() bool {
			if !g.turns.open() {
				return false
			}
			g.turns.crowd++
			return true
		})
		if err != nil {
			return nil, err
		}
		claim.Run()
		return func() {
			claim.Rest()
			g.mu.Lock()
			defer g.mu.Unlock()
			if g.turns.crowd--; g.turns.crowd == 0 && len(g.turns.line) > 0 {
				g.tell()
			}
		}, nil
	}
	g.join(claim)
	if err := g.wait(ctx, func() bool { return g.turns.may(claim) }); err != nil {
		return nil, err
	}
	stopped := make(chan struct{}) // the step that may be under way began when others had their turn
	if g.runner.Do(func() { close(stopped) }) {
		<-stopped // the runner outlives all handlers
	}
	claim.Run()
	return claim.Rest, nil
}

// Turn reports whether work under a claim may be in the next step, or the next piece, and notes whether it runs or waits. It is
// for the runner's goroutine, which is woken when that changes.
func (s *Stage) Turn(claim *hbm.Claim) bool {
	g := &s.gate
	if claim.Strikes() == 0 && g.suspects.Load() == 0 {
		claim.Run()
		return true
	}
	g.mu.Lock()
	var may bool
	switch {
	case claim.Strikes() == 0:
		may = g.turns.open()
	case g.turns.join(claim): // what is in this step already is others'
		g.tell()
	default:
		may = g.turns.may(claim)
	}
	g.mu.Unlock()
	if may {
		claim.Run()
	} else {
		claim.Rest()
	}
	return may
}

// Pass notes that work under a claim waits for something, and lets others work meanwhile.
func (s *Stage) Pass(claim *hbm.Claim) {
	claim.Rest()
	if claim.Strikes() > 0 {
		s.gate.leave(claim)
	}
}

// Reached notes how far work under a claim has come: see hbm.Claim.Progress. Once that is further than ever, it need not be alone
// any more.
func (s *Stage) Reached(claim *hbm.Claim, n int) {
	if claim.Progress(uint32(n)) {
		s.gate.leave(claim)
	}
}

func (g *gate) join(claim *hbm.Claim) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.turns.join(claim) {
		g.tell()
	}
}

func (g *gate) leave(claim *hbm.Claim) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.turns.leave(claim) {
		g.tell()
	}
}

// round is called by the runner after each round; it is a runner.Piece.
func (g *gate) round() (more bool) {
	if g.suspects.Load() == 0 {
		return false
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if more = g.turns.round(); more {
		g.tell()
	}
	return more
}

// quiet waits until no suspect wants to be alone: this process takes no work meanwhile. It returns false when ctx ends first.
func (g *gate) quiet(ctx context.Context) bool {
	if g.suspects.Load() == 0 {
		return ctx.Err() == nil
	}
	return g.wait(ctx, func() bool { return len(g.turns.line) == 0 }) == nil
}
