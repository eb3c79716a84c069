package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/wire"
)

// watched is a writer that calls f with all that was written.
type watched struct {
	mu   sync.Mutex
	text bytes.Buffer
	f    func(string)
}

func (w *watched) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.text.Write(p)
	w.f(w.text.String())
	return len(p), nil
}

// Who ends a command while its operation is under way is told that this goes on.
func TestInterruptedChangeGoesOn(t *testing.T) {
	url := bustest.Run(t).URL()
	b, err := bus.Connect(t.Context(), url, t.Name(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	if _, err := b.Conn().Subscribe(wire.SubjectChange("d0"), func(m *nats.Msg) {
		var c wire.Change
		if err := wire.Unmarshal(m.Data, &c); err != nil || c.Seen > 0 {
			return // there is no news
		}
		data, err := wire.Marshal(&wire.ChangeReport{ID: c.ID, Kind: c.Kind, Instance: "d0", Number: 1, State: "prepare"})
		if err != nil {
			t.Error(err)
		}
		_ = m.Respond(data)
	}); err != nil {
		t.Fatal(err)
	}
	there := make(chan struct{})
	go func() {
		_ = b.Announce(t.Context(), func() wire.Instance {
			return wire.Instance{ID: "d0", Role: "decode", Node: "n", Ready: true, NPUs: []int{0}}
		})
		close(there)
	}()
	view, err := b.Instances(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for len(view.All()) == 0 {
		select {
		case <-there:
			t.Fatal("no heartbeat")
		case <-time.After(time.Millisecond):
		}
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	said := &watched{f: func(text string) {
		if strings.Contains(text, "prepare") {
			cancel(interrupted(syscall.SIGINT))
		}
	}}
	c := &scaleCmd{Who: "decoder", changeFlags: changeFlags{NATSURL: url, Timeout: time.Minute, AckWait: bus.DefaultAckWait}}
	if err := c.NPUs.UnmarshalText([]byte("+1")); err != nil {
		t.Fatal(err)
	}
	err = c.Run(&env{ctx: ctx, out: new(bytes.Buffer), err: said})
	if !errors.Is(err, context.Canceled) || !strings.Contains(said.text.String(), "scale of d0 has not ended, and goes on by itself") {
		t.Errorf("%v; said %s", err, said.text.String())
	}
}
