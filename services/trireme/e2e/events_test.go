package e2e

import (
	"bytes"
	"encoding/json"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"trireme.dev/shared/wire"
)

// events are what `trireme events --json --all` prints.
func (c *cluster) events(tb testing.TB, more ...string) []wire.Event {
	tb.Helper()
	path, err := binary()
	if err != nil {
		tb.Fatal(err)
	}
	out, err := exec.Command(path, append([]string{"events", "--json", "--all", "--nats-url", "nats://" + c.nats}, more...)...).Output()
	if err != nil {
		tb.Fatalf("events: %v\n%s", err, out)
	}
	var all []wire.Event
	for d := json.NewDecoder(bytes.NewReader(out)); d.More(); {
		var e wire.Event
		if err := d.Decode(&e); err != nil {
			tb.Fatalf("events --json: %v\n%s", err, out)
		}
		all = append(all, e)
	}
	return all
}

// An operator sees who came, who died, and who came instead.
func TestEvents(t *testing.T) {
	t.Parallel()
	c := start(t)
	var ready []wire.Event
	eventually(t, "events tell of the gateway and of three stages", func() bool { // which are ready before they tell it
		ready = c.events(t, "--kind", wire.EventReady)
		return len(ready) >= 4
	})
	var decoder string
	for _, e := range ready {
		if e.Role == "decode" {
			decoder = e.Instance
		}
	}
	if len(ready) != 4 || decoder == "" {
		t.Fatalf("the gateway and three stages are ready, events are %+v", ready)
	}
	kill(t, c.pid(t, "decoder"))
	// What is told of decoders: each of them by kind and whether it is the first one. That it is gone the HMM tells, by a connection of its own.
	want := []string{"instance.gone first", "instance.ready first", "instance.ready other"}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		var got []string
		for _, e := range c.events(t, "--kind", "instance") {
			if e.Role == "decode" {
				got = append(got, e.Kind+map[bool]string{true: " first", false: " other"}[e.Instance == decoder])
			}
		}
		if slices.Sort(got); slices.Equal(got, want) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("decoders: %q, want %q", got, want)
		}
	}
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(path, "events", "--kind", wire.EventGone, "--last", "1", "--nats-url", "nats://"+c.nats).CombinedOutput()
	if lines := strings.Count(string(out), "\n"); err != nil || lines != 1 || !strings.Contains(string(out), decoder) {
		t.Errorf("%v\n%s", err, out)
	}
	if out, err := exec.Command(path, "events", "--since=-1s").CombinedOutput(); err == nil || !strings.Contains(string(out), "cannot be negative") {
		t.Errorf("%v\n%s", err, out)
	}
}
