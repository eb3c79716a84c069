package bus

import (
	"log/slog"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/wire"
)

// What arrives for a pull that nobody reads any more, and what is more than was asked for, goes to the next who asks,
// long before AckWait.
func TestLateMessageIsGivenBack(t *testing.T) {
	t.Parallel()
	b, err := Connect(t.Context(), bustest.Run(t).URL(), t.Name(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	c, err := b.Consumer(t.Context(), StageDecode)
	if err != nil {
		t.Fatal(err)
	}
	late, err := c.startPull(Ask{Limit: 1, Wait: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	late.mu.Lock()
	late.over = true // as finish does, while the message is on its way
	late.mu.Unlock()
	if err := b.Publish(t.Context(), StageDecode, "r", "once", &wire.Done{Request: "r"}); err != nil {
		t.Fatal(err)
	}
	got, err := c.Next(t.Context(), 1, DefaultAckWait*2/3)
	if err != nil || len(got) != 1 {
		t.Fatalf("Next: %d messages, %v", len(got), err)
	}
	if got[0].Count != 2 {
		t.Errorf("delivery %d, want the one after the late pull's", got[0].Count)
	}
	if rest := late.finish(true); len(rest) != 0 {
		t.Errorf("the late pull kept %d messages", len(rest))
	}
	if err := got[0].Ack(t.Context()); err != nil {
		t.Error(err)
	}
}

// Somebody who subscribes to everything, as nats sub ">" does, listens for the server also where a pull was given up: the
// messages that it sends there go to the next who asks all the same, long before AckWait.
func TestPullGivenUpWhileSomebodySubscribesToEverything(t *testing.T) {
	t.Parallel()
	b, err := Connect(t.Context(), bustest.Run(t).URL(), t.Name(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	c, err := b.Consumer(t.Context(), StageDecode)
	if err != nil {
		t.Fatal(err)
	}
	all, err := nats.Connect(b.conn.ConnectedUrl())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(all.Close)
	if _, err := all.Subscribe(">", func(*nats.Msg) {}); err != nil {
		t.Fatal(err)
	}
	if err := all.Flush(); err != nil {
		t.Fatal(err)
	}
	stale := make(chan struct{})
	close(stale)
	if got, err := c.Take(t.Context(), Ask{Limit: 1, Wait: DefaultAckWait, Stale: stale}); len(got) > 0 || err != nil {
		t.Fatalf("a stale pull: %d messages, %v", len(got), err)
	}
	if err := b.Publish(t.Context(), StageDecode, "r", "once", &wire.Done{Request: "r"}); err != nil {
		t.Fatal(err)
	}
	got, err := c.Next(t.Context(), 1, DefaultAckWait*2/3)
	if err != nil || len(got) != 1 {
		t.Fatalf("Next: %d messages, %v", len(got), err)
	}
	if err := got[0].Ack(t.Context()); err != nil {
		t.Error(err)
	}
}
