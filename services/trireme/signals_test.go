package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/services/scaler/record"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/wire"
)

// Services are what runs until a signal ends it: all else has not done what it was to do then.
func TestServices(t *testing.T) {
	want := []string{"up", "gateway", "encoder", "prefill", "decoder", "stage", "hmm", "scaler run"}
	var c cli
	var all []string
	for _, n := range newParser(&c, nil, new(bytes.Buffer), new(bytes.Buffer), func(int) {}).Model.Leaves(false) {
		if serves(n) {
			name, _, _ := strings.Cut(strings.TrimPrefix(n.FullPath(), "trireme "), " <")
			all = append(all, name)
		}
	}
	if !slices.Equal(all, want) {
		t.Errorf("%q run until a signal ends them, want %q", all, want)
	}
}

// What is sent twice within moments, as timeout sends it, is one signal.
func TestOneSignalSentTwice(t *testing.T) {
	began := time.Now()
	f := first{syscall.SIGTERM, began}
	for _, x := range []struct {
		signal syscall.Signal
		after  time.Duration
		want   bool
	}{
		{syscall.SIGTERM, 0, false}, {syscall.SIGTERM, echo - 1, false}, {syscall.SIGTERM, echo, true}, {syscall.SIGINT, 0, true},
	} {
		if got := f.again(x.signal, began.Add(x.after)); got != x.want {
			t.Errorf("%v %v after SIGTERM: %v, want %v", x.signal, x.after, got, x.want)
		}
	}
}

// endlessVariable has a test binary be a command that the first signal does not end.
const endlessVariable = "TRIREME_TEST_ENDLESS"

// A second signal ends a command that is slow to stop, also one that was started with SIGINT ignored, as shells start what is to run in the
// background.
func TestSecondSignalEnds(t *testing.T) {
	if os.Getenv(endlessVariable) != "" {
		ctx, _ := interruptible()
		fmt.Println("runs")
		<-ctx.Done()
		fmt.Println("stops")
		select {}
	}
	signal.Notify(make(chan os.Signal, 1), os.Interrupt) // else a child of a test that runs in the background would have it ignored
	for ignore, want := range map[string]string{"": "signal: interrupt", "trap '' INT; ": "exit status 130"} {
		cmd := exec.Command("sh", "-c", ignore+`exec "$0" "$@"`, os.Args[0], "-test.run=^TestSecondSignalEnds$")
		cmd.Env = append(os.Environ(), endlessVariable+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill() })
		lines := bufio.NewScanner(out)
		for _, x := range []struct {
			said string
			then syscall.Signal
		}{{"runs", syscall.SIGTERM}, {"stops", syscall.SIGINT}} {
			if !lines.Scan() || lines.Text() != x.said {
				t.Fatalf("it says %q, %v; want %q", lines.Text(), lines.Err(), x.said)
			}
			if err := cmd.Process.Signal(x.then); err != nil {
				t.Fatal(err)
			}
		}
		if err := cmd.Wait(); err == nil || err.Error() != want {
			t.Errorf("started behind %q it ended with %v, want %s", ignore, err, want)
		}
	}
}

// A command that looks and is ended before it has seen all says that it was, and not that there is no more.
func TestInterruptedLooks(t *testing.T) {
	url := bustest.Run(t).URL()
	nc, err := nats.Connect(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	ack := ackFlag{AckWait: bus.DefaultAckWait}
	for subject, do := range map[string]func(*env) error{
		wire.SubjectScaler: (&scalerStatusCmd{NATSURL: url, ackFlag: ack, JSON: true}).Run,
		wire.SubjectHMM:    (&statusCmd{NATSURL: url, ackFlag: ack, JSON: true}).Run,
	} {
		for ended, late := false, time.Now().Add(time.Minute); !ended; {
			ctx, cancel := context.WithCancelCause(t.Context())
			sub, err := nc.Subscribe(subject, func(*nats.Msg) { cancel(interrupted(syscall.SIGINT)) }) // and no answer
			if err != nil {
				t.Fatal(err)
			}
			if err := nc.Flush(); err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			err = do(&env{ctx: ctx, out: &out, err: new(bytes.Buffer)})
			if ended = ctx.Err() != nil; ended && (!errors.Is(err, context.Canceled) || out.Len() > 0) { // else it had looked long enough before
				t.Errorf("%s: %v, %s", subject, err, &out)
			}
			_ = sub.Unsubscribe()
			cancel(nil)
			if !ended && time.Now().After(late) {
				t.Fatalf("%s: in a minute it was never ended while it looked", subject)
			}
		}
	}
}

// A replay that is ended has not replayed the record.
func TestInterruptedReplay(t *testing.T) {
	file := filepath.Join(t.TempDir(), "record")
	w, err := record.Create(file, 1<<20, "s", autoscale.Default(), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	s := autoscale.New(autoscale.Default())
	for i := range 3 {
		v := &autoscale.View{Now: time.Duration(i) * time.Second}
		d := s.Decide(v)
		if err := w.Write(v, &d); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	lines := 0
	out := &watched{f: func(string) { lines++; cancel(interrupted(syscall.SIGINT)) }}
	c := &scalerReplayCmd{File: file, All: true, JSON: true}
	if err := c.Run(&env{ctx: ctx, out: out, err: new(bytes.Buffer), log: slog.New(slog.DiscardHandler)}); !errors.Is(err, context.Canceled) || lines != 1 {
		t.Errorf("%v after %d lines", err, lines)
	}
	if !json.Valid(bytes.TrimSpace(out.text.Bytes())) {
		t.Errorf("it wrote %s", &out.text)
	}
}
