package e2e

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
)

// waiting is what status says of who waits, by class.
func (c *cluster) waiting(tb testing.TB) map[string]any {
	tb.Helper()
	for _, i := range c.status(tb)["instances"].([]any) {
		if w, ok := i.(map[string]any)["waiting"].(map[string]any); ok {
			return w
		}
	}
	return nil
}

// Requests wait in line when there is no room. What comes too late for its target is refused at once, who goes last when too
// many wait is refused with a time to come again, a client that obeys gets in, and nobody is refused who was let in.
func TestWhoGoesFirst(t *testing.T) {
	t.Parallel()
	line := []string{"TRIREME_MAX_OPEN=1", "TRIREME_MAX_QUEUE=2", "TRIREME_QUEUE_WAIT=5m"}
	c := startWith(t, line, append(eachStep(t, 10), "--topology", "1EPD", "--late", "refuse", "--class", "batch=priority:20,ttft:none",
		"--tenant-weight", "search=3")...)
	long := openai.ChatCompletionNewParams{Model: "shapes-vl-moe", MaxTokens: openai.Int(7000),
		Messages: []openai.ChatCompletionMessageParamUnion{openai.UserMessage("Count from 1 to 9.")}}
	long.SetExtraFields(map[string]any{"ignore_eos": true})
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	begun, left := make(chan bool, 1), make(chan bool)
	go func() {
		defer close(left)
		_, _ = c.stream(ctx, long, func(n int) {
			if n == 1 {
				begun <- true
			}
		})
	}()
	<-begun
	stage := c.pid(t, "stage")
	if err := syscall.Kill(stage, syscall.SIGSTOP); err != nil { // so that it takes as long as it must
		t.Fatal(err)
	}
	defer func() { _ = syscall.Kill(stage, syscall.SIGCONT) }()

	ask := func(class string, opts ...option.RequestOption) error {
		client := openai.NewClient(option.WithBaseURL(c.url+"/v1"), option.WithAPIKey("none"), option.WithMaxRetries(0),
			option.WithHTTPClient(http.DefaultClient))
		_, err := client.Chat.Completions.New(t.Context(), openai.ChatCompletionNewParams{Model: "shapes-vl-moe", MaxTokens: openai.Int(5),
			ServiceTier: openai.ChatCompletionNewParamsServiceTier(class),
			Messages:    []openai.ChatCompletionMessageParamUnion{openai.UserMessage("Hello!")}}, opts...)
		return err
	}
	refused := func(err error, why string) {
		t.Helper()
		var e *openai.Error
		if !errors.As(err, &e) || e.StatusCode != http.StatusTooManyRequests || !strings.Contains(e.Message, why) {
			t.Fatalf("%v; want a 429 that says %q", err, why)
		}
		if after, err := strconv.Atoi(e.Response.Header.Get("Retry-After")); err != nil || after < 1 {
			t.Errorf("Retry-After is %q", e.Response.Header.Get("Retry-After"))
		}
	}
	refused(ask("default", option.WithHeader("x-slo-ttft-ms", "1")), "too late for the targets")

	answers := make(chan error, 3)
	for i, class := range []string{"batch", "priority"} {
		go func() { answers <- ask(class) }()
		for deadline := time.Now().Add(time.Minute); c.waiting(t)[class] != 1.0 || len(c.waiting(t)) != i+1; time.Sleep(50 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("waiting, by status: %v", c.waiting(t))
			}
		}
	}
	refused(ask("batch"), "2 waiting") // of those who go last it is the last
	tries := 0
	go func() {
		answers <- ask("batch", option.WithMaxRetries(50), option.WithMiddleware(func(r *http.Request, next option.MiddlewareNext) (*http.Response, error) {
			if tries++; tries == 2 {
				leave() // there is room from now on
				_ = syscall.Kill(stage, syscall.SIGCONT)
			}
			return next(r)
		}))
	}()
	for range 3 {
		if err := <-answers; err != nil {
			t.Error(err)
		}
	}
	<-left
	if tries < 2 {
		t.Errorf("the client that obeys got in with %d tries", tries)
	}
	resp, err := http.Get(c.url + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	page, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		`trireme_request_refusals_total{class="default",model_name="shapes-vl-moe",reason="late"} 1`,
		`trireme_request_refusals_total{class="batch",model_name="shapes-vl-moe",reason="queue_full"} `,
		`trireme_class_requests_waiting{class="batch",model_name="shapes-vl-moe"} 0`,
		`trireme_request_queue_time_seconds_count{class="priority",model_name="shapes-vl-moe"} 1`,
	} {
		if !strings.Contains(string(page), line) {
			t.Errorf("the metrics lack %s", line)
		}
	}
}
