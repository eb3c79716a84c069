package e2e

import (
	"bytes"
	"encoding/json"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"trireme.dev/services/trireme/benchcmd"
)

// memoryBench is `trireme bench memory` with a folder of its own for what it leaves behind.
func memoryBench(t *testing.T, args ...string) (cmd *exec.Cmd, dir string) {
	t.Helper()
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	if dir, err = os.MkdirTemp("", "mb"); err != nil { // shorter than t.TempDir, whose name may be too long for a socket
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	cmd = exec.Command(path, append([]string{"bench", "memory"}, args...)...)
	cmd.Env = append(os.Environ(), "TMPDIR="+dir, "TRIREME_METRICS=not an address") // settings of services are not its children's
	return cmd, dir
}

// inside lists processes that have a folder in their command line.
func inside(t *testing.T, dir string) (pids []string) {
	t.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range lines {
		if text, err := os.ReadFile(f); err == nil && bytes.Contains(text, []byte(dir)) { // else it has just ended
			pids = append(pids, filepath.Base(filepath.Dir(f)))
		}
	}
	return pids
}

func wait(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never happened: %s", what)
		}
	}
}

func nothingLeft(t *testing.T, dir string) {
	t.Helper()
	if left := inside(t, dir); left != nil {
		t.Errorf("processes are left: %v", left)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("files are left: %v, %v", left, err)
	}
}

func TestMemoryBench(t *testing.T) {
	t.Parallel()
	cmd, dir := memoryBench(t, "--json", "--largest", "2MiB", "--time", "1ms")
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, said.String())
	}
	nothingLeft(t, dir)
	var r benchcmd.Report
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	rows := map[string]benchcmd.Row{}
	for _, m := range r.Rows {
		if m.Samples < 3 || m.P50 <= 0 || m.P99 < m.P50 {
			t.Errorf("%+v", m)
		}
		if m.Against == "" {
			rows[m.Name] = m
			continue
		}
		base, ok := rows[m.Against]
		a, b := float64(m.P50), float64(base.P50)
		switch {
		case !ok:
			t.Errorf("%s is compared with %q, which was not measured before", m.Name, m.Against)
		case m.Calls > 0 && base.Calls > 0: // each call's
			a, b = a/float64(m.Calls), b/float64(base.Calls)
		case m.Bytes != base.Bytes || m.Extents > 0 && base.Extents > 0 && m.Extents != base.Extents:
			t.Errorf("%+v is compared with another amount: %+v", m, base)
		}
		if math.Abs(m.Ratio-a/b) > 1e-9*m.Ratio {
			t.Errorf("%s: ratio %v, %v by its figures", m.Name, m.Ratio, a/b)
		}
		rows[m.Name] = m
	}
	for _, name := range []string{
		"call of the HMM", "call, 200 callers", "attach an extent", "attach 1000 extents", "map an extent", "map 1000 extents",
		"remap an extent", "remap 1000 extents", "hand over 1 MiB by map", "hand over 1 MiB by copy", "hand over 2 MiB by map",
		"hand over 2 MiB by copy", "copy 2 MiB between maps", "memcpy of 2 MiB", "checksum of 2 MiB",
		"back and touch 64 MiB of fresh memory", "  of memory used before", "  of memory made ready",
	} {
		if _, ok := rows[name]; !ok {
			t.Errorf("nothing about %q", name)
		}
	}
}

// What becomes of the processes and files of a run that ends in the middle.
func TestMemoryBenchEndsEarly(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		end  func(t *testing.T, cmd *exec.Cmd, dir string) error
		says string // on standard error, a regular expression
		left bool   // its folder, which nobody is there to remove
		code int    // it exits with; -1: a signal ends it
	}{
		"interrupted": {func(_ *testing.T, cmd *exec.Cmd, _ string) error { return cmd.Process.Signal(os.Interrupt) }, "", false, 130},
		"killed":      {func(_ *testing.T, cmd *exec.Cmd, _ string) error { return cmd.Process.Kill() }, "", true, -1},
		"its HMM killed": {func(t *testing.T, _ *exec.Cmd, dir string) error {
			hmm, err := findHMM(t, dir)
			if err != nil {
				return err
			}
			return syscall.Kill(hmm, syscall.SIGKILL)
		}, `the HMM ended \(signal: killed\)|the giver ended .*the HMM`, false, 1}, // which did not reach it any more
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cmd, dir := memoryBench(t, "--largest", "1MiB", "--time", "1h")
			var out, said bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &said
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			wait(t, "both processes run", func() bool { return len(inside(t, dir)) == 2 })
			if err := c.end(t, cmd, dir); err != nil {
				t.Fatal(err)
			}
			select {
			case <-ended:
			case <-time.After(time.Minute):
				_ = cmd.Process.Kill()
				t.Fatal("it goes on")
			}
			wait(t, "its processes are gone", func() bool { return inside(t, dir) == nil })
			if c.left {
				left, err := filepath.Glob(dir + "/*/*")
				if err != nil || len(left) > 1 {
					t.Errorf("more than a socket is left: %v, %v", left, err)
				}
			} else {
				nothingLeft(t, dir)
			}
			if code := cmd.ProcessState.ExitCode(); code != c.code {
				t.Errorf("exit status %d, want %d", code, c.code)
			}
			if !regexp.MustCompile(c.says).MatchString(said.String()) || out.Len() > 0 {
				t.Errorf("it said %q and wrote %q", said.String(), out.String())
			}
		})
	}
}

// findHMM is the process id of the HMM of a run.
func findHMM(t *testing.T, dir string) (int, error) {
	t.Helper()
	for _, pid := range inside(t, dir) {
		text, err := os.ReadFile("/proc/" + pid + "/cmdline")
		if args := strings.Split(string(text), "\x00"); err == nil && len(args) > 1 && args[1] == "hmm" {
			return strconv.Atoi(pid)
		}
	}
	return 0, os.ErrProcessDone
}
