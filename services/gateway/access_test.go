package gateway_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"

	"trireme.dev/services/gateway"
)

// keyed is a gateway with two keys.
func keyed(t *testing.T) *fixture {
	return start(t, func(cfg *gateway.Config, _ *stages) {
		cfg.Keys, cfg.Origins = []string{"sk-first", "sk-second"}, []string{"https://app.example.com", "https://*.example.org"}
	})
}

// The official client is let in with each of the keys, and told why it is not with another one, or none.
func TestKeys(t *testing.T) {
	f := keyed(t)
	for _, x := range []struct{ key, message string }{
		{"sk-first", ""}, {"sk-second", ""},
		{"sk-third", "none that this server takes"}, {"sk-firs", "none that this server takes"}, {"sk-first,sk-second", "none that this server takes"},
		{"", "the request has none"},
	} {
		t.Run(x.key, func(t *testing.T) {
			t.Setenv("OPENAI_API_KEY", "")
			options := []option.RequestOption{option.WithBaseURL(f.url + "/v1"), option.WithHTTPClient(f.http), option.WithMaxRetries(0)}
			if x.key != "" {
				options = append(options, option.WithAPIKey(x.key))
			}
			client := openai.NewClient(options...)
			_, chatErr := client.Chat.Completions.New(t.Context(), openai.ChatCompletionNewParams{Model: "shapes", Messages: user("Hi.")})
			_, modelsErr := client.Models.List(t.Context())
			stream := client.Chat.Completions.NewStreaming(t.Context(), openai.ChatCompletionNewParams{Model: "shapes", Messages: user("Hi.")})
			for stream.Next() {
			}
			for what, err := range map[string]error{"chat": chatErr, "models": modelsErr, "stream": stream.Err()} {
				if x.message == "" {
					if err != nil {
						t.Errorf("%s: %v", what, err)
					}
					continue
				}
				var e *openai.Error
				if !errors.As(err, &e) || e.StatusCode != 401 || e.Code != "invalid_api_key" || e.Type != "invalid_request_error" || !strings.Contains(e.Message, x.message) {
					t.Errorf("%s: %v", what, err)
				} else if got := e.Response.Header.Get("WWW-Authenticate"); !strings.HasPrefix(got, "Bearer ") || strings.Contains(got, "invalid_token") != (x.key != "") {
					t.Errorf("%s: WWW-Authenticate: %s", what, got)
				}
				if x.key != "" && strings.Contains(fmt.Sprint(e.Message), x.key) {
					t.Errorf("%s: the key is in the error: %s", what, e.Message)
				}
			}
		})
	}
	f.settled()
	if got := f.series("trireme_request_failure_total", `model_name="shapes",status="401"`); got != "8" {
		t.Errorf("%s POSTs were refused for want of a key", got)
	}
}

