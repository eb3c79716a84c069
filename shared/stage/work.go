package stage

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/sched"
	"trireme.dev/shared/wire"
)

// Work claims the part of a request that a message is about, has f work on it, and settles the message. The context that f gets
// ends with ctx, and with mem.ErrEnded as its cause as soon as the request, the attempt or the choice needs nothing any more:
// whatever f waits for, it waits no longer. Who computes on behalf of f looks at that context before each step.
//
// What has ended is not claimed, nor is what nobody would take the answers of: see gateways.
func (s *Stage) Work(ctx context.Context, d *bus.Delivery, req wire.Request, part int, f func(context.Context, *hbm.Claim) error) {
	work, leave := s.works.enter(ctx, d.Stage, req, part)
	defer leave()
	claim, err := s.begin(work, d, req, part)
	if err == nil {
		err = f(work, claim)
	}
	if cause := context.Cause(work); err != nil && errors.Is(cause, mem.ErrEnded) {
		err = cause // whatever it has made of it
		s.passOn(req)
	}
	s.Settle(ctx, d, req, claim, err)
}

// Over notes that a request has ended, as its gateway has answered (wire.Confirmed.Ended), and tells the HMM.
func (s *Stage) Over(req wire.Request) {
	s.ended.add(&wire.Done{Request: req.ID, Choice: -1})
	s.passOn(req)
}

// passOn tells the HMM that a request has ended, as this process has heard on NATS: the HMM may be cut off from that.
func (s *Stage) passOn(req wire.Request) {
	if !s.ended.whole(req) {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), settleTimeout)
	defer cancel()
	if err := s.HBM.End(ctx, req.ID); err != nil && !errors.Is(err, mem.ErrLost) {
		s.Log.Warn("telling the HMM of the end of a request", "request", req.ID, "error", err)
	}
}

// begin claims a part, unless it is known to have ended. It may return an error with a claim: see claim.
func (s *Stage) begin(ctx context.Context, d *bus.Delivery, req wire.Request, part int) (*hbm.Claim, error) {
	choice := -1
	if d.Stage == Decode {
		choice = part
	}
	if s.Ended(req, choice) {
		return nil, mem.ErrEnded
	}
	if d.Count > 1 && s.endedSince(ctx, req) {
		return nil, mem.ErrEnded
	}
	if err := s.gateways.admit(ctx, req); err != nil {
		return nil, err
	}
	return s.claim(ctx, hbm.Part{
		Request: req.ID, Attempt: req.Attempt, Left: req.Left, Stage: d.Stage, Part: part,
	}, d.Reply)
}

// endedSince asks the gateway of a message that comes once more whether it still has the request. Whoever had the message before may
// have done all with it but the acknowledgement, and an HMM that has started since has not heard of the end: what is claimed or computed
// there for the request would stay until its deadline. An answer that does not come says nothing: see admit.
func (s *Stage) endedSince(ctx context.Context, req wire.Request) bool {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	var c wire.Confirmed
	err := s.Bus.Ask(ctx, wire.SubjectConfirm(req.Gateway), &wire.Confirm{Instance: s.ID, Request: req.ID, Attempt: req.Attempt, Choice: -1}, &c)
	if err != nil || !c.Ended {
		return false
	}
	s.Over(req)
	return true
}

// works is what a process has in work, so that the end of a request reaches all that is done for it.
type works struct {
	mu sync.Mutex
	of map[string]map[*work]struct{} // by request
}

// work is one message in work.
type work struct {
	request wire.Request
	role    string
	choice  int // of a decoder's work; -1: the work is for all choices
	end     context.CancelCauseFunc
}

// enter notes that a message is in work until leave is called. The context ends when the work is to.
func (w *works) enter(ctx context.Context, role string, req wire.Request, part int) (_ context.Context, leave func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	x := &work{request: req, role: role, choice: -1, end: cancel}
	if role == Decode {
		x.choice = part
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.of == nil {
		w.of = make(map[string]map[*work]struct{})
	}
	if w.of[req.ID] == nil {
		w.of[req.ID] = make(map[*work]struct{})
	}
	w.of[req.ID][x] = struct{}{}
	return ctx, func() {
		cancel(nil)
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.of[req.ID], x)
		if len(w.of[req.ID]) == 0 {
			delete(w.of, req.ID)
		}
	}
}

// end ends what a done event is about. Work for all choices goes on when one of them ends.
func (w *works) end(m *wire.Done) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for x := range w.of[m.Request] {
		if m.Covers(x.request.Attempt) && (m.Choice < 0 || m.Choice == x.choice) {
			x.end(mem.ErrEnded)
		}
	}
}

// load is what is in work of a request.
func (w *works) load(request string) (l sched.Load) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for x := range w.of[request] {
		switch x.role {
		case Encode:
			l.Pictures++
		case Prefill:
			l.Prompts++
		case Decode:
			l.Sequences++
		}
	}
	return l
}

// owned returns the requests of a gateway that are in work, each attempt once.
func (w *works) owned(gateway string) []wire.Request {
	w.mu.Lock()
	defer w.mu.Unlock()
	var found []wire.Request
	for _, of := range w.of {
		attempts := make(map[int]bool)
		for x := range of {
			if x.request.Gateway == gateway && !attempts[x.request.Attempt] {
				attempts[x.request.Attempt] = true
				found = append(found, x.request)
			}
		}
	}
	return found
}

// gateways lists those that have something in work here.
func (w *works) gateways() map[string]bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	found := make(map[string]bool)
	for _, of := range w.of {
		for x := range of {
			found[x.request.Gateway] = true
		}
	}
	return found
}

// giveUp ends an attempt whose gateway is gone, everywhere: here, in the HMM, and, by the event, in all others.
func (s *Stage) giveUp(ctx context.Context, req wire.Request) error {
	next := Ref(req)
	next.Attempt++ // what older attempts hold goes, and they are claimed no more; a gateway that comes back can begin this one
	if err := s.HBM.Keep(ctx, next); err != nil && !errors.Is(err, mem.ErrEnded) {
		return fmt.Errorf("giving a request up: %w", err)
	}
	if err := s.Bus.Send(wire.SubjectDone, &wire.Done{Request: req.ID, Choice: -1, Attempt: req.Attempt}); err != nil {
		return fmt.Errorf("giving a request up: %w", err)
	}
	return nil
}
