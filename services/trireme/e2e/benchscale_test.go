package e2e

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// benchScale is bench scale of a small model. In its windows there are tokens even where the machine stands still for two seconds.
func benchScale(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	return exec.Command(path, append([]string{"bench", "scale", "--bytes", "64MiB", "--rate", "4", "--output", "16", "--window", "3s", "--json"}, args...)...)
}

// changesOf runs it, which must lose and change no answer, and returns what it says.
func changesOf(t *testing.T, args ...string) (r scaleReport) {
	t.Helper()
	var said strings.Builder
	cmd := benchScale(t, args...)
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, &said)
	}
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatal(err)
	}
	if r.Planned != len(r.Changes) || !r.Compared {
		t.Errorf("%d runs of %d, answers compared: %v", len(r.Changes), r.Planned, r.Compared)
	}
	for _, c := range r.Changes {
		if c.Failed > 0 || c.Changed > 0 || c.Requests == 0 || c.Latency <= 0 || c.Held < 64<<20 || c.Before.Tokens <= 0 || c.After.Tokens <= 0 {
			t.Errorf("%s: %+v; want every request answered as without a change", c.Strategy, c)
		}
	}
	return r
}

type scaleReport struct {
	Paced    string
	Planned  int     `json:"runs_planned"`
	Compared bool    `json:"answers_compared"`
	Best     float64 `json:"faster_than_best"`
	Standby  float64 `json:"faster_than_standby"`
	Changes  []struct {
		Strategy      string
		Rate          int64   `json:"copy_bytes_per_s"`
		Latency       float64 `json:"latency_s"`
		Downtime      float64 `json:"downtime_s"`
		Ready         int64   `json:"ready_bytes"`
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

// bench scale grows an instance in place at two copy rates, by another process, and by another instance that stands by: nobody's answer is lost
// or changed, and it tells of all.
func TestBenchScale(t *testing.T) {
	t.Parallel()
	r := changesOf(t, "--strategy", "elastic,no-standby,standby", "--from", "1", "--to", "2", "--copy-rate", "1GiB,100MiB")
	var ways []string
	for _, c := range r.Changes {
		ways = append(ways, c.Strategy)
	}
	if want := []string{"elastic", "elastic", "no-standby", "standby"}; r.Paced == "" || !slices.Equal(ways, want) || len(r.Ways) != 4 {
		t.Fatalf("changes %v, ways %v; want %v", ways, r.Ways, want)
	}
	for _, c := range r.Changes[:2] {
		if c.Parts["operation_s"] <= 0 || c.Parts["copied_bytes"] < 16<<20 {
			t.Errorf("the second NPU gets about half of the experts by copies: %v", c.Parts)
		}
		if c.Ready < 32<<20 {
			t.Errorf("each NPU had %d bytes of memory ready, want as much as it gets", c.Ready)
		}
	}
	if slow := r.Changes[1]; slow.Rate != 100<<20 || slow.Latency < slow.Parts["copied_bytes"]/(100<<20)-0.2 {
		t.Errorf("at 100 MiB/s it took %g s", slow.Latency)
	}
	if c := r.Changes[3]; c.Parts["copied_bytes"] < 64<<20 || r.Standby <= 0 {
		t.Errorf("the standby gets a copy of all experts: %v; elastic is %g times as fast", c.Parts, r.Standby)
	}
	if len(r.Bars) != 5 || r.Bars[0].Runs != 1 {
		t.Errorf("bars %+v", r.Bars)
	}
}

// The same for experts that are placed anew; without paced NPUs there are no bars.
func TestBenchRebalance(t *testing.T) {
	t.Parallel()
	r := changesOf(t, "--change", "rebalance", "--from", "2", "--strategy", "elastic", "--pace", "none", "--no-ready")
	if len(r.Changes) != 1 || r.Changes[0].Ready != 0 || r.Paced != "" || len(r.Bars) != 0 || r.Changes[0].Parts["balance_after"] <= r.Changes[0].Parts["balance_before"] {
		t.Errorf("%+v", r)
	}
}

// The same for an NPU that goes over from prefill to the decoder, and back: in place, and by other processes of both instances.
func TestBenchRole(t *testing.T) {
	t.Parallel()
	for _, x := range []struct{ from, to, ways string }{{"1", "2", "all"}, {"2", "1", "elastic,cold"}} {
		t.Run("from "+x.from+" to "+x.to, func(t *testing.T) {
			t.Parallel()
			benchRole(t, x.from, x.to, x.ways)
		})
	}
}

func benchRole(t *testing.T, from, to, which string) {
	r := changesOf(t, "--change", "role", "--from", from, "--to", to, "--strategy", which)
	var ways []string
	for _, x := range r.Changes {
		ways = append(ways, x.Strategy)
	}
	want := []string{"elastic", "cold", "extravagant", "colocated"}
	if which != "all" {
		want = want[:2]
	}
	if !slices.Equal(ways, want) || len(r.Bars) != 5 || r.Best <= 0 {
		t.Fatalf("%+v; want %v, and no bar for how much faster than others", r, want)
	}
	if p := r.Changes[0].Parts; p["leave_operation_s"] <= 0 || p["join_operation_s"] <= 0 {
		t.Errorf("%v", p)
	}
	if disk := 64.0 / 205; r.Changes[1].Latency < disk || r.Changes[1].Downtime < disk {
		t.Errorf("cold took %g s, %g of silence; the disk needs %g", r.Changes[1].Latency, r.Changes[1].Downtime, disk)
	}
}

// bench scale that is ended early says what it has until then, and leaves out the comparison of answers. The model is kept.
func TestBenchScaleEnded(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	saved, kept := filepath.Join(dir, "report.json"), filepath.Join(dir, "models")
	cmd := benchScale(t, "--strategy", "elastic", "--from", "1", "--to", "2", "--repeats", "50", "--save", saved, "--keep", kept)
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		if _, err := os.Stat(saved); err == nil {
			break
		}
		select {
		case err := <-ended:
			t.Fatalf("%v: %s", err, &said)
		case <-time.After(20 * time.Millisecond):
		}
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; cmd.ProcessState.ExitCode() != 128+int(syscall.SIGINT) {
		t.Fatalf("%v: %s; want 130, so that a script sees that runs are missing", err, &said)
	}
	file, err := os.ReadFile(saved)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"output": out.Bytes(), "file": file} {
		var r scaleReport
		if err := json.Unmarshal(data, &r); err != nil {
			t.Fatalf("%s: %v: %s", name, err, data)
		}
		if r.Planned != 50 || r.Compared || len(r.Changes) == 0 || len(r.Changes) == 50 || len(r.Bars) != 5 {
			t.Errorf("%s: %+v; want some of 50 runs", name, r)
		}
	}
	models, err := filepath.Glob(filepath.Join(kept, "*"))
	if err != nil || len(models) != 1 {
		t.Errorf("kept are %v, %v; want one model and nothing else", models, err)
	}
}
