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

// permanent reports whether trying again cannot help: the server understood and refused, or the client is closed.
// What is left is temporary: timeouts, no responders while a server starts, a broken connection.
func permanent(err error) bool {
	if api := apiError(err); api != nil {
		return api.Code < 500
	}
	for _, e := range []error{
		nats.ErrConnectionClosed, nats.ErrConnectionDraining, nats.ErrMaxPayload, nats.ErrBadSubject,
		nats.ErrAuthorization, nats.ErrPermissionViolation, jetstream.ErrKeyExists, jetstream.ErrKeyNotFound,
		jetstream.ErrInvalidKey, jetstream.ErrBucketExists, jetstream.ErrKeyRevisionMismatch,
		ErrJoinExists, wire.ErrMalformed, wire.ErrVersion, wire.ErrTooLarge,
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

// retry calls f, each time with tryTimeout, until it succeeds, fails for good or ctx ends; then the error wraps both
// the end of ctx and the last failure.
func retry(ctx context.Context, f func(context.Context) error) error {
	for wait := newPause(); ; {
		try, cancel := context.WithTimeout(ctx, tryTimeout)
		err := f(try)
		cancel()
		if err == nil || permanent(err) {
			return err
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
