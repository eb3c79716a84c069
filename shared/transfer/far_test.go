package transfer_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// far joins the nodes by a long way: what one sends into its TUN device comes out of the other's later, or, with the
// probability loss, never. It does what tc's netem would, which few kernels for small virtual machines have.
func (n *nodes) far(delay time.Duration, loss float64) {
	a, z := n.tun(n.a, addressA), n.tun(n.z, addressB)
	done := make(chan struct{}, 4)
	for _, way := range [][2]*os.File{{a, z}, {z, a}} {
		type packet struct {
			due time.Time
			p   []byte
		}
		queue := make(chan packet, 4096)
		go func() {
			defer func() { close(queue); done <- struct{}{} }()
			buf := make([]byte, 64<<10)
			for {
				k, err := way[0].Read(buf)
				if err != nil {
					return // closed
				}
				if rand.Float64() < loss {
					continue
				}
				select {
				case queue <- packet{time.Now().Add(delay), append([]byte(nil), buf[:k]...)}:
				default: // a full router drops, too
				}
			}
		}()
		go func() {
			defer func() { done <- struct{}{} }()
			for p := range queue {
				time.Sleep(time.Until(p.due))
				_, _ = way[1].Write(p.p) // lost when the device is closed
			}
		}()
	}
	n.b.Cleanup(func() {
		_, _ = a.Close(), z.Close()
		for range cap(done) {
			<-done
		}
	})
}

// tun makes a TUN device in a namespace and opens it from here.
func (n *nodes) tun(ns, addr string) *os.File {
	n.b.Helper()
	type result struct {
		fd  int
		err error
	}
	opened := make(chan result)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread, which is in the namespace, ends with this goroutine
		fd, err := openTUN("/run/netns/" + ns)
		opened <- result{fd, err}
	}()
	r := <-opened
	if r.err != nil {
		n.b.Skipf("SKIPPED: no TUN device in %s: %v", ns, r.err)
	}
	n.sh("ip -n %s addr add %s/24 dev far0", ns, addr)
	n.sh("ip -n %s link set far0 mtu 9000 txqueuelen 4096 up", ns)
	return os.NewFile(uintptr(r.fd), "tun")
}

func openTUN(namespace string) (int, error) {
	ns, err := os.Open(namespace)
	if err != nil {
		return 0, err
	}
	defer func() { _ = ns.Close() }()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return 0, fmt.Errorf("entering %s: %w", namespace, err)
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return 0, fmt.Errorf("opening the device: %w", err)
	}
	req, err := unix.NewIfreq("far0")
	if err == nil {
		req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		_ = unix.Close(fd)
		return 0, fmt.Errorf("making the device: %w", err)
	}
	return fd, nil
}
