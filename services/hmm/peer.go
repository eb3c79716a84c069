package hmm

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// peer is the process at the other end of a connection.
type peer struct {
	pid, uid int
	exit     *os.File // pidfd: readable when the process has exited; nil when it cannot be watched
}

// peerOf asks the kernel who connected.
func peerOf(conn *net.UnixConn) (*peer, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("looking at the client: %w", err)
	}
	p := &peer{}
	var inner error
	err = raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil {
			inner = err
			return
		}
		p.pid, p.uid = int(cred.Pid), int(cred.Uid)
		// SO_PEERPIDFD names the very process, even if its number was used again (Linux 6.5).
		pidfd, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
		if err != nil && p.pid > 0 {
			pidfd, err = unix.PidfdOpen(p.pid, 0)
		}
		if err != nil || unix.SetNonblock(pidfd, true) != nil {
			return // it is gone, or lives where this process cannot see it
		}
		p.exit = os.NewFile(uintptr(pidfd), "pidfd")
	})
	if err = errors.Join(err, inner); err != nil {
		return nil, fmt.Errorf("looking at the client: %w", err)
	}
	return p, nil
}

// allowed reports whether the client is of this user, or root.
func (p *peer) allowed() error {
	if p.uid != 0 && p.uid != os.Geteuid() {
		return fmt.Errorf("user %d may not use the HMM of user %d", p.uid, os.Geteuid())
	}
	return nil
}

// wait blocks until the process has exited: true; or until close: false. A process that cannot be watched counts as one
// that has exited.
func (p *peer) wait() bool {
	if p.exit == nil {
		return true
	}
	raw, err := p.exit.SyscallConn()
	if err != nil {
		return false
	}
	return raw.Read(func(fd uintptr) bool {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 0)
		return err == nil && n == 1
	}) == nil
}

func (p *peer) close() {
	if p.exit != nil {
		_ = p.exit.Close() // read-only, nothing to lose
	}
}
