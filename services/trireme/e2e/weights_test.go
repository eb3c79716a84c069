package e2e

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"trireme.dev/shared/hbm"
)

// weightsHeld waits until one weight set is whole and held by so many stages, and returns the domain's account.
func (c *cluster) weightsHeld(tb testing.TB, stages int) hbm.NPUStats {
	tb.Helper()
	var account hbm.NPUStats
	c.expectWithin(tb, time.Minute, fmt.Sprintf("one weight set for %d stages", stages), func(s hbm.Stats) bool {
		if len(s.Weights) != 1 || s.Weights[0].Loaded != s.Weights[0].Bytes || s.Weights[0].Holders != stages {
			return false
		}
		account = s.Shared[0]
		return account.Used == s.Weights[0].Bytes
	})
	return account
}

// hbmMemory is what a process has mapped of the NPUs' memory, in bytes: pages in its tables, and the same with each page
// divided among all who have it.
func hbmMemory(tb testing.TB, pid int) (rss, pss int64) {
	tb.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		tb.Fatal(err)
	}
	ours := false
	for line := range strings.Lines(string(data)) {
		var n int64
		switch {
		case strings.Contains(line, "memfd:"):
			ours = strings.Contains(line, "trireme-hbm")
		case !strings.Contains(line[:strings.IndexByte(line, ' ')], ":"): // another map
			ours = false
		case ours && strings.HasPrefix(line, "Rss:"):
			fmt.Sscanf(line, "Rss: %d", &n)
			rss += n << 10
		case ours && strings.HasPrefix(line, "Pss:"):
			fmt.Sscanf(line, "Pss: %d", &n)
			pss += n << 10
		}
	}
	return rss, pss
}

// A second and a third user of a model cost no memory: by the HMM's books and by the kernel's. A decoder that is killed
// finds the weights there when it starts again, and after the HMM's death they are loaded anew.
func TestWeightsOnceANode(t *testing.T) {
	t.Parallel()
	c := start(t, "--topology", "1E1P2D", "--threads", "1")
	account := c.weightsHeld(t, 3)
	var sumRSS, sumPSS int64
	stages := 0
	for _, p := range c.children() {
		rss, pss := hbmMemory(t, p.pid)
		switch p.role {
		case "prefill", "decoder":
			stages++
			if rss < account.Used {
				t.Errorf("%s has %d bytes of %d in its page tables", p.role, rss, account.Used)
			}
		case "encoder": // its part lies in the files as it is used
			if rss >= account.Used {
				t.Errorf("the encoder has the language model's %d bytes", rss)
			}
		}
		sumRSS, sumPSS = sumRSS+rss, sumPSS+pss
	}
	t.Logf("%d stages see %.1f MiB of device memory, which takes %.1f MiB; the weights are %.1f MiB",
		stages, float64(sumRSS)/(1<<20), float64(sumPSS)/(1<<20), float64(account.Used)/(1<<20))
	if stages != 3 || sumRSS < 3*account.Used || sumPSS > account.Used+account.Used/10 {
		t.Errorf("%d stages have %d bytes mapped, shared out %d; the weights are %d", stages, sumRSS, sumPSS, account.Used)
	}

	question := ask(t, "Count from 3 to 9.")
	want, err := c.stream(t.Context(), question, nil)
	if err != nil {
		t.Fatal(err)
	}
	// restarted kills a child and waits until others have come for it and for those that it takes along.
	restarted := func(role string, along ...string) {
		t.Helper()
		before := c.children()
		dead := c.pid(t, role)
		kill(t, dead)
		for _, p := range before {
			if p.pid == dead || slices.Contains(along, p.role) {
				c.waitExit(t, p)
			}
		}
		account := c.weightsHeld(t, 3)
		c.waitReady(t)
		if s, err := c.stream(t.Context(), question, nil); err != nil || s.text != want.text {
			t.Errorf("after the death of %s: %q, %v; want %q", role, s.text, err, want.text)
		}
		if now := c.weightsHeld(t, 3); now.Peak != account.Used+account.Padded {
			t.Errorf("after the death of %s weights took %d bytes at most, there are %d", role, now.Peak, account.Used)
		}
	}
	restarted("decoder")
	restarted("decoder")
	restarted("hmm", "encoder", "prefill", "decoder")
	c.expectNoMemory(t)
}
