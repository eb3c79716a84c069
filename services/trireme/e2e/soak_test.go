package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/openai/openai-go/v3"

	"trireme.dev/shared/bus/bustest"
)

// mostOpen bounds the requests that are open at once, for a machine that has become slower than it was when its capacity
// was measured: what comes beyond it comes late, and is counted.
const mostOpen = 4 * clients

// soak sends requests and compares each answer with the undisturbed one.
type soak struct {
	c    *cluster
	ask  []openai.ChatCompletionNewParams
	want []streamed

	mu       sync.Mutex
	ended    sync.Cond
	open     map[int]bool // numbers of requests
	next     int
	late     int
	most     int // open at once
	answers  int
	tokens   int64
	firsts   []time.Duration
	troubles []string
}

func newSoak(tb testing.TB, c *cluster) *soak {
	tb.Helper()
	l := newLoad(tb, c)
	s := &soak{c: c, ask: l.ask, want: l.want, open: map[int]bool{}}
	s.ended.L = &s.mu
	return s
}

// send begins the next request, as soon as fewer than limit are open, and does not wait for its answer.
func (s *soak) send(limit int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for waited := false; len(s.open) >= limit; s.ended.Wait() {
		if !waited && limit == mostOpen {
			s.late++
		}
		waited = true
	}
	n := s.next
	s.next++
	s.open[n] = true
	s.most = max(s.most, len(s.open))
	go s.one(n)
}

func (s *soak) one(n int) {
	i := n % len(s.ask)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	got, err := s.c.stream(ctx, s.ask[i], nil)
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, n)
	s.ended.Broadcast()
	s.answers++
	s.tokens += got.usage.CompletionTokens
	s.firsts = append(s.firsts, got.first)
	want := &s.want[i]
	if err != nil || got.text != want.text || got.finish != want.finish || got.usage.TotalTokens != want.usage.TotalTokens {
		s.troubles = append(s.troubles, fmt.Sprintf("request %d at %s: %v, %q (%s, %d tokens)\nundisturbed %q (%s, %d tokens)", n,
			time.Now().Format("15:04:05.000"), err, got.text, got.finish, got.usage.TotalTokens, want.text, want.finish, want.usage.TotalTokens))
	}
}

// waitBefore waits until the requests that were begun before the n-th have ended. They all end: each has its time.
func (s *soak) waitBefore(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for slices.ContainsFunc(s.numbers(), func(o int) bool { return o < n }) {
		s.ended.Wait()
	}
}

func (s *soak) numbers() []int {
	var all []int
	for n := range s.open {
		all = append(all, n)
	}
	return all
}

// begun is how many requests there have been.
func (s *soak) begun() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.next
}

// capacity is how many requests a second are answered with 16 always open.
func (s *soak) capacity(requests int) float64 {
	began := time.Now()
	for range requests {
		s.send(clients)
	}
	s.waitBefore(s.begun())
	return float64(requests) / time.Since(began).Seconds()
}

// arrive sends requests at a rate, as independent clients do, until stop is closed; it returns when all have ended.
func (s *soak) arrive(rate float64, rng *rand.Rand, stop <-chan struct{}) {
	for at := time.Now(); ; {
		at = at.Add(time.Duration(rng.ExpFloat64() / rate * float64(time.Second)))
		select {
		case <-stop:
			s.waitBefore(s.begun())
			return
		case <-time.After(time.Until(at)):
		}
		s.send(mostOpen)
	}
}

// footprint is what a long run may not make larger, beside what inventory has.
type footprint struct {
	Heap, Gateway, Up  int // bytes: the gateway's Go heap, memory resident of the gateway and of up
	Streams, Consumers int // without the watchers of buckets
	Watchers           int
}

func (c *cluster) footprint(tb testing.TB, js jetstream.JetStream) footprint {
	tb.Helper()
	f := footprint{
		// What lives after a collection, doubled (GOGC=100): free of what is only not collected yet.
		Heap:    c.metric(tb, "go_memstats_next_gc_bytes") / 2,
		Gateway: resident(tb, c.pid(tb, "gateway")), Up: resident(tb, c.cmd.Process.Pid),
	}
	streams := js.ListStreams(tb.Context())
	for s := range streams.Info() {
		f.Streams++
		if strings.HasPrefix(s.Config.Name, "KV_") {
			f.Watchers += s.State.Consumers
		} else {
			f.Consumers += s.State.Consumers
		}
	}
	if err := streams.Err(); err != nil {
		tb.Fatal(err)
	}
	return f
}

// resident is a process' memory in RAM, proc_pid_statm(5).
func resident(tb testing.TB, pid int) int {
	tb.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	var size, pages int
	if err == nil {
		_, err = fmt.Sscan(string(data), &size, &pages)
	}
	if err != nil {
		tb.Fatal(err)
	}
	return pages * os.Getpagesize()
}

