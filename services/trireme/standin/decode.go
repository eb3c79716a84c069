package standin

import (
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/wire"
)

const (
	window  = 256 // as decoders have it (services/decoder)
	askWait = time.Second
	again   = 20 * time.Millisecond
)

// decoder sends one token of every sequence a step. Its loop owns live and the sequences' counts.
type decoder struct {
	part
	step    time.Duration
	phase   time.Duration
	inbox   chan func()
	stop    chan struct{}
	ended   chan struct{}
	resends *nats.Subscription
	live    map[string]*sequence
	order   []*sequence
	runs    map[string][]wire.Run // by gateway, of the step
}

// sequence is one choice.
type sequence struct {
	request   wire.Request
	spec      *wire.Spec
	claim     *hbm.Claim
	answer    int // tokens
	confirmed int
	asking    bool
	first     int
	done      chan error // one value
}

func newDecoder(p part, step, phase time.Duration) (*decoder, error) {
	d := &decoder{
		part: p, step: step, phase: phase, inbox: make(chan func(), 64), stop: make(chan struct{}), ended: make(chan struct{}),
		live: map[string]*sequence{}, runs: map[string][]wire.Run{},
	}
	var err error
	d.resends, err = d.Bus.Handle(wire.SubjectResend(d.ID), func(data []byte, _ func(any) error) {
		var m wire.Resend
		if wire.Unmarshal(data, &m) == nil {
			d.do(func() {
				if s := d.live[m.Request]; s != nil {
					d.replay(s, m.From)
				}
			})
		}
	})
	if err != nil {
		return nil, fmt.Errorf("listening for resend requests: %w", err)
	}
	go func() {
		defer close(d.ended)
		d.run()
	}()
	return d, nil
}

// Close implements stage.Worker.
func (d *decoder) Close() {
	_ = d.resends.Unsubscribe() // it ends with the connection at the latest
	close(d.stop)
	<-d.ended
}

func (d *decoder) do(f func()) {
	select {
	case d.inbox <- f:
	case <-d.stop:
	}
}

// run takes steps at fixed times, or as soon as something is due.
func (d *decoder) run() {
	due := time.NewTimer(0)
	defer due.Stop()
	for {
		var f func()
		select {
		case f = <-d.inbox:
			f()
		case <-d.stop:
			return
		case <-due.C:
			d.advance()
			if d.step > 0 {
				due.Reset(d.wait(time.Now()))
			}
		}
		if d.step == 0 && f != nil && len(d.order) > 0 {
			for len(d.order) > 0 && d.advance() {
			}
		}
	}
}

// wait is the time to the next step.
func (d *decoder) wait(now time.Time) time.Duration {
	return d.step - time.Duration(now.Add(-d.phase).UnixNano())%d.step
}

// advance takes a step and reports whether any sequence had a part in it.
func (d *decoder) advance() bool {
	now := time.Now().UnixNano()
	any := false
	for i := 0; i < len(d.order); {
		s := d.order[i]
		i++
		if s.answer-s.confirmed >= window/2 && !s.asking {
			s.asking = true
			go d.confirm(s, s.answer)
		}
		if s.answer-s.confirmed >= window {
			continue
		}
		any = true
		if s.first < 0 {
			d.mu.Lock()
			s.first = len(d.d.Steps)
			d.mu.Unlock()
		}
		run := d.token(s, s.answer)
		d.runs[s.request.Gateway] = append(d.runs[s.request.Gateway], run)
		s.answer++
		if run.Finish != wire.FinishNone {
			i--
			d.drop(s, nil)
		}
	}
	if !any {
		return false
	}
	d.mu.Lock()
	d.d.Steps = append(d.d.Steps, now)
	d.mu.Unlock()
	for gateway, runs := range d.runs {
		if len(runs) == 0 {
			continue
		}
		if err := stage.SendTokens(d.Bus, d.ID, gateway, runs); err != nil {
			d.Log.Warn("sending tokens", "error", err) // the gateway asks again
		}
		clear(runs)
		d.runs[gateway] = runs[:0]
	}
	return true
}

