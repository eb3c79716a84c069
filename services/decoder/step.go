package decoder

import (
	"context"
	"fmt"

	"trireme.dev/shared/engine"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/runner"
	"trireme.dev/shared/wire"
)

// ahead is how many positions before its slabs are full a sequence asks for the next one.
const ahead = 64

// Form implements runner.Source: one token of every sequence that is neither parked nor waiting for memory. Sequences are
// dropped, and their memory unmapped, only between steps.
func (d *decoder) Form(step *runner.Step) {
	d.taken = d.taken[:0]
	for i := 0; i < len(d.active); {
		s := d.active[i]
		ready, err := d.prepare(s)
		if err != nil {
			d.drop(s, err) // the next one is at i now
			continue
		}
		i++
		if !ready {
			d.Pass(s.claim)
			continue
		}
		if !d.Turn(s.claim) {
			continue
		}
		pos := s.position()
		if !step.Token(s.seat.NPU, pos) {
			continue // there is room on another NPU, perhaps
		}
		s.input[0] = s.last
		step.Add(engine.Seq{NPU: s.seat.NPU, Tokens: s.input[:], Pos: pos, Delta: s.delta, Blocks: s.kv.Blocks, Want: true})
		d.taken = append(d.taken, s)
	}
}

// Computed implements runner.Source: it books the step and sends the tokens.
func (d *decoder) Computed(_ []engine.Seq, logits [][]float32, err error) {
	d.rows.Add(float64(len(d.taken)))
	for i, s := range d.taken {
		if err != nil {
			d.drop(s, fmt.Errorf("computing a token: %w", err))
		} else if err := d.advance(s, logits[i]); err != nil {
			d.drop(s, err)
		}
	}
	if err := d.outbox.flush(d.Bus); err != nil {
		d.Log.Warn("sending tokens", "error", err)
	}
	if d.moving > 0 {
		for _, s := range d.active {
			if s.parked {
				s.missed++
			}
		}
	}
	for _, s := range d.taken {
		if s.finish() != wire.FinishNone {
			d.drop(s, nil)
		}
	}
}

// add takes a sequence into the loop. A claim that this instance held on it before is void: its sequence goes.
func (d *decoder) add(s *sequence) {
	if old := d.live[s.key()]; old != nil {
		d.drop(old, mem.ErrFenced)
	}
	d.live[s.key()] = s
	d.active = append(d.active, s)
}

// drop takes a sequence out of the loop and ends it with err, nil for a complete answer.
func (d *decoder) drop(s *sequence, err error) {
	if d.live[s.key()] != s {
		return
	}
	delete(d.live, s.key())
	for i, a := range d.active {
		if a == s {
			d.active = append(d.active[:i], d.active[i+1:]...)
			break
		}
	}
	d.lacks(s, false)
	s.release()
	s.done <- err
}

// position is where the newest token stands in the sequence, and its KV will.
func (s *sequence) position() int { return len(s.spec.Prompt) + s.answer - 1 }

// prepare makes room for the next step, and sends for what is needed soon: a slab before its own are full, a
// confirmation before its window is. It reports whether the sequence can take the step.
func (d *decoder) prepare(s *sequence) (bool, error) {
	if s.life.Err() != nil { // the handler is about to say so
		return false, context.Cause(s.life)
	}
	if !s.claim.Held() {
		return false, mem.ErrFenced
	}
	if s.parked {
		return false, nil
	}
	pos := s.position()
	if need := min(pos+1+ahead, len(s.spec.Prompt)+s.spec.Sampling.MaxTokens); s.kv.Room() < need && !s.growing {
		s.growing = true
		s.errand(func(ctx context.Context) { d.grow(ctx, s) })
	}
	if s.answer-s.confirmed >= window/2 && !s.asking {
		s.asking = true
		next := s.answer
		s.errand(func(ctx context.Context) { d.confirm(ctx, s, next) })
	}
	if s.answer-s.confirmed >= window || s.kv.Room() <= pos {
		return false, nil
	}
	return true, s.kv.Grow(pos + 1)
}

// addSlab gives s the slab that was fetched for it, unless it is not at that seat any more.
func (d *decoder) addSlab(s *sequence, seat *stage.Seat, o *hbm.Object) bool {
	if s.seat != seat {
		return false
	}
	s.objects = append(s.objects, o)
	seat.Grow(1)
	s.growing = false
	d.lacks(s, false)
	switch {
	case d.live[s.key()] != s:
	case !s.claim.Held():
		d.drop(s, mem.ErrFenced)
	default:
		if err := s.kv.AddSlab(o); err != nil {
			d.drop(s, err)
		}
	}
	return true
}

// advance books a computed step of s: KV was written by the forward pass; then come the record, the commit and the
// message.
func (d *decoder) advance(s *sequence, logits []float32) error {
	if !s.claim.Held() {
		return mem.ErrFenced
	}
	pos := s.position()
	s.kv.Seal(pos, pos+1)
	rec, lp, err := stage.Draw(stage.Decode, s.sampler, &s.spec.Sampling, logits, s.answer)
	if err != nil {
		return err
	}
	if err := s.kv.Append(rec); err != nil {
		return err
	}
	s.last = rec.Token
	s.answer++
	d.Reached(s.claim, s.answer)
	d.outbox.add(s, lp)
	return nil
}
