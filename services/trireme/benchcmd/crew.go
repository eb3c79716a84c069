package benchcmd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// crew is processes of this program that a command has started, and a folder of theirs.
type crew struct {
	ctx context.Context // ends when one of the processes does, with the reason as its cause
	dir string

	cancel  context.CancelCauseFunc
	workers sync.WaitGroup // wait for the processes
	closing chan struct{}
	all     []*exec.Cmd

	mu      sync.Mutex
	dismiss map[*exec.Cmd]chan struct{} // those that may end; closed when they have
}

// stopping is the time that processes have for leaving by themselves.
const stopping = 15 * time.Second

// newCrew makes a crew of nobody. Processes that it starts die with this one: the kernel sends them SIGKILL when the calling
// thread ends (PR_SET_PDEATHSIG), so the caller stays on it until close; see onThread.
func newCrew(ctx context.Context) (*crew, error) {
	c := &crew{closing: make(chan struct{})}
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	var err error
	if c.dir, err = os.MkdirTemp("", "trireme-bench-"); err != nil {
		c.cancel(nil)
		return nil, fmt.Errorf("a folder for the benchmark's processes: %w", err)
	}
	return c, nil
}

// start starts this program as another process; that it ends before close ends c.ctx.
func (c *crew) start(name string, in, out *os.File, extra []*os.File, args ...string) (*exec.Cmd, error) {
	binary, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("finding this program: %w", err)
	}
	var said bytes.Buffer
	cmd := exec.Command(binary, args...)
	cmd.Env = slices.DeleteFunc(os.Environ(), func(s string) bool { return strings.HasPrefix(s, "TRIREME_") }) // settings of others
	cmd.Stderr = &said
	if in != nil {
		cmd.Stdin = in
	}
	if out != nil {
		cmd.Stdout = out
	}
	cmd.ExtraFiles = extra
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	c.all = append(c.all, cmd)
	c.workers.Go(func() {
		err := cmd.Wait()
		c.mu.Lock()
		defer c.mu.Unlock()
		if gone, ok := c.dismiss[cmd]; ok {
			close(gone)
			return
		}
		select {
		case <-c.closing:
		default:
			c.cancel(fmt.Errorf("%s ended (%v): %s", name, err, strings.TrimSpace(said.String())))
		}
	})
	return cmd, nil
}

// startNATS starts a NATS server, with its files in the crew's folder.
func (c *crew) startNATS() (at natsAt, cmd *exec.Cmd, err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return at, nil, err
	}
	defer r.Close()
	cmd, err = c.start("NATS", nil, w, nil, "bench", "nats", "--data", filepath.Join(c.dir, "jetstream"), "--log-level=warn")
	if err = errors.Join(err, w.Close()); err != nil {
		return at, nil, err
	}
	if err := json.NewDecoder(r).Decode(&at); err != nil {
		return at, nil, fmt.Errorf("waiting for NATS: %w", err)
	}
	return at, cmd, nil
}

// healthy waits until the gateway at a URL says that a request would succeed.
func (c *crew) healthy(url string) error {
	client := http.Client{Timeout: time.Second}
	for {
		resp, err := client.Get(url + "/health")
		if err == nil {
			_ = resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
		}
		if err := c.sleep(50 * time.Millisecond); err != nil {
			return err
		}
	}
}

// sleep waits, or says why the crew is no more.
func (c *crew) sleep(d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-c.ctx.Done():
		return context.Cause(c.ctx)
	}
}

// stop ends one of the processes, which has a moment to go by itself, and waits until it has gone.
func (c *crew) stop(cmd *exec.Cmd) {
	gone := make(chan struct{})
	c.mu.Lock()
	if c.dismiss == nil {
		c.dismiss = map[*exec.Cmd]chan struct{}{}
	}
	c.dismiss[cmd] = gone
	c.mu.Unlock()
	_ = cmd.Process.Signal(syscall.SIGTERM) // an error: it has ended, which has broken the crew down
	select {
	case <-gone:
	case <-c.ctx.Done():
	case <-time.After(stopping):
		_ = cmd.Process.Kill()
		<-gone
	}
}

// because is err, or why the crew broke down if that is the reason: connections may break before the process is known to
// have ended.
func (c *crew) because(err error) error {
	select {
	case <-c.ctx.Done():
		return fmt.Errorf("%w (%v)", context.Cause(c.ctx), err) // err may be no more than that ctx has ended
	case <-time.After(time.Second):
		return err
	}
}

// close ends the processes, the last one first, which have a moment to go by themselves, and removes what they left.
func (c *crew) close() error {
	close(c.closing)
	c.cancel(nil)
	for _, cmd := range slices.Backward(c.all) {
		_ = cmd.Process.Signal(syscall.SIGTERM) // an error: it has ended
	}
	gone := make(chan struct{})
	go func() { c.workers.Wait(); close(gone) }()
	select {
	case <-gone:
	case <-time.After(stopping):
		for _, cmd := range c.all {
			_ = cmd.Process.Kill()
		}
		<-gone
	}
	return errors.Join(os.RemoveAll(c.dir))
}
