package main

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestHealthcheck(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/ready":
		case "/hangs":
			<-r.Context().Done()
		default:
			http.Error(w, "no decode instance is ready", http.StatusServiceUnavailable)
		}
	}))
	defer s.Close()
	gone := httptest.NewServer(nil)
	gone.Close()
	for _, c := range []struct {
		name, url string
		timeout   string
		status    int
		says      string
	}{
		{"ready", s.URL + "/ready", "10s", 0, ""},
		{"not ready", s.URL + "/starting", "10s", exitFailed, "no decode instance is ready"},
		{"no answer in time", s.URL + "/hangs", "20ms", exitFailed, "deadline exceeded"},
		{"nobody listens", gone.URL, "10s", exitFailed, "connection refused"},
		{"no URL", "://", "10s", exitUsage, "missing protocol scheme"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out, errOut bytes.Buffer
			status := run([]string{"healthcheck", "--timeout", c.timeout, c.url}, strings.NewReader(""), &out, &errOut)
			if status != c.status || !strings.Contains(errOut.String(), c.says) {
				t.Errorf("status %d, want %d; it says %q, want %q in it", status, c.status, errOut.String(), c.says)
			}
		})
	}
}
