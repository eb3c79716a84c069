package e2e

import (
	"bytes"
	"encoding/json"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

// Spare NPUs are nobody's, in text and in JSON, and an instance that is killed has its NPUs and its name again.
func TestSpareNPUsAndNames(t *testing.T) {
	t.Parallel()
	c := start(t, "--topology", "1E1P1Dx2+2")
	type npu struct{ NPU, Instance, Name string }
	read := func() (all []npu) {
		t.Helper()
		var s struct{ NPUs []npu }
		if err := json.Unmarshal(c.table(t, "--json"), &s); err != nil {
			t.Fatal(err)
		}
		return s.NPUs
	}
	before := read()
	if len(before) != 6 {
		t.Fatalf("the NPUs are %+v", before)
	}
	spare, decoder := 0, 0
	for _, n := range before {
		switch {
		case n.Instance == "" && n.Name == "":
			spare++
		case n.Name == "decoder-0" && strings.HasPrefix(n.Instance, "decoder-0-"):
			decoder++
		}
	}
	if spare != 2 || decoder != 2 {
		t.Errorf("the NPUs are %+v: want 2 spare, 2 of decoder-0", before)
	}
	kill(t, c.pid(t, "decoder"))
	back := func(n npu) bool { // it has an NPU again
		return n.Name == "decoder-0" && !slices.ContainsFunc(before, func(b npu) bool { return b.Instance == n.Instance })
	}
	after := read()
	for deadline := time.Now().Add(time.Minute); !slices.ContainsFunc(after, back) && time.Now().Before(deadline); after = read() {
		time.Sleep(50 * time.Millisecond)
	}
	for i, n := range after {
		if n.NPU != before[i].NPU || n.Name != before[i].Name || (n.Name == "decoder-0") == (n.Instance == before[i].Instance) {
			t.Errorf("before a restart of decoder-0: %+v; after: %+v", before[i], n)
		}
	}
	text := string(c.table(t))
	for _, n := range before {
		found := false
		for line := range strings.Lines(text) {
			f := strings.Fields(line)
			found = found || len(f) == 3 && f[0] == n.NPU && (n.Instance == "" && f[1] == "spare" && f[2] == "-" || f[2] == n.Name)
		}
		if !found {
			t.Errorf("status does not tell of %+v:\n%s", n, text)
		}
	}
}

// table is what `trireme status` writes, with NPUs.
func (c *cluster) table(t *testing.T, args ...string) []byte {
	t.Helper()
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	return statusOf(t, path, "nats://"+c.nats, "/0", args...)
}

// statusOf is what `trireme status` writes, once that names an NPU: it waits a second for an HMM, which may stand still for longer.
func statusOf(t *testing.T, path, nats, npu string, args ...string) (out []byte) {
	t.Helper()
	eventually(t, "the HMM tells of its NPUs", func() bool {
		var err error
		if out, err = exec.Command(path, append([]string{"status", "--nats-url", nats}, args...)...).Output(); err != nil {
			t.Fatalf("status %v: %v", args, err)
		}
		return bytes.Contains(out, []byte(npu))
	})
	return out
}
