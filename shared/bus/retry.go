package bus

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"trireme.dev/shared/wire"
)

// duplicateInProcess is a cluster's answer to a message that it has had before and not stored yet (nats-server errors.json,
// JSStreamDuplicateMessageConflict): 409, but a moment later it is stored, or not.
const duplicateInProcess = 10158

// permanent reports whether trying again cannot help: the server understood and refused, or the client is closed.
// What is left is temporary: timeouts, no responders while a server starts, a broken connection.
func permanent(err error) bool {
	if api := apiError(err); api != nil {
		return api.Code < 500 && api.ErrorCode != duplicateInProcess
	}
	for _, e := range []error{
		nats.ErrConnectionClosed, nats.ErrConnectionDraining, nats.ErrMaxPayload, nats.ErrBadSubject,
		nats.ErrAuthorization, nats.ErrPermissionViolation, jetstream.ErrKeyExists, jetstream.ErrKeyNotFound,
		jetstream.ErrInvalidKey, jetstream.ErrBucketExists, jetstream.ErrKeyRevisionMismatch,
		ErrJoinExists, ErrNoLetter, wire.ErrMalformed, wire.ErrVersion, wire.ErrTooLarge,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// apiError is what the server answered, or nil when err is of the client or the network.
func apiError(err error) *jetstream.APIError {
	var api *jetstream.APIError
	if errors.As(err, &api) {
		return api
	}
	var js jetstream.JetStreamError
	if errors.As(err, &js) {
		return js.APIError()
	}
	return nil
}

// awayWait is the time between two looks whether the connection is back.
const awayWait = 50 * time.Millisecond

// errAway is the last failure of a try that was not made because the connection is down.
var errAway = errors.New("no connection to NATS")

// retry calls f, each time with tryTimeout, until it succeeds, fails for good or ctx ends; then the error wraps both
// the end of ctx and the last failure. While the connection is down f is not called: the client would keep what each try
// sends, and send all of it when nobody waits for it any more.
func (b *Bus) retry(ctx context.Context, f func(context.Context) error) error {
	return b.retryWithin(ctx, 0, f)
}

// retryWithin is retry that gives up with ErrNoStore when there is a connection and f has failed for as long as patience,
// unless that is 0. The time in which there is no connection does not count.
func (b *Bus) retryWithin(ctx context.Context, patience time.Duration, f func(context.Context) error) error {
	var failing time.Time // since when, with a connection
	for wait := newPause(); ; {
		if b.conn.IsReconnecting() {
			failing, wait = time.Time{}, newPause()
			if (&pause{next: awayWait}).sleep(ctx) != nil {
				return fmt.Errorf("%w: %w", context.Cause(ctx), errAway)
			}
			continue
		}
		began := time.Now()
		try, cancel := context.WithTimeout(ctx, tryTimeout)
		err := f(try)
		cancel()
		if err == nil || permanent(err) {
			return err
		}
		if failing.IsZero() {
			failing = began
		}
		if patience > 0 && ctx.Err() == nil && !b.conn.IsReconnecting() && time.Since(failing) >= patience {
			return fmt.Errorf("%w for %v: %w", ErrNoStore, time.Since(failing).Round(time.Millisecond), err)
		}
		if wait.sleep(ctx) != nil {
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
	}
}

// pause is the wait between tries: 10 ms, doubling to a second.
type pause struct {
	next  time.Duration
	tries int
}

func newPause() *pause { return &pause{next: 10 * time.Millisecond} }

// sleep waits for the next pause and returns nil, or returns ctx's error as soon as it ends.
func (p *pause) sleep(ctx context.Context) error {
	t := time.NewTimer(p.next)
	defer t.Stop()
	p.tries++
	p.next = min(2*p.next, time.Second)
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
