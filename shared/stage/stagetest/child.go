package stagetest

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"time"

	"trireme.dev/shared/npu"
	"trireme.dev/shared/stage"
)

// Environment of a test binary that is to be a stage process.
const (
	childURL  = "STAGETEST_NATS"
	childHMM  = "STAGETEST_HMM"
	childAck  = "STAGETEST_ACK_WAIT"
	childNPUs = "STAGETEST_NPUS"
	childHold = "STAGETEST_HOLD" // JSON of a Middle
)

// Child makes the test binary a stage process of a role if Rig.Process has started it, or a victim of Rig.Strike, and does not
// return then. TestMain calls it first; serve may be nil where no Process is started.
func Child(role string, serve func(context.Context, *stage.Stage) error) {
	if part := os.Getenv(childStrike); part != "" {
		fmt.Fprintln(os.Stderr, "child:", runToDeath(part))
		os.Exit(1)
	}
	url := os.Getenv(childURL)
	if url == "" {
		return
	}
	ackWait, err := time.ParseDuration(os.Getenv(childAck))
	if err != nil {
		panic(err)
	}
	npus, err := strconv.Atoi(os.Getenv(childNPUs))
	if err != nil {
		panic(err)
	}
	fmt.Fprintln(os.Stderr, "child:", runChild(role, stage.Config{
		NPUs: npus, NATSURL: url, HMM: os.Getenv(childHMM), Model: Root("models/shapes-vl-moe"), Instance: "child", AckWait: ackWait,
		NPU: npu.Options{Threads: 1},
	}, serve))
	os.Exit(1)
}

func runChild(role string, cfg stage.Config, serve func(context.Context, *stage.Stage) error) error {
	ctx := context.Background()
	s, err := stage.Open(ctx, role, cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	defer s.Close()
	if text := os.Getenv(childHold); text != "" {
		n := &s.NPUs()[0]
		if n.Compute, err = newHolder(n.Compute, text); err != nil {
			return err
		}
	}
	return serve(ctx, s)
}

// Process is a stage process of its own.
type Process struct {
	r    *Rig
	cmd  *exec.Cmd
	held chan struct{} // closed when it holds, or has ended
}

// Process starts a stage process (see Child). It is killed when the test ends at the latest.
func (r *Rig) Process() *Process {
	r.tb.Helper()
	return r.process(nil)
}

// ProcessWith starts a stage process that holds in the middle of what m says.
func (r *Rig) ProcessWith(m Middle) *Process {
	r.tb.Helper()
	return r.process(&m)
}

// Holds reports whether the process holds, or has ended.
func (p *Process) Holds() bool {
	select {
	case <-p.held:
		return true
	default:
		return false
	}
}

// process starts a stage process that holds in the middle of what m says, if that is not nil.
func (r *Rig) process(m *Middle) *Process {
	r.tb.Helper()
	exe, err := os.Executable()
	if err != nil {
		r.tb.Fatal(err)
	}
	p := &Process{r: r, cmd: exec.Command(exe), held: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), childURL+"="+r.Stage.NATSURL, childHMM+"="+r.Stage.HMM, childAck+"="+r.Stage.AckWait.String(), childNPUs+"="+strconv.Itoa(r.Stage.NPUs))
	p.cmd.Stderr = os.Stderr
	var out io.Reader
	if m != nil {
		p.cmd.Env = append(p.cmd.Env, childHold+"="+m.text())
		if out, err = p.cmd.StdoutPipe(); err != nil {
			r.tb.Fatal(err)
		}
	}
	if err := p.cmd.Start(); err != nil {
		r.tb.Fatal(err)
	}
	if m != nil {
		go func() {
			defer close(p.held)
			_, _ = out.Read(make([]byte, 1)) // an end is seen by whoever kills it
		}()
	}
	r.tb.Cleanup(p.Kill)
	return p
}

// Kill ends the process with SIGKILL; once dead it stays dead.
func (p *Process) Kill() {
	p.r.tb.Helper()
	if p.cmd.ProcessState != nil {
		return
	}
	p.signal(syscall.SIGKILL)
	_ = p.cmd.Wait() // says that it was killed
}

// KillAtWork kills the process at a moment when it works on messages of its stage and has claimed all that it has taken.
// What is on its way between the two comes again only after AckWait.
func (p *Process) KillAtWork(role string) {
	p.r.tb.Helper()
	p.StopAtWork(role)
	p.Kill()
}

// StopAtWork stops the process, as KillAtWork would kill it, until Continue.
func (p *Process) StopAtWork(role string) {
	p.r.tb.Helper()
	p.r.Until("the process works", func() bool {
		p.stop()
		_, taken := p.r.Queue(role)
		if taken > 0 && p.r.Stats().Claims == taken {
			return true
		}
		p.signal(syscall.SIGCONT)
		return false
	})
}

// stop returns once no thread of the process runs any more: the signal alone only asks for that.
func (p *Process) stop() {
	p.r.tb.Helper()
	p.signal(syscall.SIGSTOP)
	var status syscall.WaitStatus
	for {
		pid, err := syscall.Wait4(p.cmd.Process.Pid, &status, syscall.WUNTRACED, nil)
		switch {
		case err == syscall.EINTR:
			continue
		case err != nil:
			p.r.tb.Fatalf("waiting for process %d to stop: %v", p.cmd.Process.Pid, err)
		case pid != p.cmd.Process.Pid || !status.Stopped():
			p.r.tb.Fatalf("process %d did not stop but ended: status %#x", p.cmd.Process.Pid, int(status))
		}
		return
	}
}

// Continue lets a stopped process go on.
func (p *Process) Continue() {
	p.r.tb.Helper()
	p.signal(syscall.SIGCONT)
}

func (p *Process) signal(sig syscall.Signal) {
	p.r.tb.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		p.r.tb.Fatal(err)
	}
}
