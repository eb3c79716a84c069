package e2e

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/openai/openai-go/v3"
)

// The tests here kill and stop processes at random moments while 16 clients stream. They are short by default; the full
// form is
//
//	TRIREME_CHAOS=100 go test ./services/trireme/e2e -run 'Chaos' -v -timeout 60m
//
// where the number is that of kills. TRIREME_CHAOS_SEED draws other moments.

// disturbances is how many there are in a test: few by default, in the full form TRIREME_CHAOS of them, or its share of it.
func disturbances(tb testing.TB, few int, share float64) (n int, full bool) {
	tb.Helper()
	v := os.Getenv("TRIREME_CHAOS")
	if v == "" {
		return few, false
	}
	all, err := strconv.Atoi(v)
	if err != nil || all < 1 {
		tb.Fatalf("TRIREME_CHAOS is %q, want a number of kills", v)
	}
	return max(1, int(float64(all)*share)), true
}

func chaosSeed(tb testing.TB) uint64 {
	tb.Helper()
	v := os.Getenv("TRIREME_CHAOS_SEED")
	if v == "" {
		return 1
	}
	seed, err := strconv.ParseUint(v, 10, 64)
	if err != nil {
		tb.Fatalf("TRIREME_CHAOS_SEED is %q, want a number", v)
	}
	return seed
}

// clients is how many streams are open at any time.
const clients = 16

// load is 16 clients who ask one thing after another, each the same again and again, until they are told to stop.
type load struct {
	c    *cluster
	ask  []openai.ChatCompletionNewParams
	want []streamed // what each gets undisturbed

	stop    atomic.Bool
	running sync.WaitGroup

	mu       sync.Mutex
	answers  int
	of       [clients]int // answers by client
	prompts  int64        // tokens of all answers' prompts
	troubles []string
	gaps     []gap
}

// gap is a time between two pieces of one stream.
type gap struct{ from, to time.Time }

// disturbed makes requests for a load: 0 to 4 pictures, greedy and seeded, one or two choices, long enough to be hit.
func disturbed(tb testing.TB, i int) openai.ChatCompletionNewParams {
	tb.Helper()
	p := mixed(tb, i)
	p.MaxTokens = openai.Int(int64(100 + 37*i%200))
	p.SetExtraFields(map[string]any{"ignore_eos": true})
	if i%5 == 3 {
		p.N = openai.Int(2)
	}
	return p
}

// newLoad asks everything once, undisturbed.
func newLoad(tb testing.TB, c *cluster) *load {
	tb.Helper()
	return newLoadOf(tb, c, disturbed)
}

// newLoadOf is newLoad with the requests of the clients.
func newLoadOf(tb testing.TB, c *cluster, ask func(tb testing.TB, client int) openai.ChatCompletionNewParams) *load {
	tb.Helper()
	l := &load{c: c, want: make([]streamed, clients)}
	errs := make([]error, clients)
	var wg sync.WaitGroup
	for i := range clients {
		l.ask = append(l.ask, ask(tb, i))
		wg.Go(func() { l.want[i], errs[i] = c.stream(context.Background(), l.ask[i], nil) })
	}
	wg.Wait()
	for i, err := range errs {
		if err != nil {
			tb.Fatalf("request %d undisturbed: %v", i, err)
		}
		l.prompts += l.want[i].usage.PromptTokens
	}
	return l
}

// begin lets the clients ask.
func (l *load) begin() {
	for i := range l.ask {
		l.running.Go(func() {
			for !l.stop.Load() {
				l.one(i)
			}
		})
	}
}

// again lets them ask on that have been told to stop.
func (l *load) again() {
	l.stop.Store(false)
	l.begin()
}

// count is how many answers there have been.
func (l *load) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.answers
}

// one is one request and what is wrong with its answer.
func (l *load) one(i int) {
	var last time.Time
	var gaps []gap
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	got, err := l.c.stream(ctx, l.ask[i], func(int) {
		now := time.Now()
		if !last.IsZero() && now.Sub(last) > 20*time.Millisecond {
			gaps = append(gaps, gap{last, now})
		}
		last = now
	})
	l.mu.Lock()
	defer l.mu.Unlock()
	l.answers++
	l.of[i]++
	l.prompts += got.usage.PromptTokens
	l.gaps = append(l.gaps, gaps...)
	want := &l.want[i]
	if err != nil || got.text != want.text || got.finish != want.finish || got.usage.TotalTokens != want.usage.TotalTokens {
		l.troubles = append(l.troubles, fmt.Sprintf("request %d: %v, %q (%s, %d tokens)\nundisturbed %q (%s, %d tokens)",
			i, err, got.text, got.finish, got.usage.TotalTokens, want.text, want.finish, want.usage.TotalTokens))
	}
}

