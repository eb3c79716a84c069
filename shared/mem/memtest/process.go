package memtest

import (
	"net"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"trireme.dev/shared/mem"
)

// process is another process with a space on the fixture's store.
type process struct {
	f    *fixture
	cmd  *exec.Cmd
	conn *net.UnixConn
	over bool // ended and waited for
}

// patience bounds the wait for a child's answer; it is long for slow machines, tests do not depend on it.
const patience = time.Minute

// start runs the test binary as a child and has it open a space.
func (f *fixture) start(t *testing.T) *process {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "socket")
	defer theirs.Close()
	conn, err := packets(os.NewFile(uintptr(fds[0]), "socket"))
	if err != nil {
		t.Fatal(err)
	}
	binary, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &process{f: f, conn: conn, cmd: exec.Command(binary)}
	// The race detector would have every child wait a second at its exit.
	p.cmd.Env = append(os.Environ(), childEnv+"=1", "GORACE="+os.Getenv("GORACE")+" atexit_sleep_ms=0")
	p.cmd.ExtraFiles = []*os.File{theirs} // childSocket
	p.cmd.Stdout, p.cmd.Stderr = os.Stdout, os.Stderr
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.kill)
	var file *os.File
	if f.File != nil {
		file = f.File(f.store)
	}
	p.must(t, command{Op: "open", Bytes: Pages * f.page}, file)
	return p
}

// do has the child carry out a command. The file, if any, stays open.
func (p *process) do(t *testing.T, c command, file *os.File) answer {
	t.Helper()
	var a answer
	err := p.conn.SetDeadline(time.Now().Add(patience))
	if err == nil {
		err = send(p.conn, c, file)
	}
	if err == nil {
		_, err = receive(p.conn, &a)
	}
	if err != nil {
		t.Fatalf("child: %s %v: %v", c.Op, c.Extent, err)
	}
	return a
}

// must is do for what has to work.
func (p *process) must(t *testing.T, c command, file *os.File) answer {
	t.Helper()
	a := p.do(t, c, file)
	if a.Err != "" {
		t.Fatalf("child: %s %v: %s", c.Op, c.Extent, a.Err)
	}
	return a
}

// mapped has the child map e, with what it needs handed over the socket, and returns the address.
func (p *process) mapped(t *testing.T, e mem.Extent, a mem.Access) uint64 {
	t.Helper()
	if file := p.f.export(t, e); file != nil {
		p.must(t, command{Op: "import", Extent: e}, file)
		if err := file.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return p.must(t, command{Op: "map", Extent: e, Access: a}, nil).At
}

func (p *process) unmapped(t *testing.T, e mem.Extent) {
	t.Helper()
	p.must(t, command{Op: "unmap", Extent: e}, nil)
	if _, ok := p.f.store.(mem.Exporter); ok {
		p.must(t, command{Op: "forget", Extent: e}, nil)
	}
}

func (p *process) fill(t *testing.T, e mem.Extent, seed uint64) {
	t.Helper()
	p.must(t, command{Op: "fill", Extent: e, Seed: seed}, nil)
}

// sees checks that the child finds in e what a fill with seed left there.
func (p *process) sees(t *testing.T, e mem.Extent, seed uint64) {
	t.Helper()
	if got, want := p.must(t, command{Op: "sum", Extent: e}, nil).CRC, mem.Checksum(noise(seed, e.Bytes)); got != want {
		t.Errorf("the other process finds CRC %08x in %v, want %08x", got, e, want)
	}
}

func (p *process) seesZeros(t *testing.T, e mem.Extent) {
	t.Helper()
	if !p.must(t, command{Op: "sum", Extent: e}, nil).Zero {
		t.Errorf("the other process finds %v not to be zero", e)
	}
}

// exit has the child close its space, tell what it left behind, and exit.
func (p *process) exit(t *testing.T) {
	t.Helper()
	if left := p.must(t, command{Op: "close"}, nil).Left; len(left) > 0 {
		t.Errorf("the other process left behind: %v", left)
	}
	p.over = true
	if err := p.conn.Close(); err != nil {
		t.Error(err)
	}
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("the other process: %v", err)
	}
}

// kill ends the child without notice and waits until it is gone.
func (p *process) kill() {
	if p.over {
		return
	}
	p.over = true
	_ = p.conn.Close()
	_ = p.cmd.Process.Kill() // it may have ended by itself
	_ = p.cmd.Wait()
}
