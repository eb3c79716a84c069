package transfer_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"trireme.dev/shared/leaktest"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/transfer"
)

func TestMain(m *testing.M) {
	if role := os.Getenv(roleVariable); role != "" { // started by a benchmark, in a network namespace
		if err := node(strings.Fields(role)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	leaktest.VerifyTestMain(m)
}

const mib = 1 << 20

// shelf is a Source as the HMM is one: it knows what it has, by object, generation and capability.
type shelf struct {
	mu      sync.Mutex
	objects map[uint64]*item
	opened  func() // called for each span, if not nil
	open    int    // contents not released
}

type item struct {
	handle mem.Handle
	bytes  []byte
}

func newShelf() *shelf { return &shelf{objects: map[uint64]*item{}} }

// put adds an object of n random bytes.
func (s *shelf) put(n int, sealed bool) mem.Handle {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(n), byte(n >> 8)}).Read(b) // never fails
	id := uint64(len(s.objects) + 1)
	h := mem.Handle{
		Node: "n1", Object: id, Generation: 7, Kind: mem.KindKV, Bytes: int64(n), Shape: []int{n / 4},
		Capability: []byte(fmt.Sprintf("capability%06d", id)),
	}
	if sealed {
		h.Sealed, h.CRC = true, mem.Checksum(b)
	}
	s.objects[id] = &item{h, b}
	return h
}

func (s *shelf) free(h mem.Handle) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.objects, h.Object)
}

func (s *shelf) content(h mem.Handle) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.objects[h.Object].bytes
}

// Open implements transfer.Source.
func (s *shelf) Open(h mem.Handle) (transfer.Content, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.opened != nil {
		s.opened()
	}
	o, ok := s.objects[h.Object]
	if !ok || o.handle.Generation != h.Generation || h.Node != "n1" {
		return transfer.Content{}, fmt.Errorf("object %d: %w", h.Object, mem.ErrGone)
	}
	if !bytes.Equal(o.handle.Capability, h.Capability) {
		return transfer.Content{}, fmt.Errorf("object %d: %w", h.Object, mem.ErrDenied)
	}
	s.open++
	return transfer.Content{Bytes: o.bytes, Release: func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.open--
	}}, nil
}

// serve runs a server on loopback until the test ends and returns its address. Then nothing may be left open.
func serve(t testing.TB, cfg transfer.ServerConfig) (*transfer.Server, string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s, err := transfer.NewServer(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if source, ok := cfg.Source.(*shelf); ok && source.open != 0 {
			t.Errorf("%d contents were not released", source.open)
		}
		if n := s.Stats().Connections; n != 0 {
			t.Errorf("%d connections are left", n)
		}
	})
	return s, l.Addr().String()
}

// connect makes a client that finds every node at addr.
func connect(t testing.TB, addr string, cfg transfer.ClientConfig) *transfer.Client {
	t.Helper()
	if cfg.Address == nil {
		cfg.Address = func(context.Context, string) (string, error) { return addr, nil }
	}
	if cfg.Backoff == 0 {
		cfg.Backoff = time.Millisecond
	}
	c, err := transfer.NewClient(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// pull pulls h and compares it with what the shelf has.
func pull(t testing.TB, c *transfer.Client, s *shelf, h mem.Handle) {
	t.Helper()
	dst := make([]byte, h.Bytes)
	if err := c.Pull(t.Context(), h, dst, nil); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(dst, s.content(h)) {
		t.Fatalf("%d bytes arrived wrong", h.Bytes)
	}
}

// until waits for what another goroutine brings about; the test's own timeout is the limit.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for !ok() {
		if t.Context().Err() != nil {
			t.Fatalf("waiting for %s: %v", what, t.Context().Err())
		}
		runtime.Gosched()
	}
}
