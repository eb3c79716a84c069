package benchcmd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"
)

// lab is an HMM and a giver, processes of their own, and this process's connections to them.
type lab struct {
	ctx    context.Context // ends when one of the processes does, with the reason as its cause
	taker  *hbm.Client
	echo   net.Conn
	orders *json.Encoder
	gives  *json.Decoder

	dir     string
	stdin   io.Closer
	cancel  context.CancelCauseFunc
	workers sync.WaitGroup // wait for the processes
	hmm     *exec.Cmd
	giver   *exec.Cmd
	closing chan struct{}
}

// stopping is the time that a process has for leaving by itself.
const stopping = 5 * time.Second

// open starts the processes with NPUs of so many bytes. They die with this process: the kernel sends them SIGKILL when the
// calling thread ends (PR_SET_PDEATHSIG), so the caller stays on it until close.
func open(ctx context.Context, npuBytes int64) (_ *lab, err error) {
	l := &lab{closing: make(chan struct{})}
	l.ctx, l.cancel = context.WithCancelCause(ctx)
	defer func() {
		if err != nil {
			err = errors.Join(err, l.close())
		}
	}()
	if l.dir, err = os.MkdirTemp("", "trireme-bench-"); err != nil {
		return nil, fmt.Errorf("a folder for the HMM's socket: %w", err)
	}
	socket := filepath.Join(l.dir, "hmm.sock")
	l.hmm, err = l.start("the HMM", nil, nil, nil, "hmm", "--nats-url=", "--node=bench", "--socket="+socket, "--npus=2",
		"--npu-memory="+strconv.FormatInt(npuBytes, 10), "--host-memory=1MiB", "--mm-cache=0", "--log-level=warn")
	if err != nil {
		return nil, err
	}
	if l.taker, err = hbm.Dial(l.ctx, socket, hbm.Hello{Instance: "taker", Role: "decode"}); err != nil {
		return nil, l.because(err)
	}
	if err := l.startGiver(socket); err != nil {
		return nil, l.because(err)
	}
	return l, nil
}

func (l *lab) startGiver(socket string) error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("a socket to ping over: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "socket"), os.NewFile(uintptr(fds[1]), "socket")
	defer theirs.Close()
	l.echo, err = net.FileConn(ours)
	if err = errors.Join(err, ours.Close()); err != nil {
		return fmt.Errorf("a socket to ping over: %w", err)
	}
	in, stdin, err := os.Pipe()
	if err != nil {
		return err
	}
	defer in.Close()
	l.stdin = stdin
	stdout, out, err := os.Pipe()
	if err != nil {
		return err
	}
	defer out.Close()
	l.orders, l.gives = json.NewEncoder(stdin), json.NewDecoder(stdout)
	context.AfterFunc(l.ctx, func() { // at the latest in close; who waits for the giver waits no longer
		_ = stdout.Close()
		_ = l.echo.Close()
	})
	l.giver, err = l.start("the giver", in, out, []*os.File{theirs}, "bench", "give", "--hmm="+socket, "--log-level=warn")
	return err
}

// start starts this program as another process; that it ends before close ends l.ctx.
func (l *lab) start(name string, in, out *os.File, extra []*os.File, args ...string) (*exec.Cmd, error) {
	binary, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("finding this program: %w", err)
	}
	var said bytes.Buffer
	cmd := exec.Command(binary, args...)
	cmd.Env = slices.DeleteFunc(os.Environ(), func(s string) bool { return strings.HasPrefix(s, "TRIREME_") }) // settings of others
	cmd.Stderr = &said
	if in != nil {
		cmd.Stdin, cmd.Stdout = in, out
	}
	cmd.ExtraFiles = extra
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	l.workers.Go(func() {
		err := cmd.Wait()
		select {
		case <-l.closing:
		default:
			l.cancel(fmt.Errorf("%s ended (%v): %s", name, err, strings.TrimSpace(said.String())))
		}
	})
	return cmd, nil
}

// because is err, or why the lab broke down if that is the reason: connections may break before the process is known to
// have ended.
func (l *lab) because(err error) error {
	select {
	case <-l.ctx.Done():
		return fmt.Errorf("%w (%v)", context.Cause(l.ctx), err) // err may be no more than that ctx has ended
	case <-time.After(time.Second):
		return err
	}
}

// order has the giver give objects, in place of those before.
func (l *lab) order(objects int, size int64) ([]mem.Handle, error) {
	if err := l.orders.Encode(order{objects, size}); err != nil {
		return nil, l.because(fmt.Errorf("ordering memory: %w", err))
	}
	var g given
	if err := l.gives.Decode(&g); err != nil {
		return nil, l.because(fmt.Errorf("waiting for memory: %w", err))
	}
	if g.Error != "" {
		return nil, fmt.Errorf("the giver: %s", g.Error)
	}
	return g.Handles, nil
}

// close ends the processes, which have a moment to go by themselves, and removes what they left.
func (l *lab) close() error {
	var errs []error
	close(l.closing)
	l.cancel(nil)
	if l.taker != nil {
		errs = append(errs, l.taker.Close())
	}
	if l.stdin != nil {
		_ = l.stdin.Close() // the giver leaves
	}
	gone := make(chan struct{})
	go func() { l.workers.Wait(); close(gone) }()
	for _, cmd := range []*exec.Cmd{l.giver, l.hmm} {
		if cmd != nil {
			_ = cmd.Process.Signal(syscall.SIGTERM) // an error: it has ended
		}
	}
	select {
	case <-gone:
	case <-time.After(stopping):
		for _, cmd := range []*exec.Cmd{l.giver, l.hmm} {
			if cmd != nil {
				_ = cmd.Process.Kill()
			}
		}
		<-gone
	}
	if l.dir != "" {
		errs = append(errs, os.RemoveAll(l.dir))
	}
	return errors.Join(errs...)
}

// onThread runs f in a goroutine of its own while this one stays on its thread: see open. The scheduler moves f about as
// it does in the services.
func onThread(open func() error, f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := open(); err != nil {
		return err
	}
	done := make(chan error)
	go func() { done <- f() }()
	return <-done
}