// token is the run of one token.
func (d *decoder) token(s *sequence, index int) wire.Run {
	return wire.Run{
		Request: s.request.ID, Attempt: s.request.Attempt, Generation: s.claim.Generation(), Index: index, IDs: []int32{d.word},
		Finish: stage.FinishOf(&s.spec.Sampling, index, d.word),
	}
}

// replay sends tokens again.
func (d *decoder) replay(s *sequence, from int) {
	var runs []wire.Run
	for i := max(from, 0); i < s.answer; i++ {
		runs = append(runs, d.token(s, i))
	}
	if err := stage.SendTokens(d.Bus, d.ID, s.request.Gateway, runs); err != nil {
		d.Log.Warn("sending tokens again", "error", err)
	}
}

func (d *decoder) drop(s *sequence, err error) {
	if d.live[s.request.ID] != s {
		return
	}
	delete(d.live, s.request.ID)
	for i, o := range d.order {
		if o == s {
			d.order = append(d.order[:i], d.order[i+1:]...)
			break
		}
	}
	s.done <- err
}

// ask asks the gateway how far it has come.
func (d *decoder) ask(ctx context.Context, s *sequence, next int, finish wire.Finish) (c wire.Confirmed, err error) {
	ctx, cancel := context.WithTimeout(ctx, askWait)
	defer cancel()
	err = d.Bus.Ask(ctx, wire.SubjectConfirm(s.request.Gateway), &wire.Confirm{
		Instance: d.ID, Request: s.request.ID, Attempt: s.request.Attempt, Generation: s.claim.Generation(), Next: next, Finish: finish,
	}, &c)
	return c, err
}

// confirm lets s go on once the gateway has answered; an answer that is lost is asked for again by the next step.
func (d *decoder) confirm(s *sequence, next int) {
	c, err := d.ask(context.Background(), s, next, wire.FinishNone)
	d.do(func() {
		s.asking = false
		switch {
		case err != nil:
		case c.Over:
			d.drop(s, mem.ErrEnded)
		default:
			s.confirmed = max(s.confirmed, min(c.Next, s.answer))
			if s.answer-c.Next >= window {
				d.replay(s, c.Next)
			}
		}
	})
}

// Handle implements stage.Worker: it sends the answer and has its end confirmed.
func (d *decoder) Handle(ctx context.Context, dl *bus.Delivery) {
	n := Part{Taken: time.Now().UnixNano()}
	var m wire.Decode
	d.handle(ctx, dl, &m, func() (wire.Request, int) { return m.Request, m.Choice }, func(ctx context.Context, claim *hbm.Claim) error {
		spec, err := d.Spec(ctx, m.Inline, m.Spec)
		if err != nil {
			return err
		}
		s := &sequence{request: m.Request, spec: spec, claim: claim, answer: 1, first: -1, done: make(chan error, 1)}
		if stage.FinishOf(&spec.Sampling, 0, d.word) == wire.FinishNone {
			d.do(func() {
				d.live[m.Request.ID] = s
				d.order = append(d.order, s)
			})
			select {
			case err = <-s.done:
			case <-ctx.Done():
				d.do(func() { d.drop(s, context.Cause(ctx)) })
				return context.Cause(ctx)
			}
		}
		n.Request, n.First = m.Request.ID, s.first
		d.add(n)
		if err != nil {
			return err
		}
		return d.confirmEnd(ctx, s)
	})
}

func (d *decoder) confirmEnd(ctx context.Context, s *sequence) error {
	for {
		c, err := d.ask(ctx, s, s.answer, stage.FinishOf(&s.spec.Sampling, s.answer-1, d.word))
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err == nil && (c.Over || c.Next == s.answer):
			return nil
		case err == nil:
			d.replay(s, c.Next)
		}
		time.Sleep(again)
	}
}
