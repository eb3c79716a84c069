package e2e

import (
	"encoding/json"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// changesOf runs bench scale, which must lose and change no answer, and returns what it says.
func changesOf(t *testing.T, args ...string) (r scaleReport) {
	t.Helper()
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	cmd := exec.Command(path, append([]string{"bench", "scale", "--bytes", "64MiB", "--rate", "4", "--output", "16", "--window", "1s", "--json"}, args...)...)
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, &said)
	}
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatal(err)
	}
	for _, c := range r.Changes {
		if c.Failed > 0 || c.Changed > 0 || c.Requests == 0 || c.Latency <= 0 || c.Held < 64<<20 || c.Before.Tokens <= 0 || c.After.Tokens <= 0 {
			t.Errorf("%s: %+v; want every request answered as without a change", c.Strategy, c)
		}
	}
	return r
}

type scaleReport struct {
	Paced   string
	Changes []struct {
		Strategy      string
		Rate          int64   `json:"copy_bytes_per_s"`
		Latency       float64 `json:"latency_s"`
		Held          int64   `json:"held_bytes"`
		Requests      int
		Failed        int
		Changed       int
		Parts         map[string]float64
		Before, After struct {
			Tokens float64 `json:"tokens_per_second"`
		}
	}
	Ways []struct{ Strategy string }
	Bars []struct {
		Name string
		Runs int
	}
}

// bench scale grows an instance in place at two copy rates, and by another process: nobody's answer is lost or changed, and it tells of
// all.
func TestBenchScale(t *testing.T) {
	r := changesOf(t, "--strategy", "elastic,no-standby", "--from", "1", "--to", "2", "--copy-rate", "1GiB,100MiB")
	var ways []string
	for _, c := range r.Changes {
		ways = append(ways, c.Strategy)
	}
	if want := []string{"elastic", "elastic", "no-standby"}; r.Paced == "" || !slices.Equal(ways, want) || len(r.Ways) != 3 {
		t.Fatalf("changes %v, ways %v; want %v", ways, r.Ways, want)
	}
	for _, c := range r.Changes[:2] {
		if c.Parts["operation_s"] <= 0 || c.Parts["copied_bytes"] < 16<<20 {
			t.Errorf("the second NPU gets about half of the experts by copies: %v", c.Parts)
		}
	}
	if slow := r.Changes[1]; slow.Rate != 100<<20 || slow.Latency < slow.Parts["copied_bytes"]/(100<<20)-0.2 {
		t.Errorf("at 100 MiB/s it took %g s", slow.Latency)
	}
	if len(r.Bars) != 5 || r.Bars[0].Runs != 1 {
		t.Errorf("bars %+v", r.Bars)
	}
}

// The same for experts that are placed anew; without paced NPUs there are no bars.
func TestBenchRebalance(t *testing.T) {
	r := changesOf(t, "--change", "rebalance", "--from", "2", "--strategy", "elastic", "--pace", "none")
	if len(r.Changes) != 1 || r.Paced != "" || len(r.Bars) != 0 || r.Changes[0].Parts["balance_after"] <= r.Changes[0].Parts["balance_before"] {
		t.Errorf("%+v", r)
	}
}
