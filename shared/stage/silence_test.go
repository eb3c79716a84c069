package stage

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
)

// Only an unbroken row of answers that nobody listens counts: an outage of NATS, however long, is not held against the gateway.
func TestSilenceOfAGateway(t *testing.T) {
	nobody := fmt.Errorf("asking: %w", nats.ErrNoResponders)
	var s silence
	now := time.Now()
	for i, x := range []struct {
		after time.Duration
		err   error
		want  time.Duration
	}{
		{0, context.DeadlineExceeded, 0},
		{time.Minute, nats.ErrDisconnected, 0},
		{time.Minute, nobody, 0}, // the first word of the gateway
		{time.Second, nobody, time.Second},
		{9 * time.Second, nobody, 10 * time.Second},
		{time.Second, context.DeadlineExceeded, 0}, // somebody listens, or NATS is away again
		{time.Second, nobody, 0},
		{time.Second, nil, 0},
		{time.Second, errors.New("malformed"), 0},
		{time.Second, nobody, 0},
		{time.Second, nobody, time.Second},
	} {
		now = now.Add(x.after)
		if got := s.after(x.err, now); got != x.want {
			t.Errorf("question %d: %v, want %v", i, got, x.want)
		}
	}
}
