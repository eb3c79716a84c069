package bus_test

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/goleak"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/leaktest"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/wire"
)

func TestMain(m *testing.M) {
	bustest.ServeIfAsked()
	// nats.go 1.55: a publisher that is cleaned up at once, as behind a Put into an object store, takes the channel away that this
	// goroutine of its own is about to read, which then waits for nothing.
	leaktest.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/nats-io/nats.go/jetstream.(*jetStream).resetPendingAcksOnReconnect"))
}

// connect opens a Bus that is closed before the test's server stops.
func connect(t *testing.T, url string, opts ...bus.Option) *bus.Bus {
	t.Helper()
	b, err := bus.Connect(t.Context(), url, t.Name(), quiet(), opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	return b
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// long is a wait that only a broken program uses up. It is shorter than DefaultAckWait: a message that arrives within it
// was not left to AckWait.
const long = bus.DefaultAckWait * 2 / 3

func TestRefusals(t *testing.T) {
	t.Parallel()
	b := connect(t, bustest.Run(t).URL())
	if err := b.Publish(t.Context(), "cook", "r", "", &wire.Done{}); !errors.Is(err, bus.ErrStage) {
		t.Errorf("unknown stage: %v", err)
	}
	if _, err := b.Consumer(t.Context(), "cook"); !errors.Is(err, bus.ErrStage) {
		t.Errorf("unknown stage: %v", err)
	}
	big := &wire.Prefill{Inline: make([]byte, wire.MaxMessage)}
	if err := b.Publish(t.Context(), bus.StagePrefill, "r", "", big); !errors.Is(err, wire.ErrTooLarge) {
		t.Errorf("large message: %v", err)
	}
	if err := b.Ask(t.Context(), "nobody.listens", &wire.Done{}, &wire.Done{}); !errors.Is(err, nats.ErrNoResponders) {
		t.Errorf("asking nobody: %v", err)
	}
	full := &wire.Prefill{Inline: make([]byte, wire.MaxMessage-200), Request: wire.Request{ID: "r"}}
	if err := b.Publish(t.Context(), bus.StagePrefill, "r", "a-message-id", full); err != nil {
		t.Errorf("a message of nearly MaxMessage: %v", err)
	}
}

func TestSendAskHandle(t *testing.T) {
	t.Parallel()
	url := bustest.Run(t).URL()
	gateway, decoder := connect(t, url), connect(t, url)
	tokens := make(chan wire.Tokens, 1)
	if _, err := gateway.Handle(wire.SubjectTokens("g"), func(data []byte, respond func(any) error) {
		var m wire.Tokens
		if err := wire.Unmarshal(data, &m); err != nil {
			t.Error(err)
		}
		if respond(&m) == nil {
			t.Error("answered a message that asks for no answer")
		}
		tokens <- m
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := gateway.Handle(wire.SubjectConfirm("g"), func(data []byte, respond func(any) error) {
		var m wire.Confirm
		if err := wire.Unmarshal(data, &m); err != nil {
			t.Error(err)
		}
		if err := respond(&wire.Confirmed{Next: m.Next, Over: true}); err != nil {
			t.Error(err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if err := decoder.Send(wire.SubjectTokens("g"), &wire.Tokens{Instance: "d", Items: []wire.Run{{Request: "r", IDs: []int32{7}}}}); err != nil {
		t.Fatal(err)
	}
	if m := <-tokens; m.Instance != "d" || m.Items[0].IDs[0] != 7 {
		t.Errorf("received %+v", m)
	}
	var reply wire.Confirmed
	if err := decoder.Ask(t.Context(), wire.SubjectConfirm("g"), &wire.Confirm{Next: 5}, &reply); err != nil {
		t.Fatal(err)
	}
	if reply.Next != 5 || !reply.Over {
		t.Errorf("answer %+v", reply)
	}
}

func TestConnectWaitsForTheServer(t *testing.T) {
	t.Parallel()
	s := bustest.Run(t)
	s.Stop()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := bus.Connect(ctx, s.URL(), "early", quiet()); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), s.URL()) {
		t.Errorf("Connect without a server: %v", err)
	}
	done := make(chan error, 1)
	go func() {
		b, err := bus.Connect(context.Background(), s.URL(), "early", quiet())
		if err == nil {
			b.Close()
		}
		done <- err
	}()
	s.Start()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := bus.Connect(t.Context(), "nats://[::1", "bad", quiet()); err == nil {
		t.Error("a malformed URL is accepted")
	}
}

// After a restart of the server on the same port and store nothing is lost: queued messages, messages in work, join
// records, waiting calls, subscriptions, heartbeats and views of them.
func TestServerRestart(t *testing.T) {
	t.Parallel()
	s := bustest.Run(t)
	b := connect(t, s.URL())
	c := consumer(t, b, bus.StageDecode)
	publish(t, b, bus.StageDecode, "held", "")
	held := next(t, c, 1, 1, long)[0]
	publish(t, b, bus.StageEncode, "queued", "")
	if err := b.CreateJoin(t.Context(), "r.1", join("r", 1)); err != nil {
		t.Fatal(err)
	}
	handled := make(chan struct{}, 1)
	if _, err := b.Handle("trireme.test", func([]byte, func(any) error) { handled <- struct{}{} }); err != nil {
		t.Fatal(err)
	}
	var ready atomic.Bool
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stopped := make(chan error, 1)
	go func() {
		stopped <- b.Announce(ctx, func() wire.Instance { return wire.Instance{ID: "d0", Role: "decode", Ready: ready.Load()} })
	}()
	view, err := b.Instances(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, view, func(all []wire.Instance) bool { return len(all) == 1 })
	waiting := make(chan []*bus.Delivery, 1)
	go func() {
		got, err := c.Next(context.Background(), 1, long)
		if err != nil {
			t.Error(err)
		}
		waiting <- got
	}()
	waitForPull(t, b, bus.StageDecode)

	s.Stop()
	ready.Store(true)
	published := make(chan error, 1)
	go func() { // tried until the server is back
		published <- b.Publish(context.Background(), bus.StageDecode, "late", "late", &wire.Encode{Request: wire.Request{ID: "late"}})
	}()
	s.Start()

	if err := <-published; err != nil {
		t.Error(err)
	}
	got := <-waiting
	if len(got) != 1 || request(t, got[0]) != "late" {
		t.Fatalf("the waiting Next got %d messages", len(got))
	}
	ack(t, got[0])
	ack(t, held)
	if q := queue(t, b, bus.StageDecode); q.Pending != 0 || q.InWork != 0 {
		t.Errorf("after the acks: %+v", q)
	}
	ack(t, next(t, consumer(t, b, bus.StageEncode), 1, 1, long)[0])
	if err := b.Send("trireme.test", &wire.Done{}); err != nil {
		t.Error(err)
	}
	select {
	case <-handled:
	case <-time.After(long):
		t.Error("subscription is gone")
	}
	if j, err := b.MarkJoin(t.Context(), "r.1", 0, mem.Handle{Object: 5}, false); err != nil || !j.Complete() {
		t.Errorf("join record: %+v, %v", j, err)
	}
	waitFor(t, view, func(all []wire.Instance) bool { return len(all) == 1 && all[0].Ready })
	cancel()
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	waitFor(t, view, func(all []wire.Instance) bool { return len(all) == 0 })
}

// A server that comes back with an empty store gets its streams, consumers and buckets again.
func TestServerLosesStore(t *testing.T) {
	t.Parallel()
	s := bustest.Run(t)
	b := connect(t, s.URL())
	c := consumer(t, b, bus.StageDecode)
	s.Stop()
	s.Wipe()
	s.Start()
	publish(t, b, bus.StageDecode, "r", "")
	ack(t, next(t, c, 1, 1, long)[0])
	if err := b.CreateJoin(t.Context(), "r.1", join("r", 1)); err != nil {
		t.Error(err)
	}
}

// Who connects leaves streams alone that are as they should be, and changes those that are not.
func TestConnectUpdatesOnlyWhatDiffers(t *testing.T) {
	const bucket = "KV_" + wire.BucketInstances // made last
	b := connect(t, bustest.Run(t).URL())
	updates, err := b.Conn().SubscribeSync("$JS.EVENT.ADVISORY.STREAM.UPDATED.>")
	if err != nil {
		t.Fatal(err)
	}
	updated := func(by string) {
		t.Helper()
		if m, err := updates.NextMsg(time.Minute); err != nil || !strings.HasSuffix(m.Subject, "."+bucket) {
			t.Fatalf("by %s: %v, %v", by, m, err)
		}
	}
	settings := func() jetstream.StreamConfig {
		t.Helper()
		s, err := b.JetStream().Stream(t.Context(), bucket)
		if err != nil {
			t.Fatal(err)
		}
		return s.CachedInfo().Config
	}
	connect(t, b.Conn().ConnectedUrl())
	other := settings()
	other.MaxMsgSize = 1 << 10
	if _, err := b.JetStream().UpdateStream(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	updated("the test, the first one at all")
	connect(t, b.Conn().ConnectedUrl())
	updated("who connected, the first one then")
	if got := settings().MaxMsgSize; got != wire.MaxMessage {
		t.Errorf("messages may have %d bytes, want %d", got, wire.MaxMessage)
	}
}
