package e2e

import (
	"encoding/json"
	"os/exec"
	"strings"
	"testing"
)

// TestBenchControl runs a small one: every hop is seen for every request, and every token of every stream is found again. There are tokens while
// it measures, and more messages than heartbeats, even where the machine stands still for two seconds.
func TestBenchControl(t *testing.T) {
	t.Parallel()
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "bench", "control", "--streams", "12", "--decoders", "2", "--step", "20ms", "--time", "3s", "--requests", "12", "--json")
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("bench control: %v\n%s%s", err, out, &said)
	}
	var r struct {
		Stages string
		Hops   []struct {
			Name    string
			Samples int
			P50     float64 `json:"p50_ms"`
			P99     float64 `json:"p99_ms"`
		}
		Traffic []struct{ Messages, Bytes float64 }
		Load    struct {
			Tokens int
			Rate   float64 `json:"tokens_per_s"`
			P50    float64 `json:"delay_p50_ms"`
			P99    float64 `json:"delay_p99_ms"`
			CPU    []struct{ Name string }
		}
	}
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if !strings.Contains(r.Stages, "stand-ins") || len(r.Hops) != 9 || len(r.Traffic) != 2 || len(r.Load.CPU) != 6 {
		t.Fatalf("%s", out)
	}
	for _, h := range r.Hops {
		if h.Samples != 12 || !(h.P50 > 0) || h.P99 < h.P50 {
			t.Errorf("hop %+v", h)
		}
	}
	// A text request is a prefill and a decode message, tokens, a question for its end, and acknowledgements of each.
	if x := r.Traffic; x[0].Messages < 6 || x[1].Messages <= x[0].Messages || x[0].Bytes < 500 || x[1].Bytes <= x[0].Bytes {
		t.Errorf("traffic %+v", x)
	}
	if l := r.Load; l.Tokens == 0 || !(l.Rate > 0) || !(l.P50 > 0) || l.P99 < l.P50 {
		t.Errorf("load %+v", l)
	}
}
