package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestBenchIRP runs a small one: both systems come up, every picture is encoded, no sooner than the profile's NPUs can, and the
// result says whose figures they are. How much is won depends on the machine and is not looked at.
func TestBenchIRP(t *testing.T) {
	t.Parallel()
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	profile := filepath.Join(t.TempDir(), "p.yaml")
	text := "name: slow\nsource: this test\nencode: {picture_ms: 40}\nprefill: {step_ms: 20}\ndecode: {step_ms: 1}\n"
	if err := os.WriteFile(profile, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "bench", "irp", "--pace", profile, "--encoders", "2", "--pictures", "1,3", "--requests", "1", "--json")
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("bench irp: %v\n%s%s", err, out, &said)
	}
	var r struct {
		Paced, Source string
		Rows          []struct {
			Pictures int
			One      float64 `json:"one_encoder_mm_ms"`
			All      float64 `json:"all_encoders_mm_ms"`
			Ideal    float64 `json:"ideal_mm_ratio"`
			OneTTFT  float64 `json:"one_encoder_ttft_ms"`
			AllTTFT  float64 `json:"all_encoders_ttft_ms"`
		}
	}
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if r.Paced != "slow" || r.Source != "this test" || len(r.Rows) != 2 || r.Rows[1].Ideal != 1.5 {
		t.Fatalf("%s", out)
	}
	for i, n := range []float64{1, 3} {
		rounds := []float64{1, 2}[i]
		// A busy machine sees things late, never early.
		if x := r.Rows[i]; x.Pictures != int(n) || x.One < 40*n || x.All < 40*rounds || x.OneTTFT < 40*n+20 || x.AllTTFT < 40*rounds+20 {
			t.Errorf("%+v", x)
		}
	}
}