// end waits for the answers under way and reports what was wrong.
func (l *load) end(tb testing.TB) {
	tb.Helper()
	l.stop.Store(true)
	l.running.Wait()
	for _, s := range l.troubles {
		tb.Error(s)
	}
	if l.answers < clients {
		tb.Errorf("only %d answers", l.answers)
	}
}

// waitOpen waits until all requests that are open now have ended.
func (l *load) waitOpen(tb testing.TB) {
	tb.Helper()
	l.mu.Lock()
	before := l.of
	l.mu.Unlock()
	for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(10 * time.Millisecond) {
		l.mu.Lock()
		now := l.of
		l.mu.Unlock()
		open := 0
		for i := range now {
			if now[i] == before[i] {
				open++
			}
		}
		if open == 0 {
			return
		}
		if time.Now().After(deadline) {
			tb.Fatalf("%d requests are still open", open)
		}
	}
}

// spanning returns, for each moment, the longest gap of any stream that it fell into, rising.
func (l *load) spanning(moments []time.Time) []time.Duration {
	var longest []time.Duration
	for _, m := range moments {
		d := time.Duration(0)
		for _, g := range l.gaps {
			if !g.from.After(m) && g.to.After(m) {
				d = max(d, g.to.Sub(g.from))
			}
		}
		longest = append(longest, d)
	}
	slices.Sort(longest)
	return longest
}

// quantile is the smallest value that so large a part of them does not exceed.
func quantile(sorted []time.Duration, q float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[int(math.Ceil(q*float64(len(sorted))))-1].Round(time.Millisecond)
}

func (l *load) report(tb testing.TB, what string, moments []time.Time) {
	tb.Helper()
	g := l.spanning(moments)
	tb.Logf("%d %s, %d answers with %d streams open, %d attempts started again, %d for want of room; longest token gap around each: median %v, p90 %v, "+
		"p99 %v, longest %v", len(moments), what, l.answers, clients, l.c.metric(tb, "trireme_request_restarts_total"), l.c.metric(tb, "trireme_request_yields_total"),
		quantile(g, 0.5), quantile(g, 0.9), quantile(g, 0.99), quantile(g, 1))
}

// pick waits for processes of a role and draws one, mostly the one that is busiest: an idle one is no loss.
func (c *cluster) pick(tb testing.TB, rng *rand.Rand, role string) int {
	tb.Helper()
	busiest := rng.IntN(4) > 0
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		var pids []int
		for _, p := range c.children() {
			if p.role == role {
				pids = append(pids, p.pid)
			}
		}
		switch {
		case len(pids) == 0:
		case len(pids) > 1 && busiest:
			return busy(pids)
		default:
			return pids[rng.IntN(len(pids))]
		}
	}
	tb.Fatalf("no child runs %s", role)
	return 0
}

// busy is the process that used the most time of a processor in the last moment.
func busy(pids []int) int {
	used := func() []int {
		all := make([]int, len(pids))
		for i, pid := range pids {
			stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)) // one that is gone has used nothing
			if fields := strings.Fields(string(stat)); len(fields) > 14 {
				all[i], _ = strconv.Atoi(fields[13]) // utime in ticks of 10 ms, proc_pid_stat(5); the name has no blanks
			}
		}
		return all
	}
	before := used()
	time.Sleep(100 * time.Millisecond)
	now, most := used(), 0
	for i := range pids {
		if now[i]-before[i] > now[most]-before[most] {
			most = i
		}
	}
	return pids[most]
}

// Instances of every role are killed again and again, at random moments: every client gets one complete answer, the same as
// undisturbed.
func TestChaosOfKills(t *testing.T) {
	t.Parallel()
	for name, x := range map[string]struct {
		few   int
		share float64
		args  []string
		roles []string // of what is killed; none: encoder, prefill and decoder
	}{
		"with siblings": {6, 1, []string{"--topology", "2E2P2D"}, nil},
		// A process that dies soon after its start is started again later and later (supervise.Backoff).
		"without siblings": {4, 0.2, []string{"--topology", "1E1P1D"}, nil},
		// A successor needs memory beside that of the one before it.
		"short of memory": {4, 0.2, []string{"--topology", "1E1P2D", "--npu-memory", "12MiB"}, nil},
		// All that a process does ends at once, and is succeeded by others, or by itself.
		"several roles":           {4, 0.4, []string{"--topology", "2EPD"}, []string{"stage"}},
		"several roles, one left": {2, 0.1, []string{"--topology", "1EPD"}, []string{"stage"}},
		// What lies in the memory of several NPUs, each a domain, is taken over at once, by others or by itself.
		"several NPUs":           {3, 0.4, []string{"--topology", "1E1P2Dx2", "--domains", "per-npu"}, []string{"decoder"}},
		"roles apart and joined": {4, 0.2, []string{"--topology", "1EP1PD1D"}, []string{"stage", "stage", "decoder"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := start(t, append(x.args, "--threads", "1")...)
			l := newLoad(t, c)
			rng := rand.New(rand.NewPCG(chaosSeed(t), 0))
			kills, _ := disturbances(t, x.few, x.share)
			roles := x.roles
			if roles == nil {
				roles = []string{"encoder", "prefill", "decoder"}
			}
			l.begin()
			var at []time.Time
			for range kills {
				time.Sleep(time.Duration(50+rng.IntN(1000)) * time.Millisecond)
				pid := c.pick(t, rng, roles[rng.IntN(len(roles))])
				at = append(at, time.Now())
				kill(t, pid)
			}
			l.end(t)
			l.report(t, "kills", at)
			c.waitReady(t)
			c.expectNoMemory(t)
		})
	}
}

