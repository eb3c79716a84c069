package lead_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"trireme.dev/services/scaler/lead"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/bustest"
)

// lease is that of the tests: nothing is concluded from how long something takes, but a leader that nobody does anything to keeps the
// lead on a machine that stands still for a moment.
const lease = 4 * time.Second

func TestMain(m *testing.M) {
	bustest.ServeIfAsked()
	if os.Getenv("LEADTEST_ID") != "" {
		os.Exit(scaler(os.Getenv("LEADTEST_ID"), os.Getenv("LEADTEST_URL"), os.Getenv("LEADTEST_ACTS")))
	}
	os.Exit(m.Run())
}

// scaler is the whole life of a process of a test: when it leads it notes an operation of its own in the place of the one that it has
// found, and then acts as long as it may: it appends its id and its fence to a file that all of them have.
func scaler(id, url, acts string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, "scaler of a test:", err)
		return 1
	}
	f, err := os.OpenFile(acts, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fail(err)
	}
	b, err := bus.Connect(ctx, url, id, slog.New(slog.DiscardHandler))
	if err != nil {
		return fail(err)
	}
	defer b.Close()
	fmt.Println("connected")
	err = lead.Run(ctx, lead.Config{Bus: b, ID: id, Lease: lease}, func(ctx context.Context, t *lead.Term) error {
		found := "nothing"
		if op := t.Pending(); op != nil {
			found = fmt.Sprint(op.ID, "/", op.Step, "/", string(op.Note))
		}
		fmt.Println("found", found)
		for n := 0; ; n++ {
			if n%20 == 0 {
				err := t.Note(ctx, &lead.Operation{ID: "of-" + id, Step: 1, Note: []byte(`{"n":7}`)})
				if err == nil && n == 0 {
					fmt.Println("noted", t.Fence())
				}
			}
			if t.Check() == nil {
				if _, err := fmt.Fprintln(f, id, t.Fence()); err != nil {
					return err
				}
			}
			select {
			case <-time.After(5 * time.Millisecond):
			case <-ctx.Done():
				if errors.Is(context.Cause(ctx), lead.ErrDeposed) {
					fmt.Println("deposed", t.Note(context.Background(), nil) != nil)
				}
				return nil
			}
		}
	})
	if err != nil {
		return fail(err)
	}
	return 0
}

// fleet is scalers of a test.
type fleet struct {
	t    *testing.T
	acts string

	mu   sync.Mutex
	said map[string][]string // by id
}

type process struct {
	fleet *fleet
	id    string
	cmd   *exec.Cmd
}

func newFleet(t *testing.T) *fleet {
	return &fleet{t: t, acts: filepath.Join(t.TempDir(), "acts"), said: map[string][]string{}}
}

func (f *fleet) start(id, url string) *process {
	f.t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "LEADTEST_ID="+id, "LEADTEST_URL="+url, "LEADTEST_ACTS="+f.acts)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		f.t.Fatal(err)
	}
	p := &process{f, id, cmd}
	var reading sync.WaitGroup
	reading.Go(func() {
		for s := bufio.NewScanner(out); s.Scan(); {
			f.mu.Lock()
			f.said[id] = append(f.said[id], s.Text())
			f.mu.Unlock()
		}
	})
	f.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		reading.Wait()
		_ = cmd.Wait()
	})
	return p
}

// lines are what a process has said.
func (p *process) lines() []string {
	p.fleet.mu.Lock()
	defer p.fleet.mu.Unlock()
	return append([]string(nil), p.fleet.said[p.id]...)
}

func (p *process) signal(s os.Signal) {
	p.fleet.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.fleet.t.Fatal(err)
	}
}

// await waits for a line that begins so, behind the first n, and returns it.
func (p *process) await(start string, n int) string {
	p.fleet.t.Helper()
	var line string
	p.fleet.await(p.id+": "+start, func() bool {
		lines := p.lines()
		for _, line = range lines[min(n, len(lines)):] {
			if strings.HasPrefix(line, start) {
				return true
			}
		}
		return false
	})
	return line
}

