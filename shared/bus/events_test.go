package bus_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/wire"
)

// texts reads what is there.
func texts(tb testing.TB, b *bus.Bus, q bus.EventQuery) (texts []string, last uint64) {
	tb.Helper()
	err := b.Events(tb.Context(), q, func(e wire.Event) error {
		if e.Time.IsZero() || e.Sequence <= last {
			tb.Errorf("event %d at %v after %d", e.Sequence, e.Time, last)
		}
		last = e.Sequence
		texts = append(texts, e.Text)
		return nil
	})
	if err != nil {
		tb.Fatal(err)
	}
	return texts, last
}

func TestEvents(t *testing.T) {
	t.Parallel()
	b := connect(t, bustest.Run(t).URL())
	if got, _ := texts(t, b, bus.EventQuery{}); len(got) != 0 {
		t.Fatalf("events at the beginning: %q", got)
	}
	emit := func(kind, text string) {
		b.Emit(wire.Event{Kind: kind, Text: text})
		if err := b.Conn().FlushTimeout(30 * time.Second); err != nil {
			t.Fatal(err)
		}
	}
	emit(wire.EventReady, "a")
	emit(wire.EventGone, "b")
	emit(wire.EventHMMReady, "c")
	if err := b.Conn().Publish(wire.EventSubjects("other.thing"), []byte("no event")); err != nil {
		t.Fatal(err)
	}
	emit(wire.EventReady, "d")
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) { // the server stores them in its time
		if got, _ := texts(t, b, bus.EventQuery{}); slices.Equal(got, []string{"a", "b", "c", "d"}) {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("events are %q", got)
		}
	}
	for _, c := range []struct {
		q    bus.EventQuery
		want []string
	}{
		{bus.EventQuery{Since: time.Hour}, []string{"a", "b", "c", "d"}},
		{bus.EventQuery{Kinds: []string{"instance"}}, []string{"a", "b", "d"}},
		{bus.EventQuery{Kinds: []string{wire.EventGone, "hmm"}}, []string{"b", "c"}},
		{bus.EventQuery{Kinds: []string{"nats"}}, nil},
		{bus.EventQuery{After: 1}, []string{"b", "c", "d"}},
		{bus.EventQuery{After: 5}, nil},
	} {
		if got, _ := texts(t, b, c.q); !slices.Equal(got, c.want) {
			t.Errorf("%+v: %q, want %q", c.q, got, c.want)
		}
	}
	enough := errors.New("enough")
	if err := b.Events(t.Context(), bus.EventQuery{}, func(wire.Event) error { return enough }); !errors.Is(err, enough) {
		t.Errorf("an error of the reader comes back as %v", err)
	}
	js, err := jetstream.New(b.Conn())
	if err != nil {
		t.Fatal(err)
	}
	stream, err := js.Stream(t.Context(), wire.StreamEvents)
	if err != nil {
		t.Fatal(err)
	}
	if n := stream.CachedInfo().State.Consumers; n != 0 {
		t.Errorf("who has read events has left %d consumers", n)
	}
}

// Who follows sees what comes while it does, also over a restart of the server, and what could not be sent meanwhile later.
func TestFollowEvents(t *testing.T) {
	t.Parallel()
	server := bustest.Run(t)
	b, reader := connect(t, server.URL()), connect(t, server.URL())
	b.Emit(wire.Event{Kind: wire.EventReady, Text: "before"})
	ctx, cancel := context.WithCancel(t.Context())
	seen := make(chan string, 16)
	done := make(chan error, 1)
	go func() {
		done <- reader.Events(ctx, bus.EventQuery{Follow: true, Kinds: []string{"instance"}}, func(e wire.Event) error {
			seen <- e.Text
			return nil
		})
	}()
	expect := func(want string) {
		t.Helper()
		select {
		case got := <-seen:
			if got != want {
				t.Fatalf("event %q, want %q", got, want)
			}
		case err := <-done:
			t.Fatalf("following has ended: %v", err)
		case <-time.After(time.Minute):
			t.Fatalf("no event %q", want)
		}
	}
	expect("before")
	again := b.Reconnected()
	server.Stop()
	for deadline := time.Now().Add(30 * time.Second); !b.Conn().IsReconnecting(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the client has not noticed that the server has stopped")
		}
	}
	b.Emit(wire.Event{Kind: wire.EventGone, Text: "meanwhile"})
	server.Start()
	expect("meanwhile")
	<-again
	b.Emit(wire.Event{Kind: wire.EventReady, Text: "after"})
	expect("after")
	cancel()
	if err := <-done; err != nil {
		t.Errorf("the end of following: %v", err)
	}
}
