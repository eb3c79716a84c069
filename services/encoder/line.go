package encoder

import (
	"context"
	"slices"
	"time"

	"trireme.dev/shared/engine"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"
)

// line is the pictures that wait for the NPU and the one that is on it, in pieces, so that steps of other roles of the process
// go on between them. The process' runner owns it.
type line struct {
	engine  *engine.Encoder
	waiting []*picture // in order of arrival
	on      *picture   // the one on the NPU; nil: none
}

// picture is one picture to encode. Until done is sent, the runner uses its memory.
type picture struct {
	out, pixels []float32 // see engine.Encoder.Begin
	grid        engine.Grid
	claim       *hbm.Claim
	ctx         context.Context // of the work

	spent  time.Duration // on the NPU
	pieces int           // computed
	done   chan error    // one value
}

// compute encodes p, unless its claim is lost or its request ends before.
func (e *encoder) compute(ctx context.Context, p *picture, prep *preparation) error {
	p.done, p.ctx = make(chan error, 1), ctx
	prep.ready()
	e.Runner.Do(func() { e.line.waiting = append(e.line.waiting, p) }) // the runner outlives all handlers
	select {
	case err := <-p.done:
		return err
	case <-ctx.Done():
		e.Runner.Do(func() { e.drop(p, context.Cause(ctx)) })
		return <-p.done
	}
}

// drop takes a picture out of the line and ends it with err.
func (e *encoder) drop(p *picture, err error) {
	if i := slices.Index(e.line.waiting, p); i >= 0 {
		e.line.waiting = slices.Delete(e.line.waiting, i, i+1)
		if e.line.on == p {
			e.line.on = nil
		}
		e.ahead.out()
		p.done <- err
	}
}

// piece does the next piece of the first picture that has its turn, or puts it on the NPU. It is a runner.Piece.
func (e *encoder) piece() (more bool) {
	l := &e.line
	i := slices.IndexFunc(l.waiting, func(p *picture) bool { return e.Turn(p.claim) })
	if i < 0 {
		return false
	}
	p := l.waiting[i]
	for _, behind := range l.waiting[i+1:] { // one of them may have been on the NPU
		behind.claim.Rest()
	}
	switch {
	case p.ctx.Err() != nil: // the handler is about to say so
		e.drop(p, context.Cause(p.ctx))
	case !p.claim.Held():
		e.drop(p, mem.ErrFenced)
	default:
		e.advance(p)
	}
	return len(l.waiting) > 0
}

// advance does the next piece of p.
func (e *encoder) advance(p *picture) {
	start := time.Now()
	if e.line.on != p { // one that was on the NPU and had to stop begins anew
		p.pieces = 0
		if err := e.line.engine.Begin(p.out, p.pixels, p.grid); err != nil {
			e.drop(p, err)
			return
		}
		e.line.on = p
		p.spent += time.Since(start)
		return
	}
	more := e.line.engine.Next()
	p.spent += time.Since(start)
	p.pieces++
	e.Reached(p.claim, 1+p.pieces) // the pixels are the first
	if more {
		e.ahead.progress(p.spent/time.Duration(p.pieces), e.line.engine.Pieces()-p.pieces)
		return
	}
	e.took.Observe(p.spent.Seconds())
	e.rows.Add(float64(p.grid.Patches()))
	e.drop(p, nil)
}