// What is not named as open needs a key, also what there is not.
func TestWhatNeedsAKey(t *testing.T) {
	f := keyed(t)
	f.await("healthy", f.healthy)
	for _, x := range []struct {
		method, path, auth string
		status             int
	}{
		{"GET", "/live", "", 200}, {"HEAD", "/live", "", 200}, {"GET", "/metrics", "", 200},
		{"GET", "/health", "", 200},
		{"GET", "/v1/models", "", 401}, {"GET", "/v1/models/shapes", "", 401}, {"GET", "/v1/nothing", "", 401}, {"GET", "/nothing", "", 401},
		{"DELETE", "/v1/models", "", 401}, {"OPTIONS", "/v1/models", "", 204}, {"GET", "/v1%2Fmodels", "", 401}, {"GET", "//v1/models", "", 401},
		{"GET", "/v1/models", "Bearer sk-second", 200}, {"GET", "/v1/models", "bearer sk-second", 200}, {"GET", "/v1/nothing", "Bearer sk-first", 404},
		{"GET", "/v1/models", "sk-first", 401}, {"GET", "/v1/models", "Basic sk-first", 401}, {"GET", "/v1/models", "Bearer", 401},
		{"GET", "/v1/models", "Bearer sk-first sk-second", 401}, {"GET", "/v1/models?api_key=sk-first", "", 401},
	} {
		r, err := http.NewRequestWithContext(t.Context(), x.method, f.url+x.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if x.auth != "" {
			r.Header.Set("Authorization", x.auth)
		}
		resp, err := f.http.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != x.status {
			t.Errorf("%s %s, %q: %d %s, %v; want %d", x.method, x.path, x.auth, resp.StatusCode, body, err, x.status)
		}
	}
}

// A request without a key is refused although its body has not come, whatever its length, and the client is not asked for it.
func TestKeyComesBeforeTheBody(t *testing.T) {
	f := keyed(t)
	for _, header := range []string{"Content-Length: 5\r\n", "Content-Length: 99999999999\r\n", "Transfer-Encoding: chunked\r\n", "Content-Length: 5\r\nExpect: 100-continue\r\n"} {
		c, err := net.Dial("tcp", strings.TrimPrefix(f.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Fprintf(c, "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n%s\r\n", header); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatalf("%q: %v", header, err)
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != 401 || *parseError(t, string(body)).Error.Code != "invalid_api_key" {
			t.Errorf("%q: %d %s, %v", header, resp.StatusCode, body, err)
		}
		c.Close()
	}
}

// Who sends a long body without a key reads why it is refused, and meets no broken connection.
func TestLongBodyWithoutAKey(t *testing.T) {
	f := keyed(t)
	status, body := postWhole(t, f, "/v1/chat/completions", "", `{"messages":[{"role":"user","content":"`+strings.Repeat("long ", 4<<20)+`"}]}`)
	if status != 401 || *parseError(t, body).Error.Code != "invalid_api_key" {
		t.Errorf("%d %s", status, body)
	}
}

// A page of an origin that is allowed asks as browsers do: first whether it may, without a key, then with it. Refusals can be read, too.
func TestPagesOfOrigins(t *testing.T) {
	f := keyed(t)
	ask := func(method, origin, key, body string, more ...string) *http.Response {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), method, f.url+"/v1/chat/completions", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Origin", origin)
		if key != "" {
			r.Header.Set("Authorization", "Bearer "+key)
		}
		for i := 0; i < len(more); i += 2 {
			r.Header.Set(more[i], more[i+1])
		}
		resp, err := f.http.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		return resp
	}
	const wanted = "authorization,content-type,x-stainless-lang,x-stainless-os"
	const question = `{"messages":[{"role":"user","content":"Hi."}]}`
	for origin, allowed := range map[string]bool{
		"https://app.example.com": true, "https://a.example.org": true, "https://example.com": false, "http://app.example.com": false,
		"https://app.example.com.evil.net": false, "https://evil-example.org": false, "null": false,
	} {
		want := ""
		if allowed {
			want = origin
		}
		resp := ask("OPTIONS", origin, "", "", "Access-Control-Request-Method", "POST", "Access-Control-Request-Headers", wanted)
		if got := resp.Header.Get("Access-Control-Allow-Origin"); resp.StatusCode != 204 || got != want {
			t.Errorf("preflight of %s: %d, allowed is %q", origin, resp.StatusCode, got)
		}
		if h := resp.Header; allowed && (!strings.Contains(h.Get("Access-Control-Allow-Methods"), "POST") || h.Get("Access-Control-Allow-Headers") != wanted ||
			h.Get("Access-Control-Max-Age") != "600") {
			t.Errorf("preflight of %s: %v", origin, h)
		}
		for key, status := range map[string]int{"": 401, "sk-third": 401, "sk-first": 200} {
			resp := ask("POST", origin, key, question, "Content-Type", "application/json")
			if got := resp.Header.Get("Access-Control-Allow-Origin"); resp.StatusCode != status || got != want || resp.Header.Get("Vary") != "Origin" {
				t.Errorf("a question of %s with the key %q: %d, allowed is %q", origin, key, resp.StatusCode, got)
			}
			if got := resp.Header.Get("Access-Control-Expose-Headers"); allowed && got != "X-Request-Id,Retry-After" {
				t.Errorf("a question of %s: it sees %s", origin, got)
			}
		}
	}
	f.settled()
}

// Without origins no page may read anything; with *, every one may.
func TestAllOriginsOrNone(t *testing.T) {
	for want, origins := range map[string][]string{"": nil, "*": {"*"}} {
		f := start(t, func(cfg *gateway.Config, _ *stages) { cfg.Origins = origins })
		r, err := http.NewRequestWithContext(t.Context(), "GET", f.url+"/v1/models", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Origin", "https://app.example.com")
		resp, err := f.http.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if got := resp.Header.Get("Access-Control-Allow-Origin"); resp.StatusCode != 200 || got != want {
			t.Errorf("with origins %q: %d, allowed is %q", origins, resp.StatusCode, got)
		}
	}
}

func TestCheckAccess(t *testing.T) {
	for _, good := range []string{"sk-1", "AZaz09", "!\"#$%&'()*+-./:;<=>?@[]^_`{|}~"} {
		if err := gateway.CheckAccess([]string{good}, nil); err != nil {
			t.Errorf("key %q: %v", good, err)
		}
	}
	for _, bad := range []string{"", "SECRET,", "SECRET WORDS", "SECRET\n", `SECRET\`, "SECRÈT", "SECRET\x7f"} {
		if err := gateway.CheckAccess([]string{"fine", bad}, nil); err == nil || strings.Contains(err.Error(), "SECR") || !strings.Contains(err.Error(), "number 2") {
			t.Errorf("key %q: %v", bad, err)
		}
	}
	for _, good := range []string{"*", "https://app.example.com", "http://localhost:3000", "http://[::1]:3000", "https://*.example.com", "http://10.0.0.1:443", "chrome-extension://abc"} {
		if err := gateway.CheckAccess(nil, []string{good}); err != nil {
			t.Errorf("origin %q: %v", good, err)
		}
	}
	for bad, says := range map[string]string{
		"": "is none like", "localhost:3000": "is none like", "app.example.com": "is none like", "https://": "is none like", "https://a.com/app": "is none like",
		"https://a.com?x": "is none like", "https://me@a.com": "is none like", "https://a.*.com": "is none like", "https://*": "is none like", "https://*a.com": "is none like", "null": "is none like",
		"https://*.": "is none like", "https://bücher.de": "is none like", "https://a.com:": "which is https://a.com",
		"https://a.com/": "which is https://a.com", "https://A.com": "which is https://a.com", "https://a.com:443": "which is https://a.com", "HTTP://a.com:80/": "which is http://a.com",
	} {
		if err := gateway.CheckAccess(nil, []string{bad}); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("origin %q: %v, want %q", bad, err, says)
		}
	}
}
