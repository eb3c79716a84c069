package stage

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/wire"
)

const (
	// settleTimeout bounds the settling of one delivery; what it leaves undone is done by AckWait.
	settleTimeout = 5 * time.Second
	// tellTimeout bounds one try to tell a gateway something and tellLimit all of them; tellWait is the pause after a try, and
	// untoldWait the time until a message comes back whose gateway could not be told.
	tellTimeout = time.Second
	tellLimit   = settleTimeout / 2
	tellWait    = 100 * time.Millisecond
	untoldWait  = time.Second
	// roomWait is the pause before work that found no memory is tried again, for each delivery so far, up to
	// maxRoomWait: room comes when others end, or give theirs up.
	roomWait    = 100 * time.Millisecond
	maxRoomWait = 2 * time.Second
	// maxRoomTries is how often work that finds no memory is tried before it is taken back to the gateway, which lets go of
	// what the request holds already and waits for room for all of it.
	maxRoomTries = 30
)

// ErrNoRoom is what the work on a delivery ends with that gives up its memory for the sake of others. The gateway starts
// the request again when there is room for all of it. Work that finds no memory while a sequence of another request in the same
// process lacks it for its next step (Short) ends the same way: what its request holds may be just what the other one lacks.
var ErrNoRoom = errors.New("no room for all")

// Fault is an error whose cause is the request itself: another attempt would end the same way.
type Fault struct {
	Status int    // HTTP status for the client
	Param  string // request parameter at fault, if any
	Code   string // for programs, if there is one
	Err    error
}

// Error returns the cause's text.
func (f *Fault) Error() string { return f.Err.Error() }

// Unwrap returns the cause.
func (f *Fault) Unwrap() error { return f.Err }

// Settle gives up the claim of a delivery whose work ended with err, and ends the delivery. claim is nil when there was
// none to have. In this order:
//
//	the part was claimed by another since   nothing: the message is the other's
//	request or attempt ended, err is nil    acked
//	its gateway shows no sign of life       handed back, to be taken again in a moment
//	ctx ended, or the HMM is lost           handed back, to come to somebody at once
//	no memory                               handed back, to be tried again in a moment, perhaps elsewhere; after
//	                                        maxRoomTries, or when another one is Short, as the next
//	gives up its room                       acked after the gateway was told that the attempt found no room
//	any other error                         acked after the gateway was told that the attempt is lost
//	the gateway cannot be told              handed back: somebody tells it later, or gives it up
func (s *Stage) Settle(ctx context.Context, d *bus.Delivery, req wire.Request, claim *hbm.Claim, err error) {
	io, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTimeout)
	defer cancel()
	if claim != nil {
		s.Pass(claim)
		switch why := s.HBM.Unclaim(io, claim); {
		case why == nil:
		case errors.Is(why, mem.ErrFenced):
			s.count(d, "taken over")
			s.Log.Info("another claim has taken over", "request", req.ID)
			d.Drop()
			return
		case errors.Is(why, mem.ErrEnded): // which explains err, if there is one
			err = why
		default:
			err = fmt.Errorf("%w: %w", mem.ErrLost, why)
		}
	}
	switch {
	case err == nil:
		s.ack(io, d, req, "done")
	case errors.Is(err, mem.ErrEnded):
		s.ack(io, d, req, "ended")
	case errors.Is(err, errHeld):
		s.handBack(d, req, heldWait, "held")
	case ctx.Err() != nil, errors.Is(err, mem.ErrLost):
		s.handBack(d, req, 0, "handed back")
	case errors.Is(err, mem.ErrFenced): // the holder before had written once more: the log is to be read again
		s.handBack(d, req, 0, "again")
	case errors.Is(err, mem.ErrExhausted) && d.Count <= maxRoomTries && !s.othersShort(req.ID):
		s.Log.Info("no memory for now", "request", req.ID, "error", err)
		s.handBack(d, req, min(time.Duration(d.Count)*roomWait, maxRoomWait), "no memory")
	case !s.tellLost(io, d.Stage, req, err):
		s.handBack(d, req, untoldWait, "untold")
	case errors.Is(err, ErrNoRoom), errors.Is(err, mem.ErrExhausted):
		s.ack(io, d, req, "no room")
	default:
		s.ack(io, d, req, "lost")
	}
}

func (s *Stage) ack(ctx context.Context, d *bus.Delivery, req wire.Request, outcome string) {
	s.count(d, outcome)
	if err := d.Ack(ctx); err != nil {
		s.Log.Warn("acknowledging", "request", req.ID, "error", err)
		d.Drop() // AckWait delivers it again
	}
}

func (s *Stage) handBack(d *bus.Delivery, req wire.Request, delay time.Duration, outcome string) {
	s.count(d, outcome)
	if err := d.Nak(delay); err != nil {
		s.Log.Warn("handing work back", "request", req.ID, "error", err)
	}
}

func (s *Stage) count(d *bus.Delivery, outcome string) {
	s.Metrics.Work.WithLabelValues(d.Stage, outcome).Inc()
}

// tellLost tells the gateway that an attempt is lost, and reports whether it knows. A gateway that is not told would wait for
// tokens until the request's deadline, so it has to answer.
func (s *Stage) tellLost(ctx context.Context, stage string, req wire.Request, err error) bool {
	m := wire.Lost{Request: req.ID, Attempt: req.Attempt, Why: err.Error(), Status: 500, Stage: stage}
	if f := (*Fault)(nil); errors.As(err, &f) {
		m.Final, m.Status, m.Param, m.Code = true, f.Status, f.Param, f.Code
		level, what := slog.LevelInfo, "request is at fault"
		if f.Status >= 500 {
			level, what = slog.LevelWarn, "request cannot be served"
		}
		s.Log.Log(ctx, level, what, "request", req.ID, "error", err)
	} else if errors.Is(err, ErrNoRoom) || errors.Is(err, mem.ErrExhausted) {
		m.NoRoom = true
		s.Log.Info("no room for a request for now", "request", req.ID, "attempt", req.Attempt, "error", err)
	}
	ctx, cancel := context.WithTimeout(ctx, tellLimit)
	defer cancel()
	for {
		try, cancel := context.WithTimeout(ctx, tellTimeout)
		var c wire.Confirmed
		err := s.Bus.Ask(try, wire.SubjectLost(req.Gateway), &m, &c)
		cancel()
		if err == nil {
			switch {
			case c.Ended:
				s.Over(req)
			case !m.Final && !m.NoRoom:
				s.Log.Warn("attempt is lost", "request", req.ID, "attempt", req.Attempt, "error", m.Why)
			}
			return true
		}
		if pause(ctx, tellWait) != nil {
			s.Log.Warn("telling the gateway of a lost attempt", "request", req.ID, "lost", m.Why, "error", err)
			return false
		}
	}
}
