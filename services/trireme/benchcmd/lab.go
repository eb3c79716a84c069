package benchcmd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"
)

// lab is an HMM and a giver, processes of their own, and this process's connections to them.
type lab struct {
	*crew
	taker  *hbm.Client
	echo   net.Conn
	orders *json.Encoder
	gives  *json.Decoder
	stdin  io.Closer
}

// open starts the processes with NPUs of so many bytes; see newCrew.
func open(ctx context.Context, npuBytes int64) (_ *lab, err error) {
	l := new(lab)
	if l.crew, err = newCrew(ctx); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.close())
		}
	}()
	socket := filepath.Join(l.dir, "hmm.sock")
	_, err = l.start("the HMM", nil, nil, nil, "hmm", "--nats-url=", "--node=bench", "--socket="+socket, "--npus=2",
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
	_, err = l.start("the giver", in, out, []*os.File{theirs}, "bench", "give", "--hmm="+socket, "--log-level=warn")
	return err
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
	var err error
	if l.taker != nil {
		err = l.taker.Close()
	}
	if l.stdin != nil {
		_ = l.stdin.Close() // the giver leaves
	}
	return errors.Join(err, l.crew.close())
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
