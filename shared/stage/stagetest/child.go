package stagetest

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"syscall"

	"trireme.dev/shared/npu"
	"trireme.dev/shared/stage"
)

// Environment of a test binary that is to be a stage process.
const (
	childURL = "STAGETEST_NATS"
	childHMM = "STAGETEST_HMM"
)

// Child makes the test binary a stage process of its own if Rig.Process has started it, and does not return then. TestMain
// calls it first.
func Child(run func(context.Context, stage.Config, *slog.Logger) error) {
	url := os.Getenv(childURL)
	if url == "" {
		return
	}
	err := run(context.Background(), stage.Config{
		NATSURL: url, HMM: os.Getenv(childHMM), Model: Root("models/shapes-vl-moe"), Instance: "child", AckWait: Long,
		NPU: npu.Options{Threads: 1},
	}, slog.New(slog.DiscardHandler))
	fmt.Fprintln(os.Stderr, "child:", err)
	os.Exit(1)
}

// Process is a stage process of its own.
type Process struct {
	r   *Rig
	cmd *exec.Cmd
}

// Process starts a stage process (see Child), in a rig of AckWait Long. It is killed when the test ends at the latest.
func (r *Rig) Process() *Process {
	r.tb.Helper()
	if r.Stage.AckWait != Long {
		r.tb.Fatalf("a process of AckWait %v in a rig of %v", Long, r.Stage.AckWait)
	}
	exe, err := os.Executable()
	if err != nil {
		r.tb.Fatal(err)
	}
	p := &Process{r: r, cmd: exec.Command(exe)}
	p.cmd.Env = append(os.Environ(), childURL+"="+r.Stage.NATSURL, childHMM+"="+r.Stage.HMM)
	p.cmd.Stderr = os.Stderr
	if err := p.cmd.Start(); err != nil {
		r.tb.Fatal(err)
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
	p.r.Until("the process works", func() bool {
		p.signal(syscall.SIGSTOP)
		_, taken := p.r.Queue(role)
		if taken > 0 && p.r.Stats().Claims == taken {
			p.Kill()
			return true
		}
		p.signal(syscall.SIGCONT)
		return false
	})
}

func (p *Process) signal(sig syscall.Signal) {
	p.r.tb.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		p.r.tb.Fatal(err)
	}
}
