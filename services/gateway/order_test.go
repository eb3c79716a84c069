package gateway_test

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"

	"trireme.dev/services/gateway"
	"trireme.dev/shared/sched"
	"trireme.dev/shared/wire"
)

// ask sends a chat request with headers and further members of the body, and returns status, headers and answer.
func (f *fixture) ask(text, members string, header ...string) (int, http.Header, string) {
	body := `{"max_tokens":20,"messages":[{"role":"user","content":"` + text + `"}]` + members + `}`
	req, err := http.NewRequest(http.MethodPost, f.url+"/v1/chat/completions", strings.NewReader(body))
	if err != nil {
		f.t.Error(err)
		return 0, nil, ""
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := f.http.Do(req)
	if err != nil {
		f.t.Error(err)
		return 0, nil, ""
	}
	defer resp.Body.Close()
	var b strings.Builder
	if err := resp.Write(&b); err != nil {
		f.t.Error(err)
	}
	return resp.StatusCode, resp.Header, b.String()
}

// held is a gateway that lets in one request at a time, of which the first stays until release is closed.
func held(t *testing.T, change func(cfg *gateway.Config)) (f *fixture, release chan struct{}) {
	release = make(chan struct{})
	f = start(t, func(cfg *gateway.Config, s *stages) {
		cfg.MaxOpen = 1
		change(cfg)
		s.prefill = func(_ *wire.Prefill, q question) bool {
			if strings.Contains(q.Text, "first") {
				<-release
			}
			return false
		}
	})
	go f.ask("first", "")
	f.await("the first is at work", func() bool { return len(f.asked) == 1 })
	return f, release
}

// Requests are let in by class, priority and tenant, as headers and body say, and are counted by class while they wait.
func TestOrderOfRequests(t *testing.T) {
	f, release := held(t, func(cfg *gateway.Config) {
		cfg.Policy = "fcfs"
		cfg.Classes = map[string]gateway.Class{"gold": {Priority: -5}}
		cfg.TenantWeights = map[string]float64{"large": 3}
	})
	statuses := make(chan int, 20)
	waiting := 0
	comes := func(text, members string, header ...string) {
		go func() {
			status, _, _ := f.ask(text, members, header...)
			statuses <- status
		}()
		waiting++
		f.await(text+" waits", func() bool { return f.metric("trireme_num_requests_waiting") == strconv.Itoa(waiting) })
	}
	comes("flex", `,"service_tier":"flex"`)
	comes("small1", `,"user":"small"`)
	comes("small2", `,"user":"small"`)
	comes("small3", `,"user":"nobody"`, "x-llm-d-inference-fairness-id", "small")
	comes("large1", ``, "x-gateway-inference-fairness-id", "large")
	comes("large2", `,"service_tier":"auto"`, "x-gateway-inference-fairness-id", "large")
	comes("gold1", ``, "x-gateway-inference-objective", "gold")
	comes("gold2", `,"service_tier":"flex"`, "x-llm-d-inference-objective", "gold")
	comes("tier", `,"service_tier":"priority"`)
	comes("vllm", `,"priority":-100`)
	for class, want := range map[string]string{"default": "6", "gold": "2", "flex": "1", "priority": "1", "begun": "0"} {
		if got := f.series("trireme_class_requests_waiting", fmt.Sprintf(`class=%q,model_name="shapes"`, class)); got != want {
			t.Errorf("%s of class %s wait, want %s", got, class, want)
		}
	}
	close(release)
	for range waiting {
		if status := <-statuses; status != http.StatusOK {
			t.Errorf("answered with %d", status)
		}
	}
	f.settled()
	var order []string
	for _, q := range f.asked[1:] {
		for _, name := range []string{"flex", "small1", "small2", "small3", "large1", "large2", "gold1", "gold2", "tier", "vllm"} {
			if strings.Contains(q.Text, name) {
				order = append(order, name)
			}
		}
	}
	// The eighth pick is the turn of the class that has waited longest for one, whatever its priority.
	want := []string{"vllm", "tier", "gold1", "gold2", "small1", "large1", "large2", "flex", "small2", "small3"}
	if !slices.Equal(order, want) {
		t.Errorf("the order was %v, want %v", order, want)
	}
	if got := f.series("trireme_request_queue_time_seconds_count", `class="gold",model_name="shapes"`); got != "2" {
		t.Errorf("the queue time of gold was counted %q times", got)
	}
}

// What is wrong about a place in line is said, with what would be right.
func TestWrongObjectives(t *testing.T) {
	f := start(t, nil)
	for _, x := range []struct{ members, name, value, param, want string }{
		{`,"service_tier":"golden"`, "", "", "service_tier", "default, flex, priority"},
		{``, "x-gateway-inference-objective", "golden", "x-gateway-inference-objective", "default, flex, priority"},
		{``, "x-slo-ttft-ms", "2s", "x-slo-ttft-ms", "milliseconds"},
		{``, "x-llm-d-slo-tpot-ms", "-1", "x-llm-d-slo-tpot-ms", "milliseconds"},
		{`,"priority":"high"`, "", "", "priority", "integer"},
		{`,"user":"` + strings.Repeat("x", 300) + `"`, "", "", "user", "128"},
	} {
		var header []string
		if x.name != "" {
			header = []string{x.name, x.value}
		}
		status, _, answer := f.ask("Hello", x.members, header...)
		if status != http.StatusBadRequest || !strings.Contains(answer, x.want) || !strings.Contains(answer, `"param":"`+x.param+`"`) {
			t.Errorf("%s %s: %d %s", x.members, x.name, status, answer)
		}
	}
}

// A request that waits and can no longer meet its target is refused with the reason and a time to come again, or let in after
// those that can.
func TestLateRequests(t *testing.T) {
	for _, late := range []string{gateway.LateRefuse, gateway.LateLast} {
		t.Run(late, func(t *testing.T) {
			f, release := held(t, func(cfg *gateway.Config) { cfg.Late = late })
			type answer struct {
				status int
				header http.Header
				body   string
			}
			tight := make(chan answer, 1)
			go func() {
				status, header, body := f.ask("tight", "", "x-slo-ttft-ms", "1")
				tight <- answer{status, header, body}
			}()
			if late == gateway.LateRefuse {
				a := <-tight
				after, err := strconv.Atoi(a.header.Get("Retry-After"))
				if a.status != http.StatusTooManyRequests || err != nil || after < 1 || !strings.Contains(a.body, "too late for the targets") {
					t.Errorf("%d %v %s", a.status, a.header, a.body)
				}
				if got := f.series("trireme_request_refusals_total", `class="default",model_name="shapes",reason="late"`); got != "1" {
					t.Errorf("counted %q times", got)
				}
				close(release)
				f.settled()
				return
			}
			f.await("it waits", func() bool { return f.metric("trireme_num_requests_waiting") == "1" })
			patient := make(chan int, 1)
			go func() {
				status, _, _ := f.ask("patient", "", "x-slo-ttft-ms", "3600000")
				patient <- status
			}()
			f.await("both wait", func() bool { return f.metric("trireme_num_requests_waiting") == "2" })
			close(release)
			if a, p := <-tight, <-patient; a.status != http.StatusOK || p != http.StatusOK {
				t.Errorf("%d and %d", a.status, p)
			}
			f.settled()
			if len(f.asked) != 3 || !strings.Contains(f.asked[1].Text, "patient") {
				t.Errorf("the late one was let in before the other")
			}
			for labels, want := range map[string]string{`met="false",model_name="shapes",target="ttft"`: "1", `met="true",model_name="shapes",target="ttft"`: "1"} {
				if got := f.series("trireme_slo_requests_total", `class="default",`+labels); got != want {
					t.Errorf("%s is %q, want %s", labels, got, want)
				}
			}
		})
	}
}

// Targets come from the request, its class or the gateway, in this order, and attainment is counted for those that have any.
func TestAttainment(t *testing.T) {
	f := start(t, func(cfg *gateway.Config, _ *stages) {
		cfg.Targets = sched.Targets{TTFT: time.Hour, TPOT: time.Nanosecond}
		cfg.Classes = map[string]gateway.Class{"gold": {TPOT: time.Hour}, "batch": {TTFT: gateway.NoTarget, TPOT: gateway.NoTarget}}
	})
	f.ask("by default", "")
	f.ask("gold", `,"service_tier":"gold"`)
	f.ask("its own", `,"service_tier":"gold"`, "x-slo-ttft-ms", "0.000001")
	f.ask("none", `,"service_tier":"batch"`)
	f.settled()
	for _, x := range []struct{ class, target, met, want string }{
		{"default", "ttft", "true", "1"}, {"default", "ttft", "false", ""},
		{"default", "tpot", "true", ""}, {"default", "tpot", "false", "1"},
		{"gold", "ttft", "true", "1"}, {"gold", "ttft", "false", "1"},
		{"gold", "tpot", "true", "2"}, {"gold", "tpot", "false", ""},
		{"batch", "ttft", "true", ""}, {"batch", "ttft", "false", ""},
	} {
		labels := fmt.Sprintf(`class=%q,met=%q,model_name="shapes",target=%q`, x.class, x.met, x.target)
		if got := f.series("trireme_slo_requests_total", labels); got != x.want {
			t.Errorf("%s: %q, want %q", labels, got, x.want)
		}
	}
}

// A client that is refused and comes again when it was told to gets in, by doing nothing but what the official client does
// by itself.
func TestWhoObeysRetryAfterGetsIn(t *testing.T) {
	f, release := held(t, func(cfg *gateway.Config) { cfg.MaxQueue = 1 })
	second := make(chan int, 1)
	go func() {
		status, _, _ := f.ask("second", "")
		second <- status
	}()
	f.await("the second waits", func() bool { return f.metric("trireme_num_requests_waiting") == "1" })
	refused := 0
	client := openai.NewClient(option.WithBaseURL(f.url+"/v1"), option.WithAPIKey("none"), option.WithHTTPClient(f.http),
		option.WithMaxRetries(20), option.WithMiddleware(func(r *http.Request, next option.MiddlewareNext) (*http.Response, error) {
			resp, err := next(r)
			if err == nil && resp.StatusCode == http.StatusTooManyRequests {
				if refused++; refused == 1 {
					close(release)
				}
			}
			return resp, err
		}))
	r, err := client.Chat.Completions.New(t.Context(), openai.ChatCompletionNewParams{Model: "shapes", Messages: user("third")})
	if err != nil || r.Choices[0].Message.Content != "Hello, world!" || refused == 0 {
		t.Errorf("%v after %d refusals", err, refused)
	}
	if status := <-second; status != http.StatusOK {
		t.Errorf("the second got %d", status)
	}
	f.settled()
}

// As many requests go ahead without their first token as each NPU that encodes or computes prompts may have, and no more, also when an instance
// gets more of them.
func TestAheadOfTheFirstToken(t *testing.T) {
	release := make(chan struct{})
	f := start(t, func(cfg *gateway.Config, s *stages) {
		cfg.Ahead = 2
		s.prefill = func(*wire.Prefill, question) bool { <-release; return false }
	})
	answers := make(chan int, 20)
	for range 20 {
		go func() {
			status, _, _ := f.ask("Hello", "")
			answers <- status
		}()
	}
	want := func(why string, running, waiting int) {
		t.Helper()
		f.await(why, func() bool {
			return f.metric("trireme_num_requests_running") == strconv.Itoa(running) && f.metric("trireme_num_requests_waiting") == strconv.Itoa(waiting)
		})
	}
	scale := func(role string, npus ...int) {
		f.stages.mu.Lock()
		defer f.stages.mu.Unlock()
		f.stages.npus[role] = npus
	}
	want("one NPU computes prompts, and one encodes", 4, 16)
	scale("prefill", 1, 3, 4)
	want("three compute prompts", 8, 12)
	scale("encode", 0, 5)
	want("and two encode", 10, 10)
	close(release)
	for range 20 {
		if status := <-answers; status != http.StatusOK {
			t.Errorf("answered with %d", status)
		}
	}
	f.settled()
}

func TestParseClass(t *testing.T) {
	for text, want := range map[string]gateway.Class{
		"priority:-5":                       {Priority: -5},
		"priority:3,ttft:1.5s,tpot:50ms":    {Priority: 3, TTFT: 1500 * time.Millisecond, TPOT: 50 * time.Millisecond},
		"ttft:none,tpot:none":               {TTFT: gateway.NoTarget, TPOT: gateway.NoTarget},
		"tpot:1ms,priority:0,ttft:1h30m10s": {TTFT: time.Hour + 30*time.Minute + 10*time.Second, TPOT: time.Millisecond},
	} {
		if c, err := gateway.ParseClass(text); err != nil || c != want {
			t.Errorf("%s: %+v %v", text, c, err)
		}
	}
	for _, text := range []string{"", "5", "priority:high", "ttft:500", "ttft:0s", "ttft:-1s", "e2e:1s", "priority:1;ttft:1s"} {
		if c, err := gateway.ParseClass(text); !errors.Is(err, gateway.ErrClass) {
			t.Errorf("%q: %+v %v", text, c, err)
		}
	}
	if got, err := gateway.ParseTargets("ttft:2s,tpot:100ms"); err != nil || got != (sched.Targets{TTFT: 2 * time.Second, TPOT: 100 * time.Millisecond}) {
		t.Errorf("%+v %v", got, err)
	}
	if got, err := gateway.ParseTargets(""); err != nil || got != (sched.Targets{}) {
		t.Errorf("%+v %v", got, err)
	}
	if _, err := gateway.ParseTargets("ttft:2s,priority:1"); !errors.Is(err, gateway.ErrClass) {
		t.Error(err)
	}
	for _, bad := range []gateway.Config{{Policy: "lifo"}, {Late: "never"}, {TenantWeights: map[string]float64{"x": 0}}} {
		bad.HTTP, bad.HMMSocket, bad.ModelDir, bad.NATSURL = "x", "x", "x", "nats://localhost:1"
		if bad.Validate() == nil {
			t.Errorf("%+v passes", bad)
		}
	}
}