// checkGrowth compares with the beginning. Memory may double and grow by 32 MiB: the most that was open at once differs, and
// Go gives pages back late. A request leaves a kilobyte behind unnoticed, but not for half an hour. A stage
// that is killed, or ends because its HMM was, leaves the consumer with which it watched the instances for five minutes.
func (f footprint) checkGrowth(tb testing.TB, begin footprint, kills map[string]int) {
	tb.Helper()
	for _, x := range []struct {
		what       string
		begin, now int
	}{
		{"the gateway's heap", begin.Heap, f.Heap}, {"the gateway's memory", begin.Gateway, f.Gateway}, {"up's memory", begin.Up, f.Up},
	} {
		if x.now > 2*x.begin+32<<20 {
			tb.Errorf("%s has grown from %d to %d bytes", x.what, x.begin, x.now)
		}
	}
	left := kills["encoder"] + kills["prefill"] + kills["decoder"] + 6*kills["hmm"]
	if f.Streams != begin.Streams || f.Consumers != begin.Consumers || f.Watchers > begin.Watchers+left {
		tb.Errorf("%d streams, %d consumers and %d watchers; at the beginning %d, %d and %d, and %d watchers may be left by the dead",
			f.Streams, f.Consumers, f.Watchers, begin.Streams, begin.Consumers, begin.Watchers, left)
	}
}

// Requests arrive at 80% of what the system can do while every service but the gateway is killed again and again, HMM and
// NATS included: no answer is lost or wrong, and nothing grows. It is short by default and kills each once at least; the
// full form is
//
//	TRIREME_SOAK=30m go test ./services/trireme/e2e -run TestSoak -v -timeout 60m
func TestSoak(t *testing.T) {
	t.Parallel()
	// In the full form kills are rarer: at 80% of capacity there is a fifth to spare for what they undo, and all stages load
	// their weights anew after one of the HMM. In the short form it is enough that requests end in time.
	length, measured, pause := 20*time.Second, 2*clients, 1500*time.Millisecond
	if v := os.Getenv("TRIREME_SOAK"); v != "" {
		var err error
		if length, err = time.ParseDuration(v); err != nil {
			t.Fatalf("TRIREME_SOAK is %q, want a time: %v", v, err)
		}
		measured, pause = 10*clients, 10*time.Second
	}
	metrics := fmt.Sprintf("127.0.0.1:%d", freePort(t))
	settings := filepath.Join(t.TempDir(), "trireme.yaml")
	if err := os.WriteFile(settings, []byte("hmm:\n  metrics: "+metrics+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	server := bustest.RunProcess(t)              // the one inside `trireme up` cannot be killed
	patient := []string{"TRIREME_QUEUE_WAIT=5m"} // a machine that has become slow is no reason to refuse
	c := startWith(t, patient, "--topology", "2E2P2D", "--threads", "1", "--config", settings, "--nats-url", server.URL())
	c.nats = strings.TrimPrefix(server.URL(), "nats://")
	nc, err := nats.Connect(server.URL(), nats.MaxReconnects(-1), nats.ReconnectWait(50*time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	s := newSoak(t, c)
	before := s.capacity(measured)
	c.expectNoMemory(t)
	begin, beginSize := c.inventory(t, js, metrics), c.footprint(t, js)

	rng := rand.New(rand.NewPCG(chaosSeed(t), 5))
	stop, arrived := make(chan struct{}), make(chan struct{})
	from, began := s.begun(), time.Now()
	go func() {
		defer close(arrived)
		s.arrive(0.8*before, rand.New(rand.NewPCG(chaosSeed(t), 6)), stop)
	}()
	kills := map[string]int{}
	round := []string{"encoder", "prefill", "decoder", "hmm", "encoder", "prefill", "decoder", "nats"}
	for n := 0; n < len(round) || time.Since(began) < length; n++ {
		if n%len(round) == 0 {
			rng.Shuffle(len(round), func(i, j int) { round[i], round[j] = round[j], round[i] })
		}
		time.Sleep(pause/2 + time.Duration(rng.Int64N(int64(pause))))
		role := round[n%len(round)]
		kills[role]++
		switch role {
		case "nats":
			server.Kill()
			server.Start()
		case "hmm":
			kill(t, c.pid(t, role))
			s.waitBefore(s.begun()) // a request has three attempts
		default:
			kill(t, c.pick(t, rng, role))
		}
	}
	asked := s.begun() - from
	took := time.Since(began)
	close(stop)
	<-arrived
	c.waitReady(t)
	slices.Sort(s.firsts)
	t.Logf("%d requests in %v at %.2f/s, 80%% of %.2f/s; %d held back, at most %d open; kills: %v; %d attempts started again; "+
		"first token p50 %v, p99 %v", asked, took.Round(time.Second), 0.8*before, before, s.late, s.most, kills,
		c.metric(t, "trireme_request_restarts_total"), quantile(s.firsts, 0.5), quantile(s.firsts, 0.99))

	after := s.capacity(measured)
	for _, trouble := range s.troubles {
		t.Error(trouble)
	}
	ended := time.Now()
	for diff := "-"; diff != ""; time.Sleep(100 * time.Millisecond) {
		if diff = c.inventory(t, js, metrics).over(begin); diff != "" && time.Since(ended) > time.Minute {
			t.Fatalf("a minute after the last request (-start +now)\n%s", diff)
		}
	}
	size := c.footprint(t, js)
	t.Logf("capacity %.2f/s before, %.2f/s after; all given back after %v; %+v, at the beginning %+v", before, after,
		time.Since(ended).Round(time.Millisecond), size, beginSize)
	size.checkGrowth(t, beginSize, kills)
}