func (f *fleet) await(what string, ok func() bool) {
	f.t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.t.Fatalf("waited for a minute for: %s; said was %v", what, f.said)
		}
	}
}

// act is a line of the file.
type act struct {
	id    string
	fence uint64
}

func (f *fleet) read() (all []act) {
	data, err := os.ReadFile(f.acts)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		f.t.Fatal(err)
	}
	for _, line := range strings.Split(string(data), "\n") {
		var a act
		if n, _ := fmt.Sscan(line, &a.id, &a.fence); n == 2 {
			all = append(all, a)
		}
	}
	return all
}

// acted waits until a process has acted once more.
func (f *fleet) acted(p *process) {
	f.t.Helper()
	count := func() (n int) {
		for _, a := range f.read() {
			if a.id == p.id {
				n++
			}
		}
		return n
	}
	before := count()
	f.await(p.id+" acts", func() bool { return count() > before })
}

// check reads what was done as one does that refuses older fences than it has seen: no two have had the same, and of what is not refused
// each belongs to who had the newest.
func (f *fleet) check() {
	f.t.Helper()
	holders := map[uint64]string{}
	newest, refused, terms, last := uint64(0), 0, 0, ""
	all := f.read()
	for _, a := range all {
		if h := holders[a.fence]; h != "" && h != a.id {
			f.t.Errorf("%s and %s have acted with fence %d", h, a.id, a.fence)
		}
		holders[a.fence] = a.id
		if a.fence < newest {
			refused++
			continue
		}
		if newest = a.fence; a.id != last {
			last = a.id
			terms++
		}
	}
	f.t.Logf("%d acts, %d refused for an older fence, %d changes of who leads, fences to %d", len(all), refused, terms, newest)
	if terms < 2 {
		f.t.Error("the lead has never changed")
	}
}

// leader is the one of two that leads, which is the one that acts, and the other one.
func (f *fleet) leader(a, b *process) (first, second *process) {
	f.t.Helper()
	f.await("one of them leads", func() bool {
		all := f.read()
		if len(all) == 0 {
			return false
		}
		if first, second = a, b; all[len(all)-1].id == b.id {
			first, second = b, a
		}
		return strings.Contains(strings.Join(first.lines(), "\n"), "noted")
	})
	return first, second
}

// A leader that is killed is succeeded by one that finds its operation.
func TestLeaderKilled(t *testing.T) {
	t.Parallel()
	s, f := bustest.Run(t), newFleet(t)
	first, second := f.leader(f.start("a", s.URL()), f.start("b", s.URL()))
	said := len(second.lines())
	first.signal(syscall.SIGKILL)
	if got := second.await("found", said); got != "found of-"+first.id+`/1/{"n":7}` {
		t.Errorf("the successor has %s", got)
	}
	f.acted(second)
	f.check()
}

// A leader that is stopped for so long that another one leads does nothing any more when it goes on, and follows.
func TestLeaderStopped(t *testing.T) {
	t.Parallel()
	s, f := bustest.Run(t), newFleet(t)
	first, second := f.leader(f.start("a", s.URL()), f.start("b", s.URL()))
	said := len(second.lines())
	first.signal(syscall.SIGSTOP)
	second.await("noted", said)
	said = len(first.lines())
	first.signal(syscall.SIGCONT)
	if got := first.await("deposed", said); got != "deposed true" {
		t.Errorf("a note behind the end of the term was stored: %s", got)
	}
	f.acted(second)
	said = len(first.lines())
	second.signal(syscall.SIGKILL)
	first.await("noted", said)
	f.acted(first)
	f.check()
}

// A leader that is told to end is succeeded, and what was under way stays noted.
func TestLeaderEnds(t *testing.T) {
	t.Parallel()
	s, f := bustest.Run(t), newFleet(t)
	first, second := f.leader(f.start("a", s.URL()), f.start("b", s.URL()))
	said := len(second.lines())
	first.signal(syscall.SIGTERM)
	if got := second.await("found", said); got != "found of-"+first.id+`/1/{"n":7}` {
		t.Errorf("the successor has %s", got)
	}
	f.acted(second)
	f.check()
}

