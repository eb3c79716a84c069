package embedded_test

import (
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"trireme.dev/shared/bus/embedded"
)

func TestPortInUse(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	for name, o := range map[string]embedded.Options{
		"client":     {Port: port},
		"monitoring": {MonitorPort: port},
	} {
		o.StoreDir = t.TempDir()
		s, err := embedded.Start(o)
		if err == nil {
			s.Shutdown()
		}
		if !errors.Is(err, embedded.ErrPortInUse) || !strings.Contains(err.Error(), l.Addr().String()) {
			t.Errorf("%s port in use: %v", name, err)
		}
	}
}

func TestMonitoringAndStore(t *testing.T) {
	s, err := embedded.Start(embedded.Options{StoreDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Shutdown()
	resp, err := http.Get(s.MonitorURL() + "/healthz")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("GET /healthz: %s", resp.Status)
	}
}

// A store that cannot be made or opened is an error at once: the client would wait for ever otherwise.
func TestBadStore(t *testing.T) {
	taken := t.TempDir()
	if err := os.WriteFile(filepath.Join(taken, "jetstream"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, dir := range map[string]string{
		"below a file":        "/dev/null/store",
		"a file in its place": taken,
		"no folder at all":    "",
	} {
		start := time.Now()
		s, err := embedded.Start(embedded.Options{StoreDir: dir, MonitorPort: -1})
		if err == nil {
			s.Shutdown()
			t.Errorf("%s: accepted", name)
			continue
		}
		if !strings.Contains(err.Error(), dir) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", name, err)
		}
		if took := time.Since(start); took > 10*time.Second {
			t.Errorf("%s: the error took %v", name, took)
		}
	}
}
