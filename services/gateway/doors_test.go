package gateway_test

import (
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"trireme.dev/services/gateway"
	"trireme.dev/shared/wire"
)

// health is what /health says.
func (f *fixture) health() (status int, body string) {
	f.t.Helper()
	resp, err := f.http.Get(f.url + "/health")
	if err != nil {
		f.t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		f.t.Fatal(err)
	}
	return resp.StatusCode, string(data)
}

// A gateway that is told to stop says so first, then refuses what is new while it serves what it has to the end, and ends with
// that.
func TestStopsInOrder(t *testing.T) {
	release := make(chan struct{})
	f := start(t, func(cfg *gateway.Config, s *stages) {
		cfg.Grace = time.Minute
		s.prefill = func(*wire.Prefill, question) bool { <-release; return false }
	})
	body := `{"messages":[{"role":"user","content":"x"}]}`
	first := make(chan string, 1)
	go func() {
		status, header, answer := f.post("/v1/chat/completions", body)
		first <- http.StatusText(status) + " " + header.Get("Connection") + answer
	}()
	f.await("asked", func() bool { return len(f.asked) == 1 })
	stopped := make(chan struct{})
	go func() { f.stop(); close(stopped) }()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		status, said := f.health()
		if strings.Contains(said, "the gateway is stopping") {
			if status != http.StatusServiceUnavailable {
				t.Errorf("health is %d %s", status, said)
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("it does not say that it is stopping: %d %s", status, said)
		}
	}
	// With no notice it refuses at once, but the two are not one moment.
	for deadline := time.Now().Add(30 * time.Second); ; {
		resp, err := f.http.Post(f.url+"/v1/chat/completions", "application/json", strings.NewReader(`{"messages":[]}`)) // 400 when let in
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode == http.StatusServiceUnavailable {
			if !resp.Close || resp.Header.Get("Retry-After") != "1" {
				t.Errorf("refused with the connection open, or without saying when to come again: %v", resp.Header)
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("a new request still gets %d", resp.StatusCode)
		}
	}
	select {
	case got := <-first:
		t.Fatalf("the open request has ended: %s", got)
	case <-stopped:
		t.Fatal("it has stopped with a request open")
	default:
	}
	close(release)
	if got := <-first; !strings.HasPrefix(got, "OK") || !strings.Contains(got, "Hello, world!") {
		t.Errorf("the open request got %s", got)
	}
	<-stopped
	if _, err := f.http.Get(f.url + "/live"); err == nil {
		t.Error("it serves after it has stopped")
	}
}

// In the time of notice new requests are taken, and answered, although health says that there will be none.
func TestNoticeBeforeStopping(t *testing.T) {
	f := start(t, func(cfg *gateway.Config, _ *stages) {
		cfg.Grace, cfg.Notice = time.Minute, time.Second
	})
	stopped := make(chan struct{})
	go func() { f.stop(); close(stopped) }()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, said := f.health(); strings.Contains(said, "the gateway is stopping") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("it does not say that it is stopping")
		}
	}
	resp, err := f.http.Post(f.url+"/v1/chat/completions", "application/json", strings.NewReader(`{"messages":[{"role":"user","content":"x"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	// On a machine that stands still for a second the time is over: then it is refused, and that is right, too.
	if err != nil || resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("%d %s, %v", resp.StatusCode, data, err)
	}
	if !resp.Close {
		t.Error("the connection stays open")
	}
	<-stopped
}
