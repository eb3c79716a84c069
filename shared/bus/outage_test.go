package bus_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/wire"
)

// electionWait is how long a message may take that falls into an election of a cluster on a busy machine.
const electionWait = 2 * time.Minute

// traffic is publishers and takers of one stage who go on until they are told to stop. Every message that was published is
// taken, and its join record, as those of requests with pictures are, is made, marked and found.
type traffic struct {
	t       *testing.T
	publish *bus.Bus
	take    *bus.Bus
	stop    context.CancelFunc

	publishing, taking sync.WaitGroup

	mu        sync.Mutex
	published map[string]bool
	acked     map[string]int
	progress  int // messages acked at all
}

func startTraffic(t *testing.T, publish, take *bus.Bus) *traffic {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	r := &traffic{t: t, publish: publish, take: take, stop: stop, published: map[string]bool{}, acked: map[string]int{}}
	c := consumer(t, take, bus.StageDecode)
	for i := range 4 {
		r.publishing.Go(func() {
			for k := 0; ctx.Err() == nil; k++ {
				r.one(fmt.Sprintf("r%d-%d", i, k))
			}
		})
	}
	taking, end := context.WithCancel(context.Background())
	r.taking.Go(func() {
		for taking.Err() == nil {
			got, err := c.Next(taking, 8, time.Second)
			if err != nil && taking.Err() == nil {
				t.Error(err)
				return
			}
			for _, d := range got {
				r.taking.Go(func() { r.work(d) })
			}
		}
	})
	t.Cleanup(func() { stop(); r.publishing.Wait(); end(); r.taking.Wait() })
	return r
}

