package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// What trireme plan finds runs: its topology and the one beside it serve the requests that were simulated, no sooner than the profile
// allows. How close the simulator is depends on the machine and is not looked at.
func TestPlanValidate(t *testing.T) {
	t.Parallel()
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	profile := filepath.Join(t.TempDir(), "p.yaml")
	text := "name: slow\nsource: this test\nencode: {picture_ms: 200}\nprefill: {step_ms: 20}\ndecode: {step_ms: 10}\n"
	if err := os.WriteFile(profile, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "plan", "--profile", profile, "--npus", "3", "--pictures", "0-1", "--output", "4", "--slo", "ttft:1s,tpot:60ms", "--top", "1",
		"--seeds", "2", "--validate", "--real", "2s", "--json")
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("plan: %v\n%s%s", err, out, &said)
	}
	type felt struct {
		TTFT float64 `json:"mean_ttft_ms"`
		TPOT float64 `json:"mean_tpot_ms"`
	}
	var r struct {
		Best []struct {
			Topology string
			Goodput  float64 `json:"goodput_requests_per_s"`
		}
		Validated []struct {
			Topology        string
			Rate            float64
			Requests        int
			Real, Simulated felt
		}
	}
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if len(r.Best) == 0 || len(r.Validated) != 2*len(r.Best) {
		t.Fatalf("%s", out)
	}
	for i, v := range r.Validated {
		if v.Topology != r.Best[i/2].Topology || v.Rate <= 0 || v.Requests < 8 {
			t.Errorf("%+v", v)
		}
		for _, f := range []felt{v.Real, v.Simulated} {
			// A step of a prompt, and three of decoding behind it. Whoever sees the first token late has the others right behind it: what comes no
			// sooner than it may is the last one.
			if f.TTFT < 20 || f.TTFT+3*f.TPOT < 49 {
				t.Errorf("%s: sooner than the profile allows: %+v", v.Topology, f)
			}
		}
		if v.Simulated.TPOT < 9 {
			t.Errorf("%s: simulated sooner than the profile allows: %+v", v.Topology, v.Simulated)
		}
	}
}
