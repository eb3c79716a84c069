package e2e

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/openai/openai-go/v3"
)

// term ends a child as an operator does, and waits until another one of its role is there in its place and all are ready.
func (c *cluster) term(t *testing.T, p process) {
	t.Helper()
	if err := syscall.Kill(p.pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	c.waitExit(t, p)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		ready := 0
		for _, i := range c.status(t)["instances"].([]any) {
			if of := i.(map[string]any); of["role"] != "gateway" && of["ready"] == true && of["pid"] != float64(p.pid) {
				ready++
			}
		}
		stages := len(slices.DeleteFunc(c.children(), func(p process) bool { return p.role == "gateway" || p.role == "hmm" }))
		if ready == stages && slices.ContainsFunc(c.children(), func(o process) bool { return o.role == p.role && o.pid != p.pid }) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("a minute after %s got SIGTERM %d of %d stages are ready", p.role, ready, stages)
		}
	}
}

// Every stage is told to stop, one after the other, while 16 clients stream: a rolling restart. Each answer is complete and as
// ever, and none had to be started again: what a stage had it finished, or handed over with its KV.
func TestRollingRestart(t *testing.T) {
	t.Parallel()
	c := start(t, "--topology", "2E2P2D", "--threads", "1")
	l := newLoad(t, c)
	l.begin()
	var at []time.Time
	for _, p := range c.children() {
		if p.role == "encoder" || p.role == "prefill" || p.role == "decoder" {
			at = append(at, time.Now())
			c.term(t, p)
		}
	}
	l.end(t)
	l.report(t, "stages that were told to stop", at)
	if len(at) != 6 {
		t.Errorf("%d stages were told to stop", len(at))
	}
	if n := c.metric(t, "trireme_request_restarts_total"); n != 0 {
		t.Errorf("%d requests were started again", n)
	}
	for _, line := range strings.Split(c.log.String(), "\n") {
		if strings.Contains(line, "ended: ") && !strings.Contains(line, "exit status 0") {
			t.Errorf("a stage did not stop in order: %s", line)
		}
	}
	c.expectNoMemory(t)
}

// A gateway that is told to stop answers what it has; a second signal ends it at once.
func TestGatewayIsToldToStop(t *testing.T) {
	t.Parallel()
	c := start(t, append(eachStep(t, 10), "--grace", "1m")...)
	p := mixed(t, 2)
	p.MaxTokens = openai.Int(600)
	p.SetExtraFields(map[string]any{"ignore_eos": true})
	want, err := c.stream(t.Context(), p, nil)
	if err != nil {
		t.Fatal(err)
	}
	gateway := process{c.pid(t, "gateway"), "gateway"}
	got, err := c.stream(t.Context(), p, func(n int) {
		if n == 20 {
			if err := syscall.Kill(gateway.pid, syscall.SIGTERM); err != nil {
				t.Error(err)
			}
		}
		if n != 40 {
			return
		}
		for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			status, body := c.post(t, "/v1/chat/completions", `{"messages":[{"role":"user","content":"hi"}],"max_tokens":1}`)
			if status == http.StatusServiceUnavailable && strings.Contains(body, "stopping") {
				return
			}
			if time.Now().After(deadline) {
				t.Errorf("a gateway that stops answers a new request with %d %s", status, body)
				return
			}
		}
	})
	if err != nil || got.text != want.text {
		t.Errorf("with a stop in the middle %q, %v; undisturbed %q", got.text, err, want.text)
	}
	c.waitExit(t, gateway)
	c.waitReady(t)
	gateway.pid = c.pid(t, "gateway")
	_, err = c.stream(t.Context(), p, func(n int) {
		if n == 20 || n == 40 {
			// The second one ends it, and is another one, as the same may come within a second.
			_ = syscall.Kill(gateway.pid, map[int]syscall.Signal{20: syscall.SIGTERM, 40: syscall.SIGINT}[n])
			time.Sleep(50 * time.Millisecond) // lets the first one be heard as one
		}
	})
	if err == nil {
		t.Error("the answer was complete after a second signal: it is not what ends the process")
	}
	c.waitExit(t, gateway)
	c.waitReady(t)
	c.expectWithin(t, time.Minute, "nothing but what the caches keep", nothing) // within the gateway's lease
}

// A gateway is killed with requests in every stage: within its lease they are given up everywhere, their memory is free long
// before their deadline, and nothing more is computed for them.
func TestGatewayIsKilled(t *testing.T) {
	t.Parallel()
	c := startWith(t, []string{"TRIREME_GATEWAY_LEASE=6s"}, "--topology", "1E1P1D", "--threads", "1", "--kv-cache", "0", "--mm-cache", "0")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	begun := make(chan bool, 64)
	for i := range 24 { // more than decode at once would be quick with: some encode, some wait, some decode
		p := disturbed(t, i)
		p.MaxTokens = openai.Int(4000)
		p.N = openai.Int(1)
		go func() {
			_, _ = c.stream(ctx, p, func(n int) { // ends with the gateway
				if n == 1 {
					begun <- true
				}
			})
		}()
	}
	for range 4 {
		<-begun
	}
	kill(t, c.pid(t, "gateway"))
	killed := time.Now()
	c.expectWithin(t, time.Minute, "nothing but what the caches keep", nothing)
	t.Logf("all memory was free %v after the gateway was killed; its lease is 6 s", time.Since(killed).Round(100*time.Millisecond))
	c.waitReady(t)
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) { // heartbeats tell it a second later
		status, busy := c.status(t), ""
		for _, q := range status["queues"].([]any) {
			if of := q.(map[string]any); of["pending"] != 0.0 || of["in_work"] != 0.0 {
				busy += fmt.Sprintln(of)
			}
		}
		for _, i := range status["instances"].([]any) {
			if of := i.(map[string]any); of["running"] != 0.0 {
				busy += fmt.Sprintln(of)
			}
		}
		if busy == "" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("of a gateway that is gone there is still:\n%s", busy)
		}
	}
}