func (r *traffic) one(id string) {
	ctx, cancel := context.WithTimeout(context.Background(), electionWait)
	defer cancel()
	if err := r.publish.CreateJoin(ctx, id, join(id, 1)); err != nil {
		r.t.Error(err)
		return
	}
	if err := r.publish.Publish(ctx, bus.StageDecode, id, id, &wire.Encode{Request: wire.Request{ID: id}}); err != nil {
		r.t.Error(err)
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.published[id] = true
}

func (r *traffic) work(d *bus.Delivery) {
	ctx, cancel := context.WithTimeout(context.Background(), electionWait)
	defer cancel()
	id := request(r.t, d)
	j, err := r.take.MarkJoin(ctx, id, 0, mem.Handle{Object: 7}, false)
	r.mu.Lock()
	again := r.acked[id] > 0 // then its record is deleted
	r.mu.Unlock()
	if !again && (err != nil || !j.Complete()) {
		r.t.Errorf("the join record of %s: %+v, %v", id, j, err)
	}
	if err := d.Ack(ctx); err != nil {
		r.t.Error(err)
	}
	r.mu.Lock()
	r.acked[id]++
	r.progress++
	r.mu.Unlock()
	if err := r.take.DeleteJoin(ctx, id); err != nil {
		r.t.Error(err)
	}
}

// await waits until n more messages were taken and acked.
func (r *traffic) await(n int) {
	r.t.Helper()
	r.mu.Lock()
	goal := r.progress + n
	r.mu.Unlock()
	for deadline := time.Now().Add(electionWait); ; time.Sleep(5 * time.Millisecond) {
		r.mu.Lock()
		now := r.progress
		r.mu.Unlock()
		if now >= goal {
			return
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("%d messages were taken, waiting for %d", now, goal)
		}
	}
}

// end stops the publishers and waits until every message that was published has been taken.
func (r *traffic) end() {
	r.t.Helper()
	r.stop()
	r.publishing.Wait()
	for deadline := time.Now().Add(electionWait); ; time.Sleep(5 * time.Millisecond) {
		r.mu.Lock()
		var open string
		for id := range r.published {
			if r.acked[id] == 0 {
				open = id
			}
		}
		n := len(r.published)
		r.mu.Unlock()
		if open == "" {
			r.t.Logf("%d messages", n)
			return
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("%s was published and never taken", open)
		}
	}
}

// A server that is killed and started again on the same store loses nothing that it has confirmed, whatever it was doing.
func TestServerIsKilled(t *testing.T) {
	t.Parallel()
	p := bustest.RunProcess(t)
	r := startTraffic(t, connect(t, p.URL(), bus.WithAckWait(time.Second)), connect(t, p.URL(), bus.WithAckWait(time.Second)))
	for range 3 {
		r.await(50)
		p.Kill()
		p.Start()
	}
	r.await(50)
	r.end()
}

// In a cluster of three, streams and buckets are on all of them, and the loss of a leader loses nothing.
func TestClusterLosesItsLeader(t *testing.T) {
	t.Parallel()
	c := bustest.RunCluster(t, 3)
	b := connect(t, c.URL(), bus.WithAckWait(time.Second))
	for _, stream := range []string{
		wire.StreamEncode, wire.StreamPrefill, wire.StreamDecode, "KV_" + wire.BucketJoin, "KV_" + wire.BucketInstances,
	} {
		s, err := b.JetStream().Stream(t.Context(), stream)
		if err != nil {
			t.Fatal(err)
		}
		if info := s.CachedInfo(); info.Config.Replicas != 3 {
			t.Errorf("stream %s has %d replicas", stream, info.Config.Replicas)
		}
		if stream[:3] == "KV_" {
			continue
		}
		consumers := s.ListConsumers(t.Context())
		for info := range consumers.Info() {
			if info.Cluster == nil || len(info.Cluster.Replicas) != 2 {
				t.Errorf("consumer %s is not on all servers: %+v", info.Name, info.Cluster)
			}
		}
	}
	view, err := b.Instances(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	stopped := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		stopped <- b.Announce(ctx, func() wire.Instance { return wire.Instance{ID: "d0", Role: "decode"} })
	}()
	r := startTraffic(t, b, connect(t, c.URL(), bus.WithAckWait(time.Second)))
	for _, stream := range []string{wire.StreamDecode, "KV_" + wire.BucketJoin, "KV_" + wire.BucketInstances} {
		r.await(50)
		leader := c.Leader(stream)
		c.Stop(leader)
		r.await(50)
		c.Start(leader)
	}
	r.end()
	waitFor(t, view, func(all []wire.Instance) bool { return len(all) == 1 })
	cancel()
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

// Who connects later changes nothing about the replicas, unless it was told a number.
func TestReplicasStay(t *testing.T) {
	t.Parallel()
	c := bustest.RunCluster(t, 3)
	replicas := func(b *bus.Bus) int {
		s, err := b.JetStream().Stream(t.Context(), wire.StreamEncode)
		if err != nil {
			t.Fatal(err)
		}
		return s.CachedInfo().Config.Replicas
	}
	if n := replicas(connect(t, c.URL(), bus.WithReplicas(1))); n != 1 {
		t.Errorf("%d replicas, one was asked for", n)
	}
	if n := replicas(connect(t, c.URL())); n != 1 {
		t.Errorf("%d replicas after the automatic choice, there was one", n)
	}
	if n := replicas(connect(t, c.URL(), bus.WithReplicas(3))); n != 3 {
		t.Errorf("%d replicas, three were asked for", n)
	}
}

// A server that answers and stores nothing is told apart from one that is away: only the first is given up.
func TestPublishWithinGivesUp(t *testing.T) {
	t.Parallel()
	s := bustest.Run(t)
	b := connect(t, s.URL())
	js := b.JetStream()
	stream, err := js.Stream(t.Context(), wire.StreamEncode)
	if err != nil {
		t.Fatal(err)
	}
	limit := func(n int64) {
		cfg := stream.CachedInfo().Config
		cfg.MaxMsgs = n
		if _, err := js.UpdateStream(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
	}
	limit(1)
	publish(t, b, bus.StageEncode, "first", "first")
	m := &wire.Encode{Request: wire.Request{ID: "second"}}
	err = b.PublishWithin(t.Context(), 50*time.Millisecond, bus.StageEncode, "second", "second", m)
	if !errors.Is(err, bus.ErrNoStore) {
		t.Errorf("publishing on a full stream: %v", err)
	}
	var api *jetstream.APIError
	if !errors.As(err, &api) {
		t.Errorf("the error does not say what the server says: %v", err)
	}
	s.Stop()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	err = b.PublishWithin(ctx, 50*time.Millisecond, bus.StageEncode, "second", "second", m)
	if errors.Is(err, bus.ErrNoStore) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("publishing without a server: %v", err)
	}
	s.Start()
	ack(t, next(t, consumer(t, b, bus.StageEncode), 1, 1, long)[0])
	if err := b.PublishWithin(t.Context(), time.Minute, bus.StageEncode, "second", "second", m); err != nil {
		t.Errorf("publishing when there is room again: %v", err)
	}
}

// When the disk is full, publishers learn it and nothing that was confirmed is lost; when there is room again, all goes on.
func TestDiskIsFull(t *testing.T) {
	disk := bustest.NewDisk(t, "16m")
	b := connect(t, bustest.RunAt(t, disk.Dir).URL(), bus.WithAckWait(time.Second))
	c := consumer(t, b, bus.StagePrefill)
	send := func(i int, patience time.Duration) error {
		id := fmt.Sprint("r", i)
		m := &wire.Prefill{Request: wire.Request{ID: id}, Inline: make([]byte, wire.MaxMessage/2)}
		return b.PublishWithin(t.Context(), patience, bus.StagePrefill, id, id, m)
	}
	if err := send(0, time.Minute); err != nil {
		t.Fatal(err)
	}
	disk.Fill()
	var err error
	stored := 1
	for ; err == nil; stored++ {
		err = send(stored, time.Second)
	}
	stored--
	if !errors.Is(err, bus.ErrNoStore) {
		t.Fatalf("with a full disk: %v", err)
	}
	disk.Free()
	// The last one was refused: nobody must rely on it, nor on its absence.
	for i := stored; i < stored+3; i++ {
		if err := send(i, time.Minute); err != nil {
			t.Fatalf("with room again: %v", err)
		}
	}
	seen := map[string]bool{}
	for len(seen) < stored+3 {
		got, err := c.Next(t.Context(), 16, long)
		if err != nil || len(got) == 0 {
			t.Fatalf("%d of %d messages: %v", len(seen), stored+3, err)
		}
		for _, d := range got {
			var m wire.Prefill
			if err := wire.Unmarshal(d.Data, &m); err != nil {
				t.Fatal(err)
			}
			seen[m.Request.ID] = true
			ack(t, d)
		}
	}
}
