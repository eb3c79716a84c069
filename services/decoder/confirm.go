package decoder

import (
	"context"
	"time"

	"trireme.dev/shared/mem"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/wire"
)

const (
	// window is how many tokens a sequence may run ahead of what the gateway has confirmed; then it is parked
	// (DESIGN.md, step 5). Half of it unconfirmed makes the decoder ask.
	window = 256
	// askTimeout is how long one question to a gateway waits for its answer.
	askTimeout = time.Second
	// askWait is the pause between two questions: tokens sent again need a moment to arrive.
	askWait = 20 * time.Millisecond
	// silentWait is the pause after a question that nobody answered.
	silentWait = 100 * time.Millisecond
)

// resend publishes tokens again from the log of a live sequence. One whose answer is complete is not live any more:
// confirmEnd sees to it.
func (d *decoder) resend(data []byte, _ func(any) error) {
	var m wire.Resend
	if err := wire.Unmarshal(data, &m); err != nil {
		d.Log.Warn("ignoring a resend request", "error", err)
		return
	}
	d.do(func() {
		if s := d.live[key{m.Request, m.Choice}]; s != nil {
			d.replay(s, m.From)
		}
	})
}

// replay sends the tokens from index from on again.
func (d *decoder) replay(s *sequence, from int) {
	if from < 0 || from >= s.kv.Log.Committed() || !s.claim.Held() {
		return
	}
	runs, err := stage.Replay(s.kv.Log, &s.spec.Sampling, s.claim.Generation(), from)
	if err == nil {
		err = stage.SendTokens(d.Bus, d.ID, s.request.Gateway, runs)
	}
	if err != nil {
		d.Log.Warn("sending tokens again", "request", s.request.ID, "error", err)
	}
}

// ask sends one Confirm for a sequence and returns the gateway's answer.
func (d *decoder) ask(ctx context.Context, s *sequence, next int, finish wire.Finish) (wire.Confirmed, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	var c wire.Confirmed
	err := d.Bus.Ask(ctx, wire.SubjectConfirm(s.request.Gateway), &wire.Confirm{
		Instance: d.ID, Request: s.request.ID, Attempt: s.request.Attempt, Choice: s.choice,
		Generation: s.claim.Generation(), Next: next, Finish: finish,
	}, &c)
	if err != nil {
		return c, err
	}
	if c.Ended {
		d.Over(s.request)
	}
	if c.Next < 0 || c.Next > next {
		c.Next = next
	}
	return c, nil
}

// confirm asks the gateway until it has answered how far it has come, so that s may go on. It is an errand.
func (d *decoder) confirm(ctx context.Context, s *sequence, next int) {
	for ctx.Err() == nil {
		if c, err := d.ask(ctx, s, next, wire.FinishNone); err == nil {
			d.do(func() { d.confirmed(s, c) })
			return
		}
		pause(ctx, silentWait)
	}
}

// confirmed takes a gateway's answer. It runs on the loop.
func (d *decoder) confirmed(s *sequence, c wire.Confirmed) {
	s.asking = false
	if c.Over {
		d.drop(s, mem.ErrEnded)
	}
	if d.live[s.key()] != s {
		return
	}
	s.confirmed = max(s.confirmed, c.Next)
	if s.answer-c.Next >= window { // a parked sequence sends nothing that would show the gateway a gap
		d.replay(s, c.Next)
	}
}

// confirmEnd repeats until the gateway has the last token or needs nothing more, or ctx ends.
func (d *decoder) confirmEnd(ctx context.Context, s *sequence) error {
	d.Pass(s.claim)
	for {
		if !s.claim.Held() {
			return mem.ErrFenced
		}
		c, err := d.ask(ctx, s, s.answer, s.finish())
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err == nil && (c.Over || c.Next == s.answer):
			return nil
		case err == nil:
			d.replay(s, c.Next)
			pause(ctx, askWait)
		default:
			pause(ctx, silentWait)
		}
	}
}
