package transfer_test

import (
	"io"
	"net"
	"sync"
	"testing"
)

// proxy passes bytes on between takers and a server, and harms what comes from the server as it is told.
type proxy struct {
	l      net.Listener
	target string
	work   sync.WaitGroup

	mu      sync.Mutex
	conns   map[net.Conn]bool
	passed  int64 // bytes from the server, over all connections
	stopped chan struct{}

	cutAt   []int64             // connections are cut when that many bytes have passed, once each
	stallAt int64               // nothing is passed on from there
	flipAt  []int64             // bytes that are flipped, once each
	flip    func(at int64) bool // whether the byte at that place of its connection is flipped, each time
}

func newProxy(t testing.TB, target string) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{l: l, target: target, conns: map[net.Conn]bool{}, stopped: make(chan struct{})}
	p.work.Go(p.accept)
	t.Cleanup(func() {
		close(p.stopped)
		_ = l.Close()
		p.cutAll()
		p.work.Wait()
	})
	return p
}

func (p *proxy) addr() string { return p.l.Addr().String() }

func (p *proxy) stallAfter(n int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stallAt = n
}

// track notes a connection to be cut; false when the proxy has stopped.
func (p *proxy) track(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.stopped:
		_ = c.Close()
		return false
	default:
	}
	p.conns[c] = true
	return true
}

func (p *proxy) cutAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		_ = c.(*net.TCPConn).SetLinger(0) // a reset, as from a router that forgot the connection
		_ = c.Close()
	}
	clear(p.conns)
}

func (p *proxy) accept() {
	for {
		taker, err := p.l.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", p.target)
		if err != nil {
			_ = taker.Close()
			continue
		}
		if !p.track(taker) || !p.track(server) {
			_, _ = taker.Close(), server.Close()
			return
		}
		p.work.Go(func() { _, _ = io.Copy(server, taker); _ = server.Close() })
		p.work.Go(func() { p.pass(taker, server); _ = taker.Close(); _ = server.Close() })
	}
}

func (p *proxy) pass(taker, server net.Conn) {
	buf := make([]byte, 32<<10)
	at := int64(0) // bytes of this connection so far
	for {
		n, err := server.Read(buf)
		if n > 0 {
			cut, stall := p.harm(buf[:n], at)
			at += int64(n)
			if stall {
				<-p.stopped
				return
			}
			if cut {
				p.cutAll()
				return
			}
			if _, err := taker.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// harm is about the bytes b, the first of which is the one at that place of its connection.
func (p *proxy) harm(b []byte, at int64) (cut, stall bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	from := p.passed
	p.passed += int64(len(b))
	for len(p.flipAt) > 0 && p.flipAt[0] < p.passed {
		b[max(0, p.flipAt[0]-from)] ^= 0x10
		p.flipAt = p.flipAt[1:]
	}
	if p.flip != nil {
		for i := range b {
			if p.flip(at + int64(i)) {
				b[i] ^= 1
			}
		}
	}
	if len(p.cutAt) > 0 && p.passed >= p.cutAt[0] {
		p.cutAt = p.cutAt[1:]
		return true, false
	}
	return false, p.stallAt > 0 && p.passed >= p.stallAt
}
