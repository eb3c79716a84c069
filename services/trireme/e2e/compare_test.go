package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestBenchCompare runs a small comparison: all runs of both topologies are there, no sooner than the profile allows, each repeated,
// and the report says whose figures they are and what follows. What follows depends on the machine and is not looked at.
func TestBenchCompare(t *testing.T) {
	t.Parallel()
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	profile := filepath.Join(dir, "p.yaml")
	text := "name: slow\nsource: this test\nencode: {picture_ms: 40}\nprefill: {step_ms: 20}\ndecode: {step_ms: 1}\n"
	if err := os.WriteFile(profile, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	csv, plot := filepath.Join(dir, "runs.csv"), filepath.Join(dir, "plot.svg")
	cmd := exec.Command(path, "bench", "compare", "--pace", profile, "--npus", "3", "--topologies", "3EPD,1E1P1D", "--pictures", "1",
		"--rates", "8", "--output", "2", "--send", "1s", "--goodput", "ttft:60000", "--csv", csv, "--plot", plot, "--json")
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("bench compare: %v\n%s%s", err, out, &said)
	}
	var r struct {
		Paced, Rule string
		Kept        float64 `json:"pace_kept"`
		Runs        []struct {
			Topology         string
			Repeat, Requests int
			Failed           int
			Attainment       float64
			TTFT             float64 `json:"median_ttft_ms"`
		}
		Findings []struct {
			Verdict string `json:"separate_encode"`
		}
	}
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if r.Paced != "slow" || len(r.Runs) != 4 || len(r.Findings) != 1 || r.Kept <= 0 || r.Kept > 1 {
		t.Fatalf("%s", out)
	}
	// All keep a bound of a minute, so there is no difference.
	if r.Findings[0].Verdict != "no difference beyond the spread of repeats" || !strings.HasPrefix(r.Rule, "Not here") {
		t.Errorf("%s", out)
	}
	order := ""
	for _, x := range r.Runs {
		order += x.Topology + " "
		if x.Requests < 8 || x.Failed > 0 || x.Attainment != 1 || x.TTFT < 60 { // a picture and a prompt
			t.Errorf("%+v", x)
		}
	}
	if order != "3EPD 1E1P1D 1E1P1D 3EPD " {
		t.Errorf("runs in the order %s", order)
	}
	for file, want := range map[string]string{csv: "1E1P1D,1,8,1,", filepath.Join(dir, "plot-1.svg"): "paced as slow"} {
		if text, err := os.ReadFile(file); err != nil || !strings.Contains(string(text), want) {
			t.Errorf("%s: %v, %d bytes without %s", file, err, len(text), want)
		}
	}
	if !strings.Contains(said.String(), "4 runs") {
		t.Errorf("it does not foretell its time: %s", &said)
	}
}
