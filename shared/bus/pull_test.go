package bus

import (
	"log/slog"
	"testing"
	"time"

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
