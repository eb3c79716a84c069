package e2e

import (
	"encoding/json"
	"os/exec"
	"strings"
	"testing"
)

// bench scale grows an instance in place and by a restart: nobody's answer is lost or changed, and it tells of both.
func TestBenchScale(t *testing.T) {
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	cmd := exec.Command(path, "bench", "scale", "--strategy", "elastic,cold", "--from", "1", "--to", "2", "--bytes", "64MiB", "--copy-rate", "1GiB",
		"--rate", "4", "--output", "16", "--before", "1s", "--after", "1s", "--json")
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, &said)
	}
	var r struct {
		Paced   string
		Changes []struct {
			Strategy string
			Latency  float64 `json:"latency_s"`
			Held     int64   `json:"held_bytes"`
			Requests int
			Failed   int
			Changed  int
			Parts    map[string]float64
			After    struct {
				Tokens float64 `json:"tokens_per_second"`
			}
		}
	}
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatal(err)
	}
	if r.Paced == "" || len(r.Changes) != 2 || r.Changes[0].Strategy != "elastic" || r.Changes[1].Strategy != "cold" {
		t.Fatalf("the report is %s", out)
	}
	for _, c := range r.Changes {
		if c.Failed > 0 || c.Changed > 0 || c.Requests == 0 || c.Latency <= 0 || c.Held < 64<<20 {
			t.Errorf("%s: %+v; want every request answered as without a change", c.Strategy, c)
		}
	}
	if parts := r.Changes[0].Parts; parts["operation_s"] <= 0 || parts["copied_bytes"] < 16<<20 {
		t.Errorf("the second NPU gets about half of the experts by copies: %v", parts)
	}
}
