package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"trireme.dev/shared/wire"
)

// inventory is what a cluster has taken of anything that can leak.
type inventory struct {
	Objects, Holds, Used              int64 // in the HMM, but for what only its caches keep
	Claims, Orphans, Requests         int
	Connections                       int // to the HMM
	HMMFiles, HMMRoutines             int
	GatewayFiles, GatewayRoutines     int
	Joins, Encodes, Prefills, Decodes uint64 // join records, messages on the queues
	Running, Waiting                  int    // requests, as the gateway sees them
}

// jetstream is a connection of the test's own to the system's NATS, for as long as the test runs.
func (c *cluster) jetstream(tb testing.TB) jetstream.JetStream {
	tb.Helper()
	nc, err := nats.Connect("nats://" + c.nats)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		tb.Fatal(err)
	}
	return js
}

// inventory looks at everything. metrics is the HMM's address for them.
func (c *cluster) inventory(tb testing.TB, js jetstream.JetStream, metrics string) inventory {
	tb.Helper()
	http.DefaultTransport.(*http.Transport).CloseIdleConnections() // they are the test's
	s := c.memory(tb)
	v := inventory{
		Objects: int64(s.Objects - s.Resting), Holds: int64(s.Holds), Claims: s.Claims, Orphans: s.Orphans, Requests: s.Requests,
		Connections: s.Connections,
		Running:     c.metric(tb, "trireme_num_requests_running"), Waiting: c.metric(tb, "trireme_num_requests_waiting"),
		GatewayRoutines: c.metric(tb, "go_goroutines"), HMMRoutines: metricAt(tb, metrics, "go_goroutines"),
		GatewayFiles: files(tb, c.pid(tb, "gateway")), HMMFiles: files(tb, c.pid(tb, "hmm")),
	}
	for _, n := range s.Memory {
		v.Used += n.Used + n.Padded - n.Cached
	}
	for name, n := range map[string]*uint64{
		wire.StreamEncode: &v.Encodes, wire.StreamPrefill: &v.Prefills, wire.StreamDecode: &v.Decodes,
	} {
		stream, err := js.Stream(tb.Context(), name)
		if err != nil {
			tb.Fatal(err)
		}
		*n = stream.CachedInfo().State.Msgs
	}
	bucket, err := js.KeyValue(tb.Context(), wire.BucketJoin)
	if err != nil {
		tb.Fatal(err)
	}
	keys, err := bucket.Keys(tb.Context())
	if err != nil && !errors.Is(err, jetstream.ErrNoKeysFound) {
		tb.Fatal(err)
	}
	v.Joins = uint64(len(keys))
	return v
}

// files is the number of a process' open files.
func files(tb testing.TB, pid int) int {
	tb.Helper()
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		tb.Fatal(err)
	}
	return len(open)
}

// over says what of an inventory is more than at the start. Go's runtime and the HTTP servers keep a few goroutines and
// descriptors that come and go, and a stage that was started again may be about to connect.
func (v inventory) over(start inventory) string {
	const slack = 4
	for _, n := range []*int{&v.HMMRoutines, &v.HMMFiles, &v.GatewayRoutines, &v.GatewayFiles} {
		*n -= slack
	}
	switch {
	case v.Objects > start.Objects, v.Holds > start.Holds, v.Used > start.Used, v.Claims+v.Orphans+v.Requests > 0,
		v.Connections != start.Connections, v.HMMFiles > start.HMMFiles, v.HMMRoutines > start.HMMRoutines,
		v.GatewayFiles > start.GatewayFiles, v.GatewayRoutines > start.GatewayRoutines,
		v.Joins+v.Encodes+v.Prefills+v.Decodes > 0, v.Running+v.Waiting > 0:
		return cmp.Diff(start, v)
	}
	return ""
}

// After many requests, a tenth of them cancelled in the middle, while stages are killed every few seconds, everything that
// they had taken is given back; within 10 s in the full form, which is
//
//	TRIREME_CHAOS=100 go test ./services/trireme/e2e -run TestNothingLeaks -v -timeout 60m
func TestNothingLeaks(t *testing.T) {
	t.Parallel()
	requests, full := disturbances(t, 100, 50)
	metrics := fmt.Sprintf("127.0.0.1:%d", freePort(t))
	settings := filepath.Join(t.TempDir(), "trireme.yaml")
	if err := os.WriteFile(settings, []byte("hmm:\n  metrics: "+metrics+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := start(t, "--topology", "2E2P2D", "--threads", "1", "--config", settings)
	js := c.jetstream(t)
	const kinds = 40
	want := make([]streamed, kinds)
	for i := range want {
		got, err := c.stream(t.Context(), mixed(t, i), nil)
		if err != nil {
			t.Fatal(err)
		}
		want[i] = got
	}
	c.expectNoMemory(t)
	begin := c.inventory(t, js, metrics)

	var next, cancelled atomic.Int64
	var asking sync.WaitGroup
	due := make(chan struct{}, requests)
	began := time.Now()
	for range clients {
		asking.Go(func() {
			for n := int(next.Add(1)); n <= requests; n = int(next.Add(1)) {
				if !full && n%25 == 0 {
					due <- struct{}{} // however fast the machine is
				}
				rng := rand.New(rand.NewPCG(chaosSeed(t), uint64(n)))
				i := rng.IntN(kinds)
				ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
				stop := -1
				if n%10 == 0 {
					stop = rng.IntN(10)
					time.AfterFunc(time.Duration(rng.IntN(400))*time.Millisecond, cancel) // before the first token, too
				}
				got, err := c.stream(ctx, mixed(t, i), func(n int) {
					if n == stop {
						cancel()
					}
				})
				cancel()
				switch {
				case stop >= 0 && err != nil:
					cancelled.Add(1)
				case err != nil || got.text != want[i].text || got.usage.TotalTokens != want[i].usage.TotalTokens:
					t.Errorf("request %d: %v, %q, alone %q", n, err, got.text, want[i].text)
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { defer close(done); asking.Wait() }()
	rng := rand.New(rand.NewPCG(chaosSeed(t), 4))
	kills := 0
	disturb := func() {
		kills++
		kill(t, c.pick(t, rng, []string{"encoder", "prefill", "decoder"}[rng.IntN(3)]))
	}
	tick := time.NewTicker(3 * time.Second)
	defer tick.Stop()
	for asked := false; !asked; {
		select {
		case <-due:
			disturb()
		case <-tick.C:
			disturb()
		case <-done:
			asked = true
		}
	}
	ended, limit := time.Now(), time.Minute
	if full {
		limit = 10 * time.Second
	}
	var last inventory
	for diff := "-"; diff != ""; time.Sleep(100 * time.Millisecond) {
		last = c.inventory(t, js, metrics)
		if diff = last.over(begin); diff != "" && time.Since(ended) > limit {
			t.Fatalf("%v after the last of %d requests (-start +now)\n%s", limit, requests, diff)
		}
	}
	t.Logf("%d requests in %v, %d cancelled, %d kills; all given back after %v: %+v, at the start %+v", requests,
		ended.Sub(began).Round(time.Second), cancelled.Load(), kills, time.Since(ended).Round(time.Millisecond), last, begin)
	if cancelled.Load() == 0 || kills == 0 {
		t.Error("the test disturbs nothing")
	}
}

// metricAt reads a number without labels from an address that serves metrics.
func metricAt(tb testing.TB, addr, name string) int {
	tb.Helper()
	return (&cluster{url: "http://" + addr}).metric(tb, name)
}
