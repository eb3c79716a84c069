package supervise

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Child is one process to keep running.
type Child struct {
	Name string   // for messages
	Path string   // of the binary
	Args []string // without the binary
	Env  []string // KEY=value, as os.Environ; nil: this process' own
}

// Exit tells of a child that ended by itself.
type Exit struct {
	Child   Child
	PID     int
	How     string        // "exit status 1", "signal: killed"
	Code    int           // exit status, -1 for a signal
	Again   time.Duration // until it is started again
	Started bool          // false: it could not be started at all
}

// Supervisor runs children. Each is a direct child in a process group of its own and dies with this process: the kernel
// sends SIGKILL when the thread that started it ends (PR_SET_PDEATHSIG, prctl(2)), so one thread, which lives as long as
// the process, starts them all.
type Supervisor struct {
	out    io.Writer // stderr and stdout of children
	onExit func(Exit)
	starts chan func()

	mu      sync.Mutex
	running map[string]*run
}

type run struct {
	stop context.CancelFunc
	done chan struct{} // closed when the child is gone for good
	mu   sync.Mutex
	pid  int // 0 between two lives
}

// New makes a supervisor. Children write to out. onExit is called, from any goroutine, when one ends by itself.
func New(out io.Writer, onExit func(Exit)) *Supervisor {
	s := &Supervisor{out: out, onExit: onExit, starts: make(chan func()), running: map[string]*run{}}
	go func() {
		runtime.LockOSThread() // never unlocked: see Supervisor
		for f := range s.starts {
			f()
		}
	}()
	return s
}

// Start keeps a child running until Stop. Names are unique.
func (s *Supervisor) Start(c Child) {
	ctx, cancel := context.WithCancel(context.Background())
	r := &run{stop: cancel, done: make(chan struct{})}
	s.mu.Lock()
	if s.running[c.Name] != nil {
		panic("BUG: two children are called " + c.Name)
	}
	s.running[c.Name] = r
	s.mu.Unlock()
	go func() {
		defer close(r.done)
		s.keep(ctx, c, r)
	}()
}

// keep starts c again and again until ctx ends.
func (s *Supervisor) keep(ctx context.Context, c Child, r *run) {
	var back Backoff
	for {
		began := time.Now()
		exit := s.live(ctx, c, r)
		if ctx.Err() != nil {
			return
		}
		exit.Again = back.Next(time.Since(began))
		s.onExit(exit)
		select {
		case <-time.After(exit.Again):
		case <-ctx.Done():
			return
		}
	}
}

// live is one life of c.
func (s *Supervisor) live(ctx context.Context, c Child, r *run) Exit {
	cmd := exec.Command(c.Path, c.Args...)
	cmd.Env = c.Env
	cmd.Stdout, cmd.Stderr = s.out, s.out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	s.starts <- func() { started <- cmd.Start() }
	if err := <-started; err != nil {
		return Exit{Child: c, How: err.Error(), Code: -1}
	}
	r.mu.Lock()
	r.pid = cmd.Process.Pid
	if ctx.Err() != nil { // stopped while it was starting: Stop found no process to signal
		_ = cmd.Process.Signal(syscall.SIGTERM)
	}
	r.mu.Unlock()
	err := cmd.Wait()
	r.mu.Lock()
	r.pid = 0
	r.mu.Unlock()
	e := Exit{Child: c, PID: cmd.Process.Pid, How: "exit status 0", Started: true}
	if ee := (*exec.ExitError)(nil); errors.As(err, &ee) {
		e.How, e.Code = ee.Error(), ee.ExitCode()
	} else if err != nil {
		e.How, e.Code = err.Error(), -1
	}
	return e
}

// Stop ends the named children together: SIGTERM, then SIGKILL to their groups after grace. It returns when they are
// gone, and an error that names those that had to be killed. Unknown names are ignored.
func (s *Supervisor) Stop(grace time.Duration, names ...string) error {
	var runs []*run
	var who []string
	s.mu.Lock()
	for _, name := range names {
		if r := s.running[name]; r != nil {
			runs, who = append(runs, r), append(who, name)
			delete(s.running, name)
		}
	}
	s.mu.Unlock()
	for _, r := range runs {
		r.stop()
		r.signal(syscall.SIGTERM)
	}
	late := time.NewTimer(grace)
	defer late.Stop()
	var killed []string
	for i, r := range runs {
		select {
		case <-r.done:
			continue
		case <-late.C:
			late.Reset(0) // the others are late too
		}
		killed = append(killed, who[i])
		r.signal(syscall.SIGKILL)
		<-r.done
	}
	if killed != nil {
		return fmt.Errorf("%s did not stop within %v and had to be killed", strings.Join(killed, ", "), grace)
	}
	return nil
}

// signal sends to the child's process group, if it lives.
func (r *run) signal(sig syscall.Signal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.pid != 0 {
		_ = syscall.Kill(-r.pid, sig)
	}
}
