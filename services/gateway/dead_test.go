package gateway_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"image/color"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"trireme.dev/services/gateway"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/wire"
)

// send posts a body with headers.
func (f *fixture) send(ctx context.Context, path, body string, headers map[string]string) (int, http.Header, string) {
	f.t.Helper()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, f.url+path, strings.NewReader(body))
	if err != nil {
		f.t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	for k, v := range headers {
		r.Header.Set(k, v)
	}
	resp, err := f.http.Do(r)
	if err != nil {
		return 0, nil, err.Error()
	}
	defer resp.Body.Close()
	data, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, resp.Header, string(data)
}

// letters waits until there are as many dead letters.
func (f *fixture) letters(n int) []wire.DeadLetter {
	f.t.Helper()
	var letters []wire.DeadLetter
	f.await(fmt.Sprintf("%d dead letters", n), func() bool {
		var err error
		if letters, _, err = f.bus.Letters(context.Background(), bus.Dead{}, 100); err != nil {
			f.t.Error(err)
			return true
		}
		return len(letters) >= n
	})
	if len(letters) != n {
		f.t.Fatalf("%d dead letters, want %d: %+v", len(letters), n, letters)
	}
	return letters
}

// final has a stage say the last word to every request.
func final(s *stages, m wire.Lost) func(*wire.Prefill, question) bool {
	return func(_ *wire.Prefill, q question) bool { // of several requests at once
		m := m
		m.Request, m.Attempt = q.ID, q.Attempt
		_ = s.bus.Send(wire.SubjectLost(q.Gateway), &m)
		return true
	}
}

// Requests that fail for good and not by their client's fault are stored, whole, with what was fetched for them; others are not.
func TestDeadLetters(t *testing.T) {
	picture, other := pngOf(t, 64, 64, color.White), pngOf(t, 32, 64, color.Black)
	site := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/b.png" {
			_, _ = w.Write(other)
			return
		}
		_, _ = w.Write(picture)
	}))
	defer site.Close()
	var how atomic.Value // what prefill does
	var all *stages
	f := start(t, func(cfg *gateway.Config, s *stages) {
		cfg.Media.AllowHosts = []string{"127.0.0.1"}
		all = s
		how.Store(func(_ *wire.Prefill, q question) bool {
			s.lostAttempt(q.Request, "the node burns")
			return true
		})
		s.prefill = func(m *wire.Prefill, q question) bool { return how.Load().(func(*wire.Prefill, question) bool)(m, q) }
	})
	url := func(u string) string { return `{"type":"image_url","image_url":{"url":"` + u + `"}}` }
	body := `{"messages":[{"role":"user","content":[` + strings.Join([]string{url(site.URL + "/a.png"), url(dataURL(other)), url(site.URL + "/b.png"),
		url(site.URL + "/a.png"), url(site.URL + "/c.png")}, ",") + `]}],"stream":true,"max_tokens":7}`
	status, header, answer := f.send(t.Context(), "/v1/chat/completions", body, map[string]string{
		"x-gateway-inference-fairness-id": "acme", "x-slo-ttft-ms": "900", "X-Request-Id": "trace-1", "Authorization": "Bearer secret",
		"X-Trireme-Replay-Of": "earlier",
	})
	if status != 503 || header.Get("X-Request-Id") != "trace-1" {
		t.Fatalf("%d %s", status, answer)
	}
	l := f.letters(1)[0]
	if l.Reason != wire.DeadAttempts || l.Attempts != 3 || l.Status != 503 || !strings.Contains(l.Error, "the node burns") || l.Tenant != "acme" ||
		l.Trace != "trace-1" || l.ReplayOf != "earlier" || l.Path != "/v1/chat/completions" || !l.Stream || l.Pictures != 5 || l.PromptTokens == 0 ||
		l.Gateway != "gateway-test" || l.Model != "shapes" || l.Class != "default" || l.Seed == 0 || l.Request != f.asked[0].ID ||
		uint64(l.Seed) != f.asked[0].Spec.Sampling.Seed {
		t.Errorf("letter %+v", l)
	}
	if text, _ := json.Marshal(l); bytes.Contains(text, []byte("secret")) || l.Headers["x-slo-ttft-ms"] != "900" || len(l.Headers) != 2 {
		t.Errorf("headers %v", l.Headers)
	}
	gotBody, pictures, err := f.bus.Request(t.Context(), &l)
	if err != nil || string(gotBody) != body {
		t.Errorf("body %q, %v", gotBody, err)
	}
	var urls []string
	for _, p := range l.Fetched {
		urls = append(urls, strings.TrimPrefix(p.URL, site.URL))
	}
	if fmt.Sprint(urls) != "[/a.png /b.png /c.png]" || len(pictures) != 3 || !bytes.Equal(pictures[0], picture) || !bytes.Equal(pictures[1], other) ||
		!bytes.Equal(pictures[2], picture) {
		t.Errorf("fetched %v, %d pictures", urls, len(pictures))
	}
	f.await("it is counted", func() bool {
		return f.series("trireme_dead_letters_total", `model_name="shapes",reason="attempts"`) == "1"
	})

	set := func(m wire.Lost) { how.Store(final(all, m)) }
	ask := func() int {
		status, _, _ := f.post("/v1/completions", `{"prompt":"x","seed":5}`)
		return status
	}
	set(wire.Lost{Final: true, Status: 500, Code: wire.CodeQuarantined, Stage: "decode", Why: "it kills"})
	if status, _, answer := f.post("/v1/completions", `{"prompt":["x","y"]}`); status != 500 || *parseError(t, answer).Error.Code != wire.CodeQuarantined {
		t.Errorf("quarantined: %d %s", status, answer)
	}
	if l := f.letters(2)[0]; l.Reason != wire.DeadQuarantined || l.Stage != "decode" || l.Path != "/v1/completions" || l.Attempts != 1 || l.Seed != 0 {
		t.Errorf("letter %+v", l)
	}
	set(wire.Lost{Final: true, Status: 400, Why: "a bad picture"})
	if got := ask(); got != 400 {
		t.Errorf("status %d", got)
	}
	asked := make(chan struct{}, 1)
	how.Store(func(*wire.Prefill, question) bool { asked <- struct{}{}; return true }) // never answers
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-asked; cancel() }()
	if status, _, _ := f.send(ctx, "/v1/completions", `{"prompt":"x"}`, nil); status != 0 {
		t.Errorf("status %d", status)
	}
	set(wire.Lost{Final: true, Status: 500, Why: "another model", Stage: "prefill"})
	if got := ask(); got != 500 {
		t.Errorf("status %d", got)
	}
	if l := f.letters(3)[0]; l.Reason != wire.DeadFault || l.Stage != "prefill" || l.Seed != 0 {
		t.Errorf("letter %+v", l)
	}
	f.settled()
}