// A leader that is cut from NATS ends its term by its own clock, another one leads, and the first follows when it is back.
func TestLeaderCut(t *testing.T) {
	t.Parallel()
	s, f := bustest.Run(t), newFleet(t)
	la, lb := newLine(t, s.URL()), newLine(t, s.URL())
	a, b := f.start("a", la.url()), f.start("b", lb.url())
	first, second := f.leader(a, b)
	line := map[*process]*line{a: la, b: lb}
	said, others := len(first.lines()), len(second.lines())
	line[first].cut()
	first.await("deposed", said)
	second.await("noted", others)
	line[first].mend()
	f.acted(second)
	said = len(first.lines())
	second.signal(syscall.SIGKILL)
	if got := first.await("found", said); got != "found of-"+second.id+`/1/{"n":7}` {
		t.Errorf("who was cut off has %s", got)
	}
	first.await("noted", said)
	f.acted(first)
	f.check()
}

// NATS is killed and started again, for longer than a lease: nobody acts meanwhile, then one does.
func TestNATSRestarted(t *testing.T) {
	t.Parallel()
	s, f := bustest.RunProcess(t), newFleet(t)
	first, second := f.leader(f.start("a", s.URL()), f.start("b", s.URL()))
	said := len(first.lines())
	s.Kill()
	first.await("deposed", said)
	before := len(f.read())
	s.Start()
	f.await("one of them leads", func() bool { return len(f.read()) > before })
	if f.read()[before].id == first.id {
		first.signal(syscall.SIGKILL)
		f.acted(second)
	} else {
		second.signal(syscall.SIGKILL)
		f.acted(first)
	}
	f.check()
}

// NATS is started again without its store: the record is gone, and whoever leads then has a greater fence all the same.
func TestNATSLosesItsStore(t *testing.T) {
	t.Parallel()
	s, f := bustest.Run(t), newFleet(t)
	a := f.start("a", s.URL())
	before := a.await("noted", 0)
	said := len(a.lines())
	s.Stop()
	s.Wipe()
	s.Start()
	if got := a.await("found", said); got != "found nothing" {
		t.Errorf("it has %s, which was lost with the store", got)
	}
	var old, now uint64
	if _, err := fmt.Sscanf(before, "noted %d", &old); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscanf(a.await("noted", said), "noted %d", &now); err != nil || now <= old {
		t.Errorf("its fence is %d, before it was %d: %v", now, old, err)
	}
}

// line is a TCP connection to NATS that a test can have swallow everything.
type line struct {
	t      *testing.T
	l      net.Listener
	target string

	mu    sync.Mutex
	dead  bool
	conns []net.Conn
}

func newLine(t *testing.T, url string) *line {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &line{t: t, l: l, target: strings.TrimPrefix(url, "nats://")}
	go p.accept()
	t.Cleanup(func() {
		l.Close()
		p.mend()
	})
	return p
}

func (p *line) url() string { return "nats://" + p.l.Addr().String() }

func (p *line) accept() {
	for {
		a, err := p.l.Accept()
		if err != nil {
			return
		}
		b, err := net.Dial("tcp", p.target)
		if err != nil {
			a.Close()
			continue
		}
		p.mu.Lock()
		p.conns = append(p.conns, a, b)
		p.mu.Unlock()
		for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
			go func() {
				_, _ = io.Copy(way[1], passing{way[0], p})
				a.Close()
				b.Close()
			}()
		}
	}
}

// passing is a side of a line: while that is cut, what is read is thrown away.
type passing struct {
	net.Conn
	line *line
}

func (c passing) Read(b []byte) (int, error) {
	for {
		n, err := c.Conn.Read(b)
		c.line.mu.Lock()
		dead := c.line.dead
		c.line.mu.Unlock()
		if err != nil || !dead {
			return n, err
		}
	}
}

func (p *line) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dead = true
}

// mend ends the connections from which something is missing; new ones work.
func (p *line) mend() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dead = false
	for _, c := range p.conns {
		c.Close()
	}
	p.conns = nil
}
