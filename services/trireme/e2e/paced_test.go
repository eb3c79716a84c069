package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// eachStep is the flag by which a step of a decoder takes so many milliseconds at the least: what is to happen in the middle of an answer
// does, however fast the machine is, and whoever else stands still for a moment.
func eachStep(tb testing.TB, ms int) []string {
	tb.Helper()
	file := filepath.Join(tb.TempDir(), "steady.yaml")
	text := fmt.Sprintf("name: steady\nsource: this test\nencode: {picture_ms: 1}\nprefill: {step_ms: 1}\ndecode: {step_ms: %d}\n", ms)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		tb.Fatal(err)
	}
	return []string{"--pace", file}
}

// Paced NPUs answer as others do, take at least the time that their profile says, and are labelled wherever figures of theirs
// are: status, health, models, metrics of stages and gateway, bench.
func TestPaced(t *testing.T) {
	t.Parallel()
	profile := filepath.Join(t.TempDir(), "slow.yaml")
	text := "name: slow\nsource: this test\nencode: {picture_ms: 30}\nprefill: {step_ms: 20}\ndecode: {step_ms: 5}\n"
	if err := os.WriteFile(profile, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	metrics := fmt.Sprintf("127.0.0.1:%d", freePort(t))
	config := filepath.Join(t.TempDir(), "settings.yaml")
	if err := os.WriteFile(config, []byte("decoder:\n  metrics: "+metrics+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := start(t, "--pace", profile, "--config", config)
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(path, "bench", "serve", "--url", c.url, "--requests", "3", "--warmup", "0", "--concurrency", "1",
		"--pictures", "1", "--size", "64x64", "--output", "6", "--json").Output()
	if err != nil {
		t.Fatalf("bench serve: %v\n%s", err, out)
	}
	var r struct {
		Completed int
		Paced     string
		TTFT      float64 `json:"median_ttft_ms"`
	}
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if r.Completed != 3 || r.Paced != "slow" || r.TTFT < 50 {
		t.Errorf("bench serve: %s", out)
	}
	get := func(url string) string {
		resp, err := http.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(body)
	}
	for url, want := range map[string]string{
		c.url + "/health":                `"paced":["slow"]`,
		c.url + "/v1/models":             `"paced":"slow"`,
		c.url + "/metrics":               `trireme_paced_instances{paced="slow"} 3`,
		"http://" + metrics + "/metrics": `trireme_stage_rows_total{paced="slow",role="decode"}`,
	} {
		if body := get(url); !strings.Contains(body, want) {
			t.Errorf("%s does not say %s:\n%s", url, want, body)
		}
	}
	said, err := exec.Command(path, "status", "--nats-url", "nats://"+c.nats).CombinedOutput()
	if err != nil || strings.Count(string(said), " as slow") != 3 {
		t.Errorf("status: %v\n%s", err, said)
	}
	if !strings.Contains(c.log.String(), "slowed down to") {
		t.Errorf("up does not say that NPUs are paced:\n%s", c.log)
	}
}
