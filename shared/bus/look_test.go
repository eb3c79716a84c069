package bus_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/wire"
)

func TestLookDoesNotWaitForAServer(t *testing.T) {
	t.Parallel()
	s := bustest.Run(t)
	s.Stop()
	if _, err := bus.Look(t.Context(), s.URL(), "early", quiet()); !errors.Is(err, bus.ErrUnreachable) || !strings.Contains(err.Error(), s.URL()) {
		t.Errorf("Look without a server: %v", err)
	}
	s.Start() // as the test's end expects
}

// Streams and consumers are as the services have made them: a command knows less.
func TestLookChangesNothing(t *testing.T) {
	t.Parallel()
	b := connect(t, bustest.Run(t).URL(), bus.WithAckWait(time.Hour))
	const bucket = "KV_" + wire.BucketInstances
	s, err := b.JetStream().Stream(t.Context(), bucket)
	if err != nil {
		t.Fatal(err)
	}
	other := s.CachedInfo().Config
	other.MaxMsgSize = 1 << 10
	if _, err := b.JetStream().UpdateStream(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	l, err := bus.Look(t.Context(), b.Conn().ConnectedUrl(), "look", quiet())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if s, err = b.JetStream().Stream(t.Context(), bucket); err != nil {
		t.Fatal(err)
	}
	if got := s.CachedInfo().Config.MaxMsgSize; got != 1<<10 {
		t.Errorf("messages of %s may have %d bytes now, before %d", bucket, got, 1<<10)
	}
	c, err := b.JetStream().Consumer(t.Context(), wire.StreamDecode, wire.ConsumerDecode)
	if err != nil {
		t.Fatal(err)
	}
	if got := c.CachedInfo().Config.AckWait; got != time.Hour {
		t.Errorf("acks are waited for for %v now, before an hour", got)
	}
}

// It is so, too, when the connection breaks and comes back, and no event tells of that: a command is no service.
func TestLookChangesNothingWhenItComesBack(t *testing.T) {
	t.Parallel()
	s := bustest.Run(t)
	connect(t, s.URL(), bus.WithAckWait(time.Hour)).Close()
	l, err := bus.Look(t.Context(), s.URL(), "look", quiet())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	back := l.Reconnected()
	s.Stop()
	s.Start()
	select {
	case <-back:
	case <-time.After(long):
		t.Fatal("it does not come back")
	}
	c, err := l.JetStream().Consumer(t.Context(), wire.StreamDecode, wire.ConsumerDecode)
	if err != nil {
		t.Fatal(err)
	}
	if got := c.CachedInfo().Config.AckWait; got != time.Hour {
		t.Errorf("acks are waited for for %v now, before an hour", got)
	}
	events, err := l.JetStream().Stream(t.Context(), wire.StreamEvents)
	if err != nil {
		t.Fatal(err)
	}
	if n := events.CachedInfo().State.Msgs; n > 0 {
		t.Errorf("%d events", n)
	}
}

// Of a server without JetStream a command says that at once; a service says it and waits, as that may be one that starts.
func TestNoJetStream(t *testing.T) {
	t.Parallel()
	s, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, NoLog: true, NoSigs: true})
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(s.Shutdown)
	if !s.ReadyForConnections(long) {
		t.Fatal("it does not start")
	}
	if _, err := bus.Look(t.Context(), s.ClientURL(), "look", quiet()); !errors.Is(err, bus.ErrNoJetStream) {
		t.Errorf("Look: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var log bytes.Buffer
	handler := slog.NewTextHandler(writer(func(p []byte) (int, error) { cancel(); return log.Write(p) }), nil)
	if _, err := bus.Connect(ctx, s.ClientURL(), "connect", slog.New(handler)); !errors.Is(err, context.Canceled) || !strings.Contains(log.String(), "-js") {
		t.Errorf("Connect: %v; it said %s", err, &log)
	}
}

// A server to which nobody has connected yet is one with no instances.
func TestLookAtAnEmptyServer(t *testing.T) {
	t.Parallel()
	l, err := bus.Look(t.Context(), bustest.Run(t).URL(), "look", quiet())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	view, err := l.Instances(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if all := view.All(); len(all) != 0 {
		t.Errorf("instances %v", all)
	}
	if queues, err := l.Queues(t.Context()); err != nil || len(queues) != 3 {
		t.Errorf("queues %v, %v", queues, err)
	}
}

// What a command has sent before Close arrives.
func TestLookSendsAllBeforeItCloses(t *testing.T) {
	t.Parallel()
	b := connect(t, bustest.Run(t).URL())
	told, err := b.Conn().SubscribeSync(wire.EventSubjects(wire.EventReached))
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Conn().Flush(); err != nil {
		t.Fatal(err)
	}
	l, err := bus.Look(t.Context(), b.Conn().ConnectedUrl(), "look", quiet())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Instances(t.Context()); err != nil {
		t.Fatal(err)
	}
	l.Emit(wire.Event{Kind: wire.EventReached, Text: "here"})
	l.Close()
	if _, err := told.NextMsg(long); err != nil {
		t.Error(err)
	}
}

// Commands that have looked at the heartbeats leave no consumers behind, which the server would keep for a while.
func TestLooksLeaveNoConsumers(t *testing.T) {
	t.Parallel()
	b := connect(t, bustest.Run(t).URL())
	bucket, err := b.JetStream().Stream(t.Context(), "KV_"+wire.BucketInstances)
	if err != nil {
		t.Fatal(err)
	}
	look := func() error {
		l, err := bus.Look(t.Context(), b.Conn().ConnectedUrl(), "look", quiet())
		if err != nil {
			return err
		}
		defer l.Close()
		_, err = l.Instances(t.Context())
		return err
	}
	for range 20 { // a consumer that is left goes after some seconds
		var commands sync.WaitGroup
		for range 32 {
			commands.Go(func() {
				if err := look(); err != nil {
					t.Error(err)
				}
			})
		}
		commands.Wait()
		info, err := bucket.Info(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if n := info.State.Consumers; n > 0 {
			t.Fatalf("%d consumers are left", n)
		}
	}
}
