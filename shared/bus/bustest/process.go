package bustest

import (
	"bufio"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"trireme.dev/shared/bus/embedded"
)

// Environment of a test binary that is started again as a server: its store, and the port or 0.
const (
	storeVariable = "TRIREME_BUSTEST_STORE"
	portVariable  = "TRIREME_BUSTEST_PORT"
	hostVariable  = "TRIREME_BUSTEST_HOST"
	pingVariable  = "TRIREME_BUSTEST_PING"
)

// Process is a nats-server in a process of its own, which a test can kill. It is the test's binary, whose TestMain calls
// ServeIfAsked first.
type Process struct {
	tb   testing.TB
	how  Launch
	dir  string
	port int
	cmd  *exec.Cmd
}

// ServeIfAsked is the whole life of a process that Process has started, and returns at once in any other.
func ServeIfAsked() {
	dir := os.Getenv(storeVariable)
	if dir == "" {
		return
	}
	var port int
	_, err := fmt.Sscan(os.Getenv(portVariable), &port)
	ping, pingErr := time.ParseDuration(os.Getenv(pingVariable))
	if err = errors.Join(err, pingErr); err == nil {
		var s *embedded.Server
		log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
		if s, err = embedded.Start(embedded.Options{
			Host: os.Getenv(hostVariable), Port: port, MonitorPort: -1, StoreDir: dir, Ping: ping, Log: log,
		}); err == nil {
			fmt.Println("ready", s.Port())
			_, _ = os.Stdin.Read(make([]byte, 1)) // ends with the test
			os.Exit(0)
		}
	}
	fmt.Fprintln(os.Stderr, "nats-server of a test:", err)
	os.Exit(1)
}

// Launch says how a server's process is started.
type Launch struct {
	By   []string      // a command that runs another one, which is the server: ip netns exec NAME; none: the server itself
	Host string        // that it listens on; "": 127.0.0.1
	Ping time.Duration // see embedded.Options
}

// RunProcess starts a server with an empty store in a process of its own, which is killed when the test ends.
func RunProcess(tb testing.TB) *Process {
	tb.Helper()
	return LaunchProcess(tb, Launch{})
}

// LaunchProcess is RunProcess in another way.
func LaunchProcess(tb testing.TB, how Launch) *Process {
	tb.Helper()
	p := &Process{tb: tb, how: how, dir: tb.TempDir()}
	p.Start()
	tb.Cleanup(p.Kill)
	return p
}

// Port is where it listens.
func (p *Process) Port() int { return p.port }

// URL is where clients connect; it stays the same over Kill and Start.
func (p *Process) URL() string { return fmt.Sprintf("nats://127.0.0.1:%d", p.port) }

// Kill ends the server with SIGKILL.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait() // an error: it was killed
}

// Start starts the server again after Kill, with the same port and store.
func (p *Process) Start() {
	p.tb.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) { // until the port is free again
		err := p.start()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			p.tb.Fatalf("starting nats-server: %v", err)
		}
	}
}

func (p *Process) start() error {
	var said strings.Builder
	command := append(slices.Clone(p.how.By), os.Args[0])
	p.cmd = exec.Command(command[0], command[1:]...)
	p.cmd.Env = append(os.Environ(), storeVariable+"="+p.dir, fmt.Sprintf("%s=%d", portVariable, p.port),
		hostVariable+"="+p.how.Host, pingVariable+"="+p.how.Ping.String())
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	p.cmd.Stderr = &said
	if _, err := p.cmd.StdinPipe(); err != nil {
		return err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := p.cmd.Start(); err != nil {
		return err
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err == nil {
		_, err = fmt.Sscanf(line, "ready %d\n", &p.port)
	}
	if err != nil {
		p.Kill()
		return fmt.Errorf("%w: %s", err, said.String())
	}
	return nil
}
