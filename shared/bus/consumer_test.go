package bus_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/wire"
)

func consumer(t *testing.T, b *bus.Bus, stage string) *bus.Consumer {
	t.Helper()
	c, err := b.Consumer(t.Context(), stage)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// next takes exactly n messages in one call.
func next(t *testing.T, c *bus.Consumer, limit, n int, wait time.Duration) []*bus.Delivery {
	t.Helper()
	got, err := c.Next(t.Context(), limit, wait)
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != n {
		t.Fatalf("Next(%d) took %d messages, want %d", limit, len(got), n)
	}
	return got
}

// messages counts what publish made ids for.
var messages atomic.Int64

// publish stores one message. An empty msgID is one of its own: without any, a try that is slow to be confirmed leaves a
// second message.
func publish(t *testing.T, b *bus.Bus, stage, request, msgID string) {
	t.Helper()
	if msgID == "" {
		msgID = fmt.Sprintf("message%d", messages.Add(1))
	}
	m := &wire.Encode{Request: wire.Request{ID: request, Attempt: 1}}
	if err := b.Publish(t.Context(), stage, request, msgID, m); err != nil {
		t.Fatal(err)
	}
}

func request(t *testing.T, d *bus.Delivery) string {
	t.Helper()
	var m wire.Encode
	if err := wire.Unmarshal(d.Data, &m); err != nil {
		t.Fatal(err)
	}
	return m.Request.ID
}

func ack(t *testing.T, d *bus.Delivery) {
	t.Helper()
	if err := d.Ack(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func queue(t *testing.T, b *bus.Bus, stage string) bus.Queue {
	t.Helper()
	queues, err := b.Queues(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, q := range queues {
		if q.Stage == stage {
			return q
		}
	}
	t.Fatalf("no queue of stage %s", stage)
	return bus.Queue{}
}

// pending is a queue when the server has counted that many messages, or what it says after a long while: it counts a
// message a moment after it has acknowledged its publication.
func pending(t *testing.T, b *bus.Bus, stage string, n uint64) bus.Queue {
	t.Helper()
	q := queue(t, b, stage)
	for end := time.Now().Add(long); q.Pending < n && time.Now().Before(end); {
		q = queue(t, b, stage)
	}
	return q
}

// waitForPull waits until a pull request is at the server.
func waitForPull(t *testing.T, b *bus.Bus, stage string) {
	t.Helper()
	for end := time.Now().Add(long); queue(t, b, stage).Waiting == 0; {
		if time.Now().After(end) {
			t.Fatal("no pull request arrives")
		}
	}
}

func TestPublishTakeAck(t *testing.T) {
	t.Parallel()
	b := connect(t, bustest.Run(t).URL())
	c := consumer(t, b, bus.StageEncode)
	next(t, c, 4, 0, 0)
	for _, id := range []string{"a", "b", "c"} {
		publish(t, b, bus.StageEncode, id, id)
	}
	if q := pending(t, b, bus.StageEncode, 3); q.Pending != 3 || q.InWork != 0 || q.Oldest <= 0 {
		t.Errorf("before taking: %+v", q)
	}
	got := next(t, c, 2, 2, long)
	got = append(got, next(t, c, 2, 1, long)...)
	var ids []string
	for _, d := range got {
		ids = append(ids, request(t, d))
		if d.Count != 1 {
			t.Errorf("first delivery counts %d", d.Count)
		}
	}
	slices.Sort(ids)
	if !slices.Equal(ids, []string{"a", "b", "c"}) {
		t.Errorf("took %v", ids)
	}
	if q := queue(t, b, bus.StageEncode); q.Pending != 0 || q.InWork != 3 {
		t.Errorf("while in work: %+v", q)
	}
	for _, d := range got {
		ack(t, d)
		ack(t, d) // an ack whose answer was lost is sent again
	}
	if q := queue(t, b, bus.StageEncode); q.Pending != 0 || q.InWork != 0 || q.Oldest != 0 {
		t.Errorf("after the acks: %+v", q)
	}
}

// A waiting Next returns with the first message and leaves the rest of its limit alone.
func TestNextReturnsWithFirst(t *testing.T) {
	t.Parallel()
	b := connect(t, bustest.Run(t).URL())
	c := consumer(t, b, bus.StageDecode)
	type result struct {
		got []*bus.Delivery
		err error
	}
	done := make(chan result, 1)
	go func() {
		got, err := c.Next(context.Background(), 64, long)
		done <- result{got, err}
	}()
	waitForPull(t, b, bus.StageDecode)
	start := time.Now()
	publish(t, b, bus.StageDecode, "r", "")
	r := <-done
	if r.err != nil || len(r.got) != 1 {
		t.Fatalf("Next: %d messages, %v", len(r.got), r.err)
	}
	if took := time.Since(start); took > long/2 {
		t.Errorf("Next waited %v after the first message", took)
	}
	// The ended pull request takes no message: another consumer gets it.
	publish(t, b, bus.StageDecode, "s", "")
	next(t, consumer(t, b, bus.StageDecode), 64, 1, long)
}

func TestEachMessageToOne(t *testing.T) {
	t.Parallel()
	url := bustest.Run(t).URL()
	const instances, messages = 4, 200
	taken := make(chan string, messages*2)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for range instances {
		b := connect(t, url)
		c := consumer(t, b, bus.StagePrefill)
		go func() {
			for {
				got, err := c.Next(ctx, 3, long)
				if err != nil {
					return
				}
				for _, d := range got {
					var m wire.Encode
					if wire.Unmarshal(d.Data, &m) == nil && d.Ack(ctx) == nil {
						taken <- m.Request.ID
					}
				}
			}
		}()
	}
	b := connect(t, url)
	for i := range messages {
		publish(t, b, bus.StagePrefill, string(rune('0'+i/100))+string(rune('0'+i/10%10))+string(rune('0'+i%10)), "")
	}
	seen := map[string]int{}
	for len(seen) < messages {
		select {
		case id := <-taken:
			seen[id]++
		case <-time.After(long):
			t.Fatalf("%d of %d messages arrived", len(seen), messages)
		}
	}
	cancel()
	if q := queue(t, b, bus.StagePrefill); q.Pending+uint64(q.InWork) != 0 {
		t.Errorf("left over: %+v", q)
	}
	for id, n := range seen {
		if n != 1 {
			t.Errorf("message %s was taken %d times", id, n)
		}
	}
}

func TestDropIsRedelivered(t *testing.T) {
	t.Parallel()
	b := connect(t, bustest.Run(t).URL(), bus.WithAckWait(2*time.Second))
	c := consumer(t, b, bus.StageDecode)
	publish(t, b, bus.StageDecode, "r", "")
	d := next(t, c, 1, 1, long)[0]
	d.Drop()
	again := next(t, c, 1, 1, long)[0]
	if again.Count != 2 || request(t, again) != "r" {
		t.Errorf("redelivery counts %d", again.Count)
	}
	ack(t, again)
	next(t, c, 1, 0, 0)
}

func TestInProgressOutlivesAckWait(t *testing.T) {
	t.Parallel()
	const ackWait = 8 * time.Second // of which a third passes between two signs of life: the rest is for a machine that stands still
	b := connect(t, bustest.Run(t).URL(), bus.WithAckWait(ackWait))
	c := consumer(t, b, bus.StageDecode)
	publish(t, b, bus.StageDecode, "r", "")
	d := next(t, c, 1, 1, long)[0]
	next(t, c, 1, 0, ackWait*3/2)
	ack(t, d)
	if q := queue(t, b, bus.StageDecode); q.InWork != 0 || q.Redelivered != 0 {
		t.Errorf("after the ack: %+v", q)
	}
}

func TestNakAndNakReply(t *testing.T) {
	t.Parallel()
	url := bustest.Run(t).URL()
	b, other := connect(t, url), connect(t, url)
	c := consumer(t, b, bus.StageDecode)
	publish(t, b, bus.StageDecode, "r", "")
	d := next(t, c, 1, 1, long)[0]
	if err := d.Nak(0); err != nil {
		t.Fatal(err)
	}
	d = next(t, c, 1, 1, long)[0]
	if d.Count != 2 {
		t.Errorf("delivery after nak counts %d", d.Count)
	}
	// Its taker "dies"; a sibling gives the message back by the reply subject of the claim. AckWait is 30 s here.
	start := time.Now()
	d.Drop()
	if err := other.NakReply(d.Reply, 0); err != nil {
		t.Fatal(err)
	}
	d = next(t, consumer(t, other, bus.StageDecode), 1, 1, long)[0]
	t.Logf("redelivered %v after NakReply", time.Since(start))
	if d.Count != 3 {
		t.Errorf("delivery after NakReply counts %d", d.Count)
	}
	if err := d.Nak(time.Hour); err != nil {
		t.Fatal(err)
	}
	next(t, c, 1, 0, 100*time.Millisecond)
}

// What Next has not handed out when the Bus closes goes to another instance at once.
func TestCloseEndsNext(t *testing.T) {
	t.Parallel()
	url := bustest.Run(t).URL()
	b := connect(t, url)
	c := consumer(t, b, bus.StageEncode)
	done := make(chan error, 1)
	go func() {
		_, err := c.Next(context.Background(), 1, time.Hour)
		done <- err
	}()
	other := connect(t, url)
	waitForPull(t, other, bus.StageEncode)
	b.Close()
	if err := <-done; !errors.Is(err, bus.ErrClosed) {
		t.Errorf("Next of a closed Bus: %v", err)
	}
	publish(t, other, bus.StageEncode, "r", "")
	next(t, consumer(t, other, bus.StageEncode), 1, 1, long)
	if err := b.Publish(t.Context(), bus.StageEncode, "r", "", &wire.Done{}); !errors.Is(err, nats.ErrConnectionClosed) {
		t.Errorf("Publish on a closed Bus: %v", err)
	}
}

func TestNextEndsWithContext(t *testing.T) {
	t.Parallel()
	b := connect(t, bustest.Run(t).URL())
	c := consumer(t, b, bus.StageEncode)
	cause := errors.New("the instance stops")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	if _, err := c.Next(ctx, 1, long); !errors.Is(err, cause) {
		t.Errorf("Next: %v", err)
	}
}

// An instance that stops waiting takes nothing more, though its pull request was at the server first.
func TestGivenUpPullTakesNothing(t *testing.T) {
	t.Parallel()
	url := bustest.Run(t).URL()
	stopping, other := connect(t, url), connect(t, url)
	c := consumer(t, stopping, bus.StageDecode)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := c.Next(ctx, 16, time.Hour)
		done <- err
	}()
	waitForPull(t, other, bus.StageDecode)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("Next: %v", err)
	}
	want := []string{"a", "b", "c"}
	for _, id := range want {
		publish(t, other, bus.StageDecode, id, "")
	}
	// One that was on its way to the first instance comes a moment later.
	var ids []string
	for to := consumer(t, other, bus.StageDecode); len(ids) < len(want); {
		got, err := to.Next(t.Context(), 16, long)
		if err != nil || len(got) == 0 {
			t.Fatalf("took %v, then %v", ids, err)
		}
		for _, d := range got {
			ids = append(ids, request(t, d))
			ack(t, d)
		}
	}
	slices.Sort(ids)
	if !slices.Equal(ids, want) {
		t.Errorf("took %v, want %v", ids, want)
	}
	// The first can go on where it stopped.
	publish(t, other, bus.StageDecode, "d", "")
	ack(t, next(t, c, 16, 1, long)[0])
}

func TestNextOfNothing(t *testing.T) {
	t.Parallel()
	b := connect(t, bustest.Run(t).URL())
	publish(t, b, bus.StageEncode, "r", "")
	next(t, consumer(t, b, bus.StageEncode), 0, 0, long)
	if q := pending(t, b, bus.StageEncode, 1); q.Pending != 1 || q.InWork != 0 {
		t.Errorf("a limit of 0 took a message: %+v", q)
	}
}

func TestMessageIDsAreStoredOnce(t *testing.T) {
	t.Parallel()
	b := connect(t, bustest.Run(t).URL())
	for range 3 {
		publish(t, b, bus.StagePrefill, "r", "r.1")
	}
	publish(t, b, bus.StagePrefill, "r", "r.2")
	publish(t, b, bus.StageDecode, "r", "r.1") // another stage's queue
	if q := pending(t, b, bus.StagePrefill, 2); q.Pending != 2 {
		t.Errorf("%d messages are stored, want 2", q.Pending)
	}
	if q := pending(t, b, bus.StageDecode, 1); q.Pending != 1 {
		t.Errorf("%d messages are stored, want 1", q.Pending)
	}
}

// Of those who wait for a message the one at the lowest level gets it, whoever asked first; and who asks differently than before
// is counted as asking now.
func TestLowestLevelTakesFirst(t *testing.T) {
	t.Parallel()
	b := connect(t, bustest.Run(t).URL())
	takers := []*bus.Consumer{consumer(t, b, bus.StageEncode), consumer(t, b, bus.StageEncode), consumer(t, b, bus.StageEncode)}
	type took struct {
		level int
		got   []*bus.Delivery
	}
	taken := make(chan took, 8)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	stale := make(chan struct{})
	ask := func(i, level int, stale <-chan struct{}) {
		go func() {
			got, _ := takers[i].Take(ctx, bus.Ask{Limit: 4, Wait: long, Level: level, Stale: stale})
			taken <- took{level, got}
		}()
	}
	waiting := func(n int) {
		t.Helper()
		for deadline := time.Now().Add(long); ; time.Sleep(time.Millisecond) {
			q, err := b.Queues(t.Context())
			if err == nil && q[0].Waiting == n {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%d do not wait: %v, %v", n, q, err)
			}
		}
	}
	for i, level := range []int{bus.MaxLevel, 3, 1} {
		if i == 1 {
			ask(i, level, stale)
		} else {
			ask(i, level, nil)
		}
		waiting(i + 1)
	}
	for _, want := range []int{1, 0, bus.MaxLevel} {
		if want == 0 { // the one in the middle has become the idlest
			close(stale)
			if x := <-taken; x.got != nil || x.level != 3 {
				t.Fatalf("a stale wait at level %d ended with %v", x.level, x.got)
			}
			waiting(1)
			ask(1, 0, nil)
			waiting(2)
		}
		publish(t, b, bus.StageEncode, fmt.Sprint("for", want), "")
		x := <-taken
		if x.level != want || len(x.got) != 1 || request(t, x.got[0]) != fmt.Sprint("for", want) {
			t.Fatalf("the message went to level %d, want %d", x.level, want)
		}
		if err := x.got[0].Ack(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

// What nobody has taken has an age of its own.
func TestQueueTellsHowLongNobodyTakes(t *testing.T) {
	t.Parallel()
	b := connect(t, bustest.Run(t).URL())
	c := consumer(t, b, bus.StagePrefill)
	publish(t, b, bus.StagePrefill, "first", "")
	taken := next(t, c, 1, 1, long)
	if q := queue(t, b, bus.StagePrefill); q.Untaken != 0 || q.Oldest == 0 {
		t.Errorf("with all taken, the oldest untaken is %v and the oldest %v", q.Untaken, q.Oldest)
	}
	publish(t, b, bus.StagePrefill, "second", "")
	q := pending(t, b, bus.StagePrefill, 1)
	if q.Pending != 1 || q.Untaken <= 0 {
		t.Errorf("%d wait, the oldest for %v; the oldest at all is %v", q.Pending, q.Untaken, q.Oldest)
	}
	ack(t, taken[0])
}