// What an operator switches off is not stored, nor what does not fit; the letter says so.
func TestDeadLettersWithoutRequests(t *testing.T) {
	for mode, want := range map[string]int{gateway.DeadFacts: 1, gateway.DeadOff: 0} {
		t.Run(mode, func(t *testing.T) {
			f := start(t, func(cfg *gateway.Config, s *stages) {
				cfg.DeadLetters = mode
				s.prefill = final(s, wire.Lost{Final: true, Status: 500, Why: "another model"})
			})
			if status, _, _ := f.post("/v1/completions", `{"prompt":"x"}`); status != 500 {
				t.Errorf("status %d", status)
			}
			f.settled()
			f.stop() // which waits for letters
			letters, _, err := f.bus.Letters(t.Context(), bus.Dead{}, 10)
			if err != nil || len(letters) != want {
				t.Fatalf("%d letters, %v", len(letters), err)
			}
			for _, l := range letters {
				if l.Body != 0 || l.Missing == "" {
					t.Errorf("letter %+v", l)
				}
			}
		})
	}
}

// Clients are answered although no letter can be stored. Those that wait to be stored are not more and more: what is over is counted.
// The gateway stops all the same.
func TestDeadLettersAreRefused(t *testing.T) {
	f := start(t, func(_ *gateway.Config, s *stages) {
		s.prefill = final(s, wire.Lost{Final: true, Status: 500, Why: "another model"})
	})
	if _, err := f.bus.JetStream().CreateStream(t.Context(), jetstream.StreamConfig{Name: "THEIRS", Subjects: []string{"trireme.dead.>"}}); err != nil {
		t.Fatal(err)
	}
	const most, over = 256, 4 // deadQueue
	for range most + over {
		if status, _, _ := f.post("/v1/completions", `{"prompt":"x"}`); status != 500 {
			t.Errorf("status %d", status)
		}
	}
	f.settled()
	if got := f.series("trireme_dead_letters_lost_total", `model_name="shapes",what="letter"`); got != fmt.Sprint(over) {
		t.Errorf("%s letters are counted as lost, want %d", got, over)
	}
	f.stop()
	if n, err := f.bus.DeadCount(t.Context()); n != 0 || err != nil {
		t.Errorf("%d letters, %v", n, err)
	}
}
