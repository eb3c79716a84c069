package load

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"trireme.dev/shared/leaktest"
)

func TestMain(m *testing.M) { leaktest.VerifyTestMain(m) }

func TestReadEvents(t *testing.T) {
	piece := func(s string) string { return `data: {"choices":[{"delta":{"content":"` + s + `"}}]}` + "\n\n" }
	role := `data: {"choices":[{"delta":{"role":"assistant","content":""}}]}` + "\n\n"
	end := `data: {"choices":[{"delta":{},"finish_reason":"length"}],"usage":null}` + "\n\n"
	usage := `data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":9,"prompt_tokens_details":{"cached_tokens":4}}}` + "\n\n"
	for name, x := range map[string]struct {
		stream string
		pieces int
		output int
		fails  string
	}{
		"whole":        {role + piece("a") + ": still here\n\n" + piece("b") + end + usage + "data: [DONE]\n\n", 2, 9, ""},
		"long line":    {piece(strings.Repeat("x", 100_000)) + usage + "data: [DONE]\n\n", 1, 9, ""},
		"no space":     {`data:{"choices":[{"delta":{"content":"a"}}]}` + "\r\n\r\ndata:[DONE]\r\n\r\n", 1, 0, ""},
		"cut":          {piece("a"), 1, 0, "without [DONE]"},
		"failed":       {piece("a") + `data: {"error":{"message":"out of luck"}}` + "\n\n", 1, 0, "out of luck"},
		"no JSON":      {"data: {\n\n", 0, 0, "no JSON"},
		"nothing":      {"", 0, 0, "without [DONE]"},
		"only a usage": {usage + "data: [DONE]\n\n", 0, 9, ""},
	} {
		var s Sample
		err := readEvents(strings.NewReader(x.stream), &s)
		if (err == nil) != (x.fails == "") || err != nil && !strings.Contains(err.Error(), x.fails) {
			t.Errorf("%s: %v", name, err)
		}
		if len(s.Pieces) != x.pieces || s.Output != x.output {
			t.Errorf("%s: %d pieces, %d tokens", name, len(s.Pieces), s.Output)
		}
		if name == "whole" && (s.Input != 7 || s.Cached != 4 || s.Finish != "length") {
			t.Errorf("%s: %+v", name, s)
		}
	}
}

// server answers like an OpenAI-compatible one, with max_tokens tokens, under the eyes of the test.
func server(t *testing.T, before func(n int64) error) (url string, most *atomic.Int64) {
	most = new(atomic.Int64)
	var open, all atomic.Int64
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		now := open.Add(1)
		defer open.Add(-1)
		for {
			seen := most.Load()
			if now <= seen || most.CompareAndSwap(seen, now) {
				break
			}
		}
		var q struct {
			MaxTokens int `json:"max_tokens"`
		}
		body, err := io.ReadAll(r.Body)
		if err != nil || json.Unmarshal(body, &q) != nil || r.URL.Path != "/v1/chat/completions" || r.Header.Get("Authorization") != "Bearer k" {
			t.Errorf("%s %v", r.URL, err)
		}
		if err := before(all.Add(1)); err != nil {
			w.WriteHeader(http.StatusTooManyRequests)
			fmt.Fprintf(w, `{"error":{"message":%q}}`, err)
			return
		}
		for range q.MaxTokens {
			fmt.Fprint(w, `data: {"choices":[{"delta":{"content":"a"}}]}`+"\n\n")
		}
		fmt.Fprintf(w, `data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":%d}}`+"\n\ndata: [DONE]\n\n", q.MaxTokens)
	}))
	t.Cleanup(s.Close)
	return s.URL, most
}

func config(url string) Config {
	return Config{URL: url + "/", Key: "k", Model: "m", Requests: 20, Shape: Shape{Words: Span{2, 2}, Output: Span{4, 4}}}
}

// A closed load never has more requests open than it may.
func TestClosedLoad(t *testing.T) {
	url, most := server(t, func(int64) error { return nil })
	cfg := config(url)
	cfg.Concurrency, cfg.Warmup = 3, 2
	calls := 0
	cfg.Progress = func(n int) {
		if calls++; n != calls {
			t.Errorf("progress says %d at call %d", n, calls)
		}
	}
	r, err := Run(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if r.Completed != 20 || calls != 20 || r.Output != 80 || r.Input != 60 || most.Load() > 3 || r.PeakOpen > 3 {
		t.Errorf("%d completed, %d tokens, %d open at the server, %d here", r.Completed, r.Output, most.Load(), r.PeakOpen)
	}
}

// An open load does not wait for answers: the server holds all of them back until every request is there.
func TestOpenLoad(t *testing.T) {
	all := make(chan struct{})
	url, most := server(t, func(n int64) error {
		if n == 20 {
			close(all)
		}
		<-all
		return nil
	})
	cfg := config(url)
	var err error
	if cfg.Arrivals, err = ParseArrivals("bursts:5", 500); err != nil {
		t.Fatal(err)
	}
	r, err := Run(t.Context(), cfg)
	if err != nil || r.Completed != 20 || most.Load() != 20 || r.PeakOpen != 20 {
		t.Fatalf("%+v, %v: %d were open", r, err, most.Load())
	}
}

func TestRefusedRequestsAreCounted(t *testing.T) {
	url, _ := server(t, func(n int64) error {
		if n%4 == 0 {
			return errors.New("full")
		}
		return nil
	})
	r, err := Run(t.Context(), config(url))
	if err != nil {
		t.Fatal(err)
	}
	if r.Completed != 15 || r.Failed != 5 || r.Failures(1)[0] != "5 times: 429: full" {
		t.Errorf("%d, %d, %v", r.Completed, r.Failed, r.Failures(9))
	}
}

func TestRunEndsEarly(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	url, _ := server(t, func(n int64) error {
		if n == 5 {
			cancel()
		}
		return nil
	})
	cfg := config(url)
	cfg.Concurrency = 1
	if _, err := Run(ctx, cfg); !errors.Is(err, context.Canceled) {
		t.Errorf("a run that was stopped: %v", err)
	}
	cfg.Warmup, cfg.URL = 1, "http://127.0.0.1:1"
	if _, err := Run(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "warm-up request 1 of 1") {
		t.Errorf("nobody there: %v", err)
	}
	if _, err := Run(t.Context(), Config{}); err == nil {
		t.Error("an empty configuration was taken")
	}
}
