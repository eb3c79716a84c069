package gateway_test

import (
	"fmt"
	"image/color"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"trireme.dev/services/gateway"
)

// TestPicturesTogetherAreBounded has every picture within its own bound.
func TestPicturesTogetherAreBounded(t *testing.T) {
	picture := append(pngOf(t, 64, 64, color.White), make([]byte, 400<<10)...)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(picture) }))
	defer s.Close()
	f := start(t, func(cfg *gateway.Config, _ *stages) {
		cfg.MaxBody = 1 << 20
		cfg.Media.AllowHosts = []string{"127.0.0.1"}
	})
	for n, want := range map[int]int{2: 200, 3: 400} {
		var parts []string
		for i := range n {
			parts = append(parts, fmt.Sprintf(`{"type":"image_url","image_url":{"url":"%s/%d"}}`, s.URL, i))
		}
		status, _, answer := f.post("/v1/chat/completions", `{"messages":[{"role":"user","content":[`+strings.Join(parts, ",")+`]}]}`)
		if status != want {
			t.Errorf("%d pictures: %d %s", n, status, answer)
		}
	}
}

func TestPicturesByHTTP(t *testing.T) {
	picture := pngOf(t, 64, 64, color.White)
	var gets atomic.Int64
	var other string
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		gets.Add(1)
		switch r.URL.Path {
		case "/away":
			http.Redirect(w, r, other, http.StatusFound)
		case "/page":
			_, _ = w.Write([]byte("<html>"))
		default:
			_, _ = w.Write(picture)
		}
	}))
	defer s.Close()
	secret := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("the secret was reached") }))
	defer secret.Close()
	other = secret.URL
	f := start(t, func(cfg *gateway.Config, _ *stages) {
		cfg.Media.AllowHosts = []string{strings.TrimPrefix(s.URL, "http://")}
	})
	body := func(urls ...string) string {
		var parts []string
		for _, u := range urls {
			parts = append(parts, `{"type":"image_url","image_url":{"url":"`+u+`"}}`)
		}
		return `{"messages":[{"role":"user","content":[` + strings.Join(parts, ",") + `]}]}`
	}
	if status, _, answer := f.post("/v1/chat/completions", body(s.URL+"/a.png", s.URL+"/a.png")); status != 200 || gets.Load() != 1 {
		t.Errorf("%d %s, fetched %d times", status, answer, gets.Load())
	}
	for url, param := range map[string]string{
		s.URL + "/away": "messages[0].content[0].image_url.url", s.URL + "/page": "messages[0].content[0].image_url.url",
		secret.URL: "messages[0].content[0].image_url.url",
	} {
		status, _, answer := f.post("/v1/chat/completions", body(url))
		if e := parseError(t, answer); status != 400 || *e.Error.Param != param {
			t.Errorf("%s: %d %s", url, status, answer)
		}
	}
	f.settled()
}
