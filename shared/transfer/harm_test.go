package transfer_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"trireme.dev/shared/mem"
	"trireme.dev/shared/transfer"
)

func TestFlippedBytesAreFoundAndFetchedAgain(t *testing.T) {
	s := newShelf()
	_, addr := serve(t, transfer.ServerConfig{Source: s, Frame: 256 << 10})
	for _, sealed := range []bool{true, false} {
		p := newProxy(t, addr)
		p.flipAt = []int64{3 * mib, 5*mib + 17, 9 * mib}
		c := connect(t, p.addr(), transfer.ClientConfig{})
		pull(t, c, s, s.put(16*mib, sealed))
		if got := c.Stats(); got.Failures < 1 || got.Wasted == 0 || got.Bytes != 16*mib {
			t.Errorf("sealed %v: %+v, want failures", sealed, got)
		}
	}
}

func TestBytesThatStayDamaged(t *testing.T) {
	s := newShelf()
	_, addr := serve(t, transfer.ServerConfig{Source: s, Frame: 64 << 10})
	p := newProxy(t, addr)
	p.flip = func(at int64) bool { return at%1000 == 999 } // the first lies behind the heads of hello and first frame
	c := connect(t, p.addr(), transfer.ClientConfig{Retries: 3, Streams: 1})
	h := s.put(mib, false)
	if err := c.Pull(t.Context(), h, make([]byte, h.Bytes), nil); !errors.Is(err, mem.ErrCorrupt) {
		t.Errorf("%v, want ErrCorrupt", err)
	}
	if got := c.Stats(); got.Bytes != 0 || got.Damaged != 4 {
		t.Errorf("%+v, want four damaged frames and no good byte", got)
	}
}

// TestMemoryThatIsNotWhatWasSealed: every frame arrives as it was sent, but the sender's memory is wrong.
func TestMemoryThatIsNotWhatWasSealed(t *testing.T) {
	s := newShelf()
	_, addr := serve(t, transfer.ServerConfig{Source: s})
	c := connect(t, addr, transfer.ClientConfig{})
	h := s.put(5*mib, true)
	s.content(h)[4*mib] ^= 1
	if err := c.Pull(t.Context(), h, make([]byte, h.Bytes), nil); !errors.Is(err, mem.ErrCorrupt) {
		t.Errorf("%v, want ErrCorrupt", err)
	}
}

// TestCutsResumeBehindTheLastGoodFrame counts what crosses the wire: what was finished before a cut does not again.
func TestCutsResumeBehindTheLastGoodFrame(t *testing.T) {
	s := newShelf()
	const frame, ahead, streams, size, cuts = 256 << 10, 2, 4, 64 * mib, 5
	_, addr := serve(t, transfer.ServerConfig{Source: s, Frame: frame})
	p := newProxy(t, addr)
	for i := range int64(cuts) {
		p.cutAt = append(p.cutAt, (i+1)*10*mib)
	}
	c := connect(t, p.addr(), transfer.ClientConfig{Streams: streams, Ahead: ahead})
	pull(t, c, s, s.put(size, true))
	got := c.Stats()
	if got.Bytes != size || got.Failures < cuts {
		t.Errorf("%+v after %d cuts", got, cuts)
	}
	if most := int64(cuts * streams * frame); got.Wasted > most {
		t.Errorf("%d bytes came for nothing, at most a frame of each cut connection may: %d", got.Wasted, most)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.cutAt) > 0 {
		t.Errorf("%d cuts did not happen", len(p.cutAt))
	}
}

func TestServerThatStartsAgain(t *testing.T) {
	s := newShelf()
	h := s.put(100, true)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server, err := transfer.NewServer(transfer.ServerConfig{Source: s})
	if err != nil {
		t.Fatal(err)
	}
	var addr atomic.Value
	addr.Store(l.Addr().String())
	c := connect(t, "", transfer.ClientConfig{Address: func(context.Context, string) (string, error) { return addr.Load().(string), nil }})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(ctx, l) }()
	pull(t, c, s, h)
	cancel()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	_, again := serve(t, transfer.ServerConfig{Source: s})
	addr.Store(again)
	pull(t, c, s, h)
	if got := c.Stats(); got.Failures != 0 || got.Dials != 2 {
		t.Errorf("%+v: an idle connection that the other side has closed is no failure", got)
	}
}

func TestTakerThatDoesNotRead(t *testing.T) {
	s := newShelf()
	server, addr := serve(t, transfer.ServerConfig{Source: s, PeerSpans: 3, Stall: 30 * time.Second})
	big := s.put(48*mib, true)
	p := newProxy(t, addr)
	p.stallAfter(mib)
	slow := connect(t, p.addr(), transfer.ClientConfig{Streams: 2, Stall: time.Minute})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- slow.Pull(ctx, big, make([]byte, big.Bytes), nil) }()
	until(t, "the slow taker's requests", func() bool { return server.Stats().Spans >= 2 })

	c := connect(t, addr, transfer.ClientConfig{})
	pull(t, c, s, big) // goes on beside it, in the one turn that is left
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("slow taker: %v", err)
	}
}

func TestTakerThatStaysAway(t *testing.T) {
	s := newShelf()
	server, addr := serve(t, transfer.ServerConfig{Source: s, Stall: time.Second})
	p := newProxy(t, addr)
	p.stallAfter(mib)
	c := connect(t, p.addr(), transfer.ClientConfig{Streams: 1, Retries: -1, Stall: time.Minute})
	big := s.put(48*mib, true)
	go func() {
		until(t, "the server to drop it", func() bool { st := server.Stats(); return st.Spans > 0 && st.Connections == 0 })
		p.cutAll()
	}()
	if err := c.Pull(t.Context(), big, make([]byte, big.Bytes), nil); !errors.Is(err, mem.ErrLost) {
		t.Errorf("%v, want ErrLost", err)
	}
}

func TestBusyServerIsAskedAgain(t *testing.T) {
	s := newShelf()
	h := s.put(100, true)
	hold, asked := make(chan struct{}), make(chan struct{}, 10)
	var first atomic.Bool
	blocked := source(func(h mem.Handle) (transfer.Content, error) {
		if first.CompareAndSwap(false, true) {
			asked <- struct{}{}
			<-hold
		}
		return s.Open(h)
	})
	server, addr := serve(t, transfer.ServerConfig{Source: blocked, PeerSpans: 1, Stall: time.Millisecond})
	c := connect(t, addr, transfer.ClientConfig{Retries: 1000})
	ended := make(chan error, 1)
	go func() { ended <- c.Pull(t.Context(), h, make([]byte, 100), nil) }()
	<-asked
	go func() {
		until(t, "a refusal", func() bool { return server.Stats().Failures > 0 })
		close(hold)
	}()
	dst := make([]byte, 100)
	if err := c.Pull(t.Context(), h, dst, nil); err != nil || !bytes.Equal(dst, s.content(h)) {
		t.Errorf("beside it: %v", err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

type source func(mem.Handle) (transfer.Content, error)

// Open implements transfer.Source.
func (f source) Open(h mem.Handle) (transfer.Content, error) { return f(h) }
