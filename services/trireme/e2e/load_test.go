package e2e

import (
	"encoding/json"
	"os/exec"
	"testing"
)

// TestBenchServe sends a small load to a real system. Every figure in the result has to fit the load that was asked for.
func TestBenchServe(t *testing.T) {
	t.Parallel()
	c := start(t)
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(path, "bench", "serve", "--url", c.url, "--requests", "12", "--warmup", "1", "--rate", "50",
		"--arrivals", "bursts:6", "--pictures", "0-2", "--size", "64x64,96x128", "--output", "5-9", "--goodput", "e2el:600000", "--json").Output()
	if err != nil {
		t.Fatalf("bench serve: %v\n%s", err, out)
	}
	var r struct {
		Completed, Failed int
		Attainment        float64   `json:"slo_attainment"`
		Outputs           []int     `json:"output_lens"`
		Inputs            []int     `json:"input_lens"`
		TTFTs             []float64 `json:"ttfts"`
		Output            int       `json:"total_output_tokens"`
	}
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if r.Completed != 12 || r.Failed != 0 || r.Attainment != 1 || len(r.Outputs) != 12 || len(r.TTFTs) != 12 {
		t.Fatalf("%s", out)
	}
	sum := 0
	for i, n := range r.Outputs {
		sum += n
		if n < 5 || n > 9 || r.Inputs[i] < 8 || r.TTFTs[i] <= 0 {
			t.Errorf("request %d: %d tokens for %d, TTFT %g s", i, n, r.Inputs[i], r.TTFTs[i])
		}
	}
	if sum != r.Output {
		t.Errorf("%d tokens in all, the answers have %d", r.Output, sum)
	}
}