// Decoders alone are killed: no token of any prompt is computed twice.
func TestChaosOfDecoders(t *testing.T) {
	t.Parallel()
	c := start(t, "--topology", "1E1P3D", "--threads", "1", "--kv-cache", "0")
	l := newLoad(t, c)
	rng := rand.New(rand.NewPCG(chaosSeed(t), 1))
	kills, full := disturbances(t, 6, 1)
	l.begin()
	var at []time.Time
	for range kills {
		time.Sleep(time.Duration(200+rng.IntN(1000)) * time.Millisecond)
		pid := c.pick(t, rng, "decoder")
		at = append(at, time.Now())
		kill(t, pid)
	}
	l.end(t)
	l.report(t, "kills of decoders", at)
	if n := int64(c.metric(t, "trireme_prefill_computed_tokens_total")); n != l.prompts {
		t.Errorf("%d prompt tokens were computed, the prompts have %d", n, l.prompts)
	}
	if n := c.metric(t, "trireme_request_restarts_total"); n != 0 {
		t.Errorf("%d requests were started again", n)
	}
	if g := l.spanning(at); full && quantile(g, 0.99) > 500*time.Millisecond {
		t.Errorf("the longest token gap around a kill is %v at p99, want 500ms: %v", quantile(g, 0.99), g)
	}
	c.waitReady(t)
	c.expectNoMemory(t)
}

// Processes are stopped for longer than a message waits for a sign of life, and then go on: as if nothing had been.
func TestChaosOfStops(t *testing.T) {
	t.Parallel()
	const ackWait = time.Second
	c := startWith(t, []string{"TRIREME_ACK_WAIT=" + ackWait.String()}, "--topology", "2E2P2D", "--threads", "1")
	l := newLoad(t, c)
	rng := rand.New(rand.NewPCG(chaosSeed(t), 2))
	stops, _ := disturbances(t, 3, 0.2)
	l.begin()
	var at []time.Time
	for i := range stops {
		time.Sleep(time.Duration(50+rng.IntN(500)) * time.Millisecond)
		pid := c.pick(t, rng, []string{"decoder", "prefill", "encoder"}[i%3])
		at = append(at, time.Now())
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			t.Errorf("stopping %d: %v", pid, err)
		}
		time.Sleep(2 * ackWait)
		if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
			t.Errorf("continuing %d: %v", pid, err)
		}
	}
	l.end(t)
	l.report(t, "stops", at)
	c.expectNoMemory(t)
}

// The HMM is killed, and with it all that the requests had in memory: the gateway starts each again with the tokens that its
// client has, every stage starts anew rather than use a map of memory that is gone, and the answers are the same.
func TestChaosOfMemory(t *testing.T) {
	t.Parallel()
	c := start(t, "--topology", "2E1P2D", "--threads", "1")
	l := newLoad(t, c)
	rng := rand.New(rand.NewPCG(chaosSeed(t), 3))
	kills, _ := disturbances(t, 1, 0.1)
	l.begin()
	var at []time.Time
	for range kills {
		time.Sleep(time.Duration(500+rng.IntN(1000)) * time.Millisecond)
		before := c.children()
		at = append(at, time.Now())
		kill(t, c.pid(t, "hmm"))
		for _, p := range before {
			if p.role == "encoder" || p.role == "prefill" || p.role == "decoder" {
				c.waitExit(t, p)
			}
		}
		l.waitOpen(t) // a request has three attempts
	}
	l.end(t)
	l.report(t, "deaths of the HMM", at)
	if n := c.metric(t, "trireme_request_restarts_total"); n == 0 {
		t.Error("no request was started again: the test kills nothing that matters")
	}
	c.waitReady(t)
	c.expectNoMemory(t)
}

// waitExit waits until a child is gone.
func (c *cluster) waitExit(tb testing.TB, p process) {
	tb.Helper()
	for deadline := time.Now().Add(30 * time.Second); slices.Contains(c.children(), p); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			tb.Fatalf("%s (%d) lives on", p.role, p.pid)
		}
	}
}
