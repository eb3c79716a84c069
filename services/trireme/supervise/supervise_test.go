package supervise_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"trireme.dev/services/trireme/supervise"
)

// The test binary plays the parts of children and of a supervising parent.
func TestMain(m *testing.M) {
	switch os.Getenv("SUPERVISE_PART") {
	case "":
		os.Exit(m.Run())
	case "parent":
		parent()
	}
	if len(os.Args) < 2 {
		os.Exit(9)
	}
	switch os.Args[1] {
	case "obedient":
		c := make(chan os.Signal, 1)
		signal.Notify(c, syscall.SIGTERM)
		fmt.Println("up", os.Getpid())
		<-c
		os.Exit(0)
	case "stubborn":
		signal.Ignore(syscall.SIGTERM)
		fmt.Println("up", os.Getpid())
		time.Sleep(time.Hour)
	case "failing":
		os.Exit(3)
	}
}

// parent supervises one obedient child until it is killed.
func parent() {
	exe, _ := os.Executable()
	os.Setenv("SUPERVISE_PART", "child")
	s := supervise.New(os.Stdout, func(supervise.Exit) {})
	s.Start(supervise.Child{Name: "c", Path: exe, Args: []string{"obedient"}})
	select {}
}

func TestBackoff(t *testing.T) {
	var b supervise.Backoff
	var got []time.Duration
	for _, life := range []time.Duration{0, 0, 900 * time.Millisecond, 2 * time.Second, 0, time.Minute, 500 * time.Millisecond} {
		got = append(got, b.Next(life)/time.Millisecond)
	}
	if s := fmt.Sprint(got); s != fmt.Sprint([]time.Duration{50, 100, 200, 50, 100, 50, 50}) {
		t.Errorf("delays are %s", s)
	}
	for range 20 {
		b.Next(0)
	}
	if d := b.Next(0); d != 10*time.Second {
		t.Errorf("the longest delay is %v", d)
	}
}

// lines gives what children print, line by line.
func lines(t *testing.T) (io.Writer, func() string) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	scan := bufio.NewScanner(r)
	return w, func() string {
		if !scan.Scan() {
			t.Fatalf("children print nothing more: %v", scan.Err())
		}
		return scan.Text()
	}
}

func child(t *testing.T, kind string) supervise.Child {
	t.Helper()
	t.Setenv("SUPERVISE_PART", "child")
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return supervise.Child{Name: kind, Path: exe, Args: []string{kind}}
}

func pidOf(t *testing.T, line string) int {
	t.Helper()
	pid, err := strconv.Atoi(strings.TrimPrefix(line, "up "))
	if err != nil {
		t.Fatalf("line %q: %v", line, err)
	}
	return pid
}

func TestKilledChildIsStartedAgain(t *testing.T) {
	out, next := lines(t)
	exits := make(chan supervise.Exit, 10)
	s := supervise.New(out, func(e supervise.Exit) { exits <- e })
	s.Start(child(t, "obedient"))
	first := pidOf(t, next())
	if pgid, err := syscall.Getpgid(first); err != nil || pgid != first {
		t.Errorf("child %d is in process group %d, %v", first, pgid, err)
	}
	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if e := <-exits; e.PID != first || e.How != "signal: killed" || e.Code != -1 {
		t.Errorf("exit is %+v", e)
	}
	second := pidOf(t, next())
	if second == first {
		t.Error("the same process again")
	}
	if err := s.Stop(time.Minute, "obedient"); err != nil {
		t.Error(err)
	}
	if syscall.Kill(second, 0) == nil {
		t.Error("the child outlived Stop")
	}
	if len(exits) != 0 {
		t.Errorf("stopping reported an exit: %+v", <-exits)
	}
}

func TestFailureTellsItsStatus(t *testing.T) {
	exits := make(chan supervise.Exit, 100)
	s := supervise.New(io.Discard, func(e supervise.Exit) { exits <- e })
	s.Start(child(t, "failing"))
	// Where a process takes long to start it has had a long life when it ends: then the delay does not rise.
	before, doubled := supervise.Exit{}, false
	for i := 0; i < 100 && !doubled; i++ {
		e := <-exits
		if e.Code != 3 {
			t.Fatalf("exit is %+v", e)
		}
		doubled = before.Again > 0 && e.Again == 2*before.Again
		before = e
	}
	if !doubled {
		t.Errorf("the delay never rises; the last exit is %+v", before)
	}
	if err := s.Stop(time.Minute, "failing"); err != nil {
		t.Error(err)
	}
}

func TestMissingBinary(t *testing.T) {
	exits := make(chan supervise.Exit, 100)
	s := supervise.New(io.Discard, func(e supervise.Exit) { exits <- e })
	s.Start(supervise.Child{Name: "x", Path: "/does/not/exist"})
	if e := <-exits; e.Started || !strings.Contains(e.How, "no such file") {
		t.Errorf("exit is %+v", e)
	}
	if err := s.Stop(time.Minute, "x"); err != nil {
		t.Error(err)
	}
}

func TestStubbornChildIsKilled(t *testing.T) {
	out, next := lines(t)
	s := supervise.New(out, func(supervise.Exit) {})
	s.Start(child(t, "stubborn"))
	pid := pidOf(t, next())
	if err := s.Stop(10*time.Millisecond, "stubborn"); err == nil || !strings.Contains(err.Error(), "stubborn") {
		t.Errorf("Stop: %v", err)
	}
	if syscall.Kill(pid, 0) == nil {
		t.Error("the child outlived Stop")
	}
}

// SIGKILL to the parent takes the child along.
func TestChildDiesWithItsParent(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), "SUPERVISE_PART=parent")
	var log bytes.Buffer
	cmd.Stderr = &log
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	scan := bufio.NewScanner(out)
	if !scan.Scan() {
		t.Fatalf("no child: %s", &log)
	}
	pidOf(t, scan.Text())
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	// Parent and child hold the pipe: its end is the end of both.
	if scan.Scan() {
		t.Errorf("unexpected line %q", scan.Text())
	}
	_ = cmd.Wait()
}
