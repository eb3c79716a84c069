package transfer_test

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"

	"trireme.dev/shared/mem"
	"trireme.dev/shared/transfer"
)

func TestPullOfEverySize(t *testing.T) {
	s := newShelf()
	server, addr := serve(t, transfer.ServerConfig{Source: s, Frame: 64 << 10})
	c := connect(t, addr, transfer.ClientConfig{Span: 2 * mib})
	var total int64
	for _, n := range []int{1, 3, 64 << 10, 64<<10 + 1, mib - 1, mib, 8*mib + 5, 33*mib + 12345} {
		for _, sealed := range []bool{true, false} {
			h := s.put(n, sealed)
			pull(t, c, s, h)
			total += h.Bytes
		}
	}
	if got := c.Stats(); got.Bytes != total || got.Wasted != 0 || got.Failures != 0 || got.Pulls != 16 || got.Dials > 4 {
		t.Errorf("client: %+v; %d bytes were pulled over 4 connections", got, total)
	}
	until(t, "the server to have counted all bytes", func() bool { return server.Stats().Bytes >= total }) // the last ones come before that
	if got := server.Stats(); got.Bytes != total || got.Failures != 0 {
		t.Errorf("server: %+v, want %d bytes", got, total)
	}
}

func TestManyPullsShareConnections(t *testing.T) {
	s := newShelf()
	_, addr := serve(t, transfer.ServerConfig{Source: s})
	c := connect(t, addr, transfer.ClientConfig{PeerStreams: 3})
	handles := []mem.Handle{s.put(100, true), s.put(3*mib, true), s.put(9*mib, false)}
	var all sync.WaitGroup
	for i := range 30 {
		all.Go(func() { pull(t, c, s, handles[i%3]) })
	}
	all.Wait()
	if got := c.Stats(); got.Dials > 3 || got.Failures > 0 {
		t.Errorf("%+v, want at most 3 connections", got)
	}
}

func TestProgressRisesToTheEnd(t *testing.T) {
	s := newShelf()
	_, addr := serve(t, transfer.ServerConfig{Source: s})
	c := connect(t, addr, transfer.ClientConfig{})
	h := s.put(20*mib, true)
	var last int64
	if err := c.Pull(t.Context(), h, make([]byte, h.Bytes), func(done int64) {
		if done <= last {
			t.Errorf("progress from %d to %d", last, done)
		}
		last = done
	}); err != nil {
		t.Fatal(err)
	}
	if last != h.Bytes {
		t.Errorf("progress ended at %d of %d", last, h.Bytes)
	}
}

func TestRefusedHandles(t *testing.T) {
	s := newShelf()
	_, addr := serve(t, transfer.ServerConfig{Source: s})
	c := connect(t, addr, transfer.ClientConfig{})
	good := s.put(5*mib, true)
	with := func(change func(*mem.Handle)) mem.Handle {
		h := good
		change(&h)
		return h
	}
	for name, tc := range map[string]struct {
		h    mem.Handle
		want error
	}{
		"forged capability":  {with(func(h *mem.Handle) { h.Capability = make([]byte, 16) }), mem.ErrDenied},
		"no capability":      {with(func(h *mem.Handle) { h.Capability = nil }), mem.ErrDenied},
		"another generation": {with(func(h *mem.Handle) { h.Generation++ }), mem.ErrGone},
		"another object":     {with(func(h *mem.Handle) { h.Object = 99 }), mem.ErrGone},
		"another node":       {with(func(h *mem.Handle) { h.Node = "n2" }), mem.ErrGone},
		"more bytes":         {with(func(h *mem.Handle) { h.Bytes += mib }), mem.ErrInvalid},
		"no bytes":           {with(func(h *mem.Handle) { h.Bytes = 0 }), mem.ErrInvalid},
		"another checksum":   {with(func(h *mem.Handle) { h.CRC ^= 1 }), mem.ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			if err := c.Pull(t.Context(), tc.h, make([]byte, tc.h.Bytes), nil); !errors.Is(err, tc.want) {
				t.Errorf("%v, want %v", err, tc.want)
			}
		})
	}
	if err := c.Pull(t.Context(), good, make([]byte, 5), nil); !errors.Is(err, mem.ErrInvalid) {
		t.Errorf("into too little room: %v", err)
	}
	pull(t, c, s, good) // nobody was harmed
}

