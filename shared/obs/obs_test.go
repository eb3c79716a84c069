package obs_test

import (
	"bytes"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"trireme.dev/shared/obs"
)

func TestServer(t *testing.T) {
	r := prometheus.NewRegistry()
	obs.AddProcess(r)
	ready := false
	s, err := obs.Serve(t.Context(), "127.0.0.1:0", r, func() bool { return ready }, slog.Default())
	if err != nil {
		t.Fatal(err)
	}
	get := func(path string) (int, string) {
		resp, err := http.Get("http://" + s.Addr() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(b)
	}
	if code, body := get("/metrics"); code != 200 || !strings.Contains(body, "trireme_build_info") || !strings.Contains(body, "go_goroutines") {
		t.Errorf("/metrics: %d, %d bytes", code, len(body))
	}
	if code, _ := get("/health"); code != 503 {
		t.Errorf("/health before ready: %d", code)
	}
	ready = true
	if code, _ := get("/health"); code != 200 {
		t.Errorf("/health when ready: %d", code)
	}
	if code, _ := get("/live"); code != 200 {
		t.Errorf("/live: %d", code)
	}
	if _, err := obs.Serve(t.Context(), s.Addr(), r, nil, slog.Default()); err == nil || !strings.Contains(err.Error(), s.Addr()) {
		t.Errorf("address in use: %v", err)
	}
}

func TestLogger(t *testing.T) {
	var b bytes.Buffer
	l, err := obs.Logger(&b, "json", "warn")
	if err != nil {
		t.Fatal(err)
	}
	l.Info("hidden")
	l.Warn("shown")
	if s := b.String(); strings.Contains(s, "hidden") || !strings.HasPrefix(s, "{") || !strings.Contains(s, "shown") {
		t.Errorf("log is %q", s)
	}
	if _, err := obs.Logger(&b, "xml", "info"); err == nil {
		t.Error("format xml is taken")
	}
	if _, err := obs.Logger(&b, "text", "loud"); err == nil {
		t.Error("level loud is taken")
	}
}
