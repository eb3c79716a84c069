package encoder

import (
	"context"
	"slices"
	"sync"
	"time"

	"trireme.dev/shared/engine"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"
)

// line is the pictures that wait for their NPUs and those that are on them, in pieces, so that steps of other roles of the process
// go on between them. The process' runner owns it.
type line struct {
	npus    []bench    // by slot
	waiting []*picture // in order of arrival
	chosen  []*picture // whose piece is computed, one an NPU at most
	running sync.WaitGroup
}

// bench is where one NPU encodes.
type bench struct {
	engine *engine.Encoder
	on     *picture // the one on the NPU; nil: none
}

// picture is one picture to encode. Until done is sent, the runner uses its memory.
type picture struct {
	npu         int       // the slot of the NPU where out lies
	out, pixels []float32 // see engine.Encoder.Begin
	grid        engine.Grid
	claim       *hbm.Claim
	ctx         context.Context // of the work

	spent  time.Duration // on the NPU
	pieces int           // computed
	more   bool          // to compute
	err    error         // of the last piece
	done   chan error    // one value
}

// compute encodes p, unless its claim is lost or its request ends before.
func (e *encoder) compute(ctx context.Context, p *picture, prep *preparation) error {
	p.done, p.ctx = make(chan error, 1), ctx
	prep.ready(p.npu)
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
		if b := &e.line.npus[p.npu]; b.on == p {
			b.on = nil
		}
		e.ahead.out(p.npu)
		p.done <- err
	}
}

// piece does, on each NPU, the next piece of the first of its pictures that has its turn, or puts that on the NPU. It is a
// runner.Piece.
func (e *encoder) piece() (more bool) {
	l := &e.line
	l.chosen = l.chosen[:0]
	for _, p := range l.waiting {
		if slices.ContainsFunc(l.chosen, func(c *picture) bool { return c.npu == p.npu }) {
			p.claim.Rest() // it may have been on the NPU
		} else if e.Turn(p.claim) {
			l.chosen = append(l.chosen, p)
		}
	}
	if len(l.chosen) == 0 {
		return false
	}
	l.chosen = slices.DeleteFunc(l.chosen, func(p *picture) bool {
		switch {
		case p.ctx.Err() != nil: // the handler is about to say so
			e.drop(p, context.Cause(p.ctx))
		case !p.claim.Held():
			e.drop(p, mem.ErrFenced)
		default:
			return false
		}
		return true
	})
	for i, p := range l.chosen {
		if i == len(l.chosen)-1 {
			l.npus[p.npu].advance(p)
		} else {
			l.running.Go(func() { l.npus[p.npu].advance(p) })
		}
	}
	l.running.Wait()
	for _, p := range l.chosen {
		e.advanced(p)
	}
	clear(l.chosen)
	return len(l.waiting) > 0
}

// advance does the next piece of p, which it puts on the NPU before the first one: the others would wait for that with a piece of theirs.
func (b *bench) advance(p *picture) {
	start := time.Now()
	if b.on != p { // one that was on the NPU and had to stop begins anew
		p.pieces = 0
		if p.err = b.engine.Begin(p.out, p.pixels, p.grid); p.err == nil {
			b.on = p
		}
	}
	if p.err == nil {
		p.more = b.engine.Next()
		p.pieces++
	}
	p.spent += time.Since(start)
}

// advanced books what advance has done.
func (e *encoder) advanced(p *picture) {
	if p.err != nil {
		e.drop(p, p.err)
		return
	}
	e.Reached(p.claim, 1+p.pieces) // the pixels are the first
	if p.more {
		e.ahead.progress(p.npu, p.spent/time.Duration(p.pieces), e.line.npus[p.npu].engine.Pieces()-p.pieces)
		return
	}
	e.took.Observe(p.spent.Seconds())
	e.rows.Add(float64(p.grid.Patches()))
	e.drop(p, nil)
}
