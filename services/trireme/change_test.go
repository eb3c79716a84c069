package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/wire"
)

// watched is a writer that calls f with all that was written.
type watched struct {
	mu   sync.Mutex
	text bytes.Buffer
	f    func(string)
}

func (w *watched) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.text.Write(p)
	w.f(w.text.String())
	return len(p), nil
}

// Who ends a command while its operation is under way is told that this goes on.
func TestInterruptedChangeGoesOn(t *testing.T) {
	url := bustest.Run(t).URL()
	b, err := bus.Connect(t.Context(), url, t.Name(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	if _, err := b.Conn().Subscribe(wire.SubjectChange("d0"), func(m *nats.Msg) {
		var c wire.Change
		if err := wire.Unmarshal(m.Data, &c); err != nil || c.Seen > 0 {
			return // there is no news
		}
		data, err := wire.Marshal(&wire.ChangeReport{ID: c.ID, Kind: c.Kind, Instance: "d0", Number: 1, State: "prepare"})
		if err != nil {
			t.Error(err)
		}
		_ = m.Respond(data)
	}); err != nil {
		t.Fatal(err)
	}
	there := make(chan struct{})
	go func() {
		_ = b.Announce(t.Context(), func() wire.Instance {
			return wire.Instance{ID: "d0", Role: "decode", Node: "n", Ready: true, NPUs: []int{0}}
		})
		close(there)
	}()
	view, err := b.Instances(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for len(view.All()) == 0 {
		select {
		case <-there:
			t.Fatal("no heartbeat")
		case <-time.After(time.Millisecond):
		}
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	said := &watched{f: func(text string) {
		if strings.Contains(text, "prepare") {
			cancel(interrupted(syscall.SIGINT))
		}
	}}
	c := &scaleCmd{Who: "decoder", changeFlags: changeFlags{NATSURL: url, Timeout: time.Minute, AckWait: bus.DefaultAckWait}}
	if err := c.NPUs.UnmarshalText([]byte("+1")); err != nil {
		t.Fatal(err)
	}
	err = c.Run(&env{ctx: ctx, out: new(bytes.Buffer), err: said})
	if !errors.Is(err, context.Canceled) || !strings.Contains(said.text.String(), "scale of d0 has not ended, and goes on by itself") {
		t.Errorf("%v; said %s", err, said.text.String())
	}
}

// How much is copied is shown as a bar at a terminal, which goes before the next line, and else in a line now and then.
func TestTeller(t *testing.T) {
	plan := wire.ChangePlan{Moves: true, Bytes: 40}
	reports := []struct {
		after  time.Duration
		state  string
		copied int64
	}{{0, "plan", 0}, {0, "prepare", 0}, {time.Second, "prepare", 10}, {9 * time.Second, "prepare", 20}, {time.Second, "prepare", 30}, {0, "commit", 40}}
	for name, x := range map[string]struct {
		terminal bool
		want     []string
	}{
		"piped":    {false, []string{"plan", "prepare", "20 B of 40 B copied", "commit"}},
		"terminal": {true, []string{"plan", "prepare", "bar 10", "bar 20", "bar 30", "bar 40", "commit"}},
	} {
		var said bytes.Buffer
		now := time.Unix(0, 0)
		tell := teller{w: &said, now: func() time.Time { return now }}
		if x.terminal {
			tell.bar = func(done, total int64) { fmt.Fprintf(&said, "bar %d of %d\n", done, total) }
		}
		for _, r := range reports {
			now = now.Add(r.after)
			tell.tell(&wire.ChangeReport{ID: "op", Kind: "scale", State: r.state, Copied: r.copied, Plan: plan})
		}
		lines := strings.Split(strings.TrimSpace(said.String()), "\n")
		fits := len(lines) == len(x.want)
		for i := 0; fits && i < len(lines); i++ {
			fits = strings.Contains(lines[i], x.want[i])
		}
		if !fits {
			t.Errorf("%s: %q, want %q", name, lines, x.want)
		}
	}
}

// Of an operation whose instance was killed no figure is told that nobody has measured.
func TestPrintChange(t *testing.T) {
	r := wire.ChangeReport{Plan: wire.ChangePlan{Moves: true}, Why: "instance d is gone", Epoch: 2, Committed: true, UsedBefore: 1 << 20}
	for _, x := range []struct {
		change      func()
		says, never []string
	}{
		{func() {}, []string{"note      instance d is gone", "epoch     2"}, []string{"took", "pause", "memory"}},
		{func() { r.Total = time.Second }, []string{"took      1s", "pause"}, []string{"memory"}},
		{func() { r.Peak = 2 << 20 }, []string{"took", "memory    2 MiB at most, before 1 MiB"}, nil},
	} {
		x.change()
		var out bytes.Buffer
		if err := printChange(&out, &r, false); err != nil {
			t.Fatal(err)
		}
		for _, s := range x.says {
			if !strings.Contains(out.String(), s) {
				t.Errorf("%q is missing in\n%s", s, &out)
			}
		}
		for _, s := range x.never {
			if strings.Contains(out.String(), s) {
				t.Errorf("%q is told in\n%s", s, &out)
			}
		}
	}
}