func TestFreedInTheMiddle(t *testing.T) {
	s := newShelf()
	_, addr := serve(t, transfer.ServerConfig{Source: s})
	c := connect(t, addr, transfer.ClientConfig{Span: mib})
	h := s.put(32*mib, true)
	var once sync.Once
	err := c.Pull(t.Context(), h, make([]byte, h.Bytes), func(done int64) {
		if done > 5*mib {
			once.Do(func() { s.free(h) })
		}
	})
	if !errors.Is(err, mem.ErrGone) {
		t.Errorf("%v, want ErrGone", err)
	}
	if n := c.Stats().Bytes; n >= h.Bytes || n < 5*mib {
		t.Errorf("%d of %d bytes came", n, h.Bytes)
	}
}

func TestCancelAndClose(t *testing.T) {
	s := newShelf()
	_, addr := serve(t, transfer.ServerConfig{Source: s, Frame: 64 << 10})
	stuck := newProxy(t, addr) // forwards nothing any more after 3 MiB
	stuck.stallAfter(3 * mib)
	h := s.put(32*mib, true)

	c := connect(t, stuck.addr(), transfer.ClientConfig{})
	ctx, cancel := context.WithCancelCause(t.Context())
	mine := errors.New("mine")
	if err := c.Pull(ctx, h, make([]byte, h.Bytes), func(int64) { cancel(mine) }); !errors.Is(err, mine) {
		t.Errorf("cancelled: %v", err)
	}

	stuck = newProxy(t, addr)
	stuck.stallAfter(3 * mib)
	c = connect(t, stuck.addr(), transfer.ClientConfig{})
	ended := make(chan error, 1)
	started := make(chan struct{})
	var once sync.Once
	go func() {
		ended <- c.Pull(t.Context(), h, make([]byte, h.Bytes), func(int64) { once.Do(func() { close(started) }) })
	}()
	<-started
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := <-ended; !errors.Is(err, mem.ErrLost) {
		t.Errorf("closed: %v, want ErrLost", err)
	}
	if err := c.Pull(t.Context(), h, make([]byte, h.Bytes), nil); !errors.Is(err, mem.ErrLost) {
		t.Errorf("after Close: %v, want ErrLost", err)
	}
}

func TestNodeThatCannotBeReached(t *testing.T) {
	h := mem.Handle{Node: "n9", Object: 1, Bytes: 10}
	unknown := errors.New("no such node")
	c := connect(t, "", transfer.ClientConfig{Address: func(context.Context, string) (string, error) { return "", unknown }})
	if err := c.Pull(t.Context(), h, make([]byte, 10), nil); !errors.Is(err, unknown) || c.Stats().Failures != 1 {
		t.Errorf("unknown: %v, %+v", err, c.Stats())
	}
	c = connect(t, "127.0.0.1:1", transfer.ClientConfig{Retries: 2}) // nobody listens at port 1
	if err := c.Pull(t.Context(), h, make([]byte, 10), nil); !errors.Is(err, mem.ErrLost) || c.Stats().Failures != 3 {
		t.Errorf("refused: %v, %+v", err, c.Stats())
	}
}

func TestNodeThatMoves(t *testing.T) {
	s := newShelf()
	h := s.put(100, true)
	_, addr := serve(t, transfer.ServerConfig{Source: s})
	var asked atomic.Int64
	c := connect(t, "", transfer.ClientConfig{Address: func(context.Context, string) (string, error) {
		if asked.Add(1) < 3 {
			return "127.0.0.1:1", nil
		}
		return addr, nil
	}})
	pull(t, c, s, h)
}

func TestConfigurationsThatMakeNoSense(t *testing.T) {
	if _, err := transfer.NewClient(transfer.ClientConfig{}); !errors.Is(err, mem.ErrInvalid) {
		t.Errorf("client without addresses: %v", err)
	}
	if _, err := transfer.NewServer(transfer.ServerConfig{}); !errors.Is(err, mem.ErrInvalid) {
		t.Errorf("server without a source: %v", err)
	}
	if _, err := transfer.NewServer(transfer.ServerConfig{Source: newShelf(), Frame: 1 << 30}); !errors.Is(err, mem.ErrInvalid) {
		t.Errorf("frames of a GiB: %v", err)
	}
}
