package transfer

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"trireme.dev/shared/mem"
)

// ClientConfig is what a Client is made from. Address is required; zero numbers stand for the defaults.
type ClientConfig struct {
	// Address returns host:port where the HMM of a node serves. It is asked before each connection, so a node may move.
	// Its error ends a pull.
	Address func(ctx context.Context, node string) (string, error)
	TLS     *tls.Config // nil: plain TCP. Without a ServerName, the server must prove that it is the node. See MutualTLS

	Streams     int           // most connections of one pull; 0: 4
	PeerStreams int           // most connections in use to one node, by all pulls; 0: 16
	Span        int           // most bytes of one request, at most 64 MiB; 0: 8 MiB. An object is asked for in at least Streams pieces of 1 MiB
	Ahead       int           // requests under way on each connection; 0: 2
	Retries     int           // failures in a row, without a byte of progress, that a connection may have; 0: 8, negative: none
	Backoff     time.Duration // pause after the first failure, doubled up to 2 s; 0: 50 ms
	Stall       time.Duration // a connection that brings nothing for that long has failed; 0: 10 s
	Idle        time.Duration // a connection without use is closed after that; 0: 30 s
}

const maxBackoff = 2 * time.Second

// ClientStats counts what a Client has done since it was made.
type ClientStats struct {
	Pulls    int64 // finished well
	Bytes    int64 // of content, received and found good
	Wasted   int64 // of content, received for nothing: damaged, or of a frame that was cut
	Failures int64 // of connections and requests; most are followed by another try
	Damaged  int64 // of Failures: content that did not match its checksum
	Dials    int64 // connections made
}

// Client pulls objects from other nodes. Its methods may be called from several goroutines.
type Client struct {
	cfg    ClientConfig
	ctx    context.Context // of all pulls; ends with Close
	cancel context.CancelFunc
	work   sync.WaitGroup // pulls

	pulls, bytes, wasted, failures, damaged, dials atomic.Int64

	mu     sync.Mutex
	nodes  map[string]*node
	closed bool
}

// NewClient returns a client; mem.ErrInvalid for a configuration that makes no sense.
func NewClient(cfg ClientConfig) (*Client, error) {
	orDefault(&cfg.Streams, 4)
	orDefault(&cfg.PeerStreams, 16)
	orDefault(&cfg.Span, 8<<20)
	orDefault(&cfg.Ahead, 2)
	orDefault(&cfg.Retries, 8)
	orDefault(&cfg.Backoff, 50*time.Millisecond)
	orDefault(&cfg.Stall, 10*time.Second)
	orDefault(&cfg.Idle, 30*time.Second)
	if cfg.Address == nil || min(cfg.Streams, cfg.PeerStreams, cfg.Span, cfg.Ahead) < 1 || cfg.Span > maxSpan ||
		min(cfg.Backoff, cfg.Stall, cfg.Idle) < 0 {
		return nil, fmt.Errorf("transfer client configuration %+v: %w", cfg, mem.ErrInvalid)
	}
	c := &Client{cfg: cfg, nodes: map[string]*node{}}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	return c, nil
}

// Stats returns the counters.
func (c *Client) Stats() ClientStats {
	return ClientStats{
		Pulls: c.pulls.Load(), Bytes: c.bytes.Load(), Wasted: c.wasted.Load(), Failures: c.failures.Load(),
		Damaged: c.damaged.Load(), Dials: c.dials.Load(),
	}
}

// Close ends all pulls and connections, and waits for them. Pull returns mem.ErrLost from then on.
func (c *Client) Close() error {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.cancel()
	c.work.Wait()
	for _, n := range c.nodes { // nobody changes the map any more
		n.closeIdle()
	}
	return nil
}

// enter counts a pull and finds the node.
func (c *Client) enter(name string) (*node, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, fmt.Errorf("client is closed: %w", mem.ErrLost)
	}
	n := c.nodes[name]
	if n == nil {
		n = &node{c: c, name: name, turns: make(chan struct{}, c.cfg.PeerStreams)}
		c.nodes[name] = n
	}
	c.work.Add(1)
	return n, nil
}

// node is another node with the connections to it.
type node struct {
	c     *Client
	name  string
	turns chan struct{} // a token a connection in use

	mu   sync.Mutex
	idle []*stream
}

// stream is one connection. It belongs to whoever took it.
type stream struct {
	conn    net.Conn
	greeted bool        // the other side's hello has come
	reused  bool        // and nothing has come since
	expiry  *time.Timer // while idle
}

// stale reports whether the connection was an idle one that failed before it brought anything: the other side had closed
// it, which is no failure.
func (s *stream) stale() bool { return s != nil && s.reused }

// errAddress marks errors that end a pull because the node has no address.
var errAddress = errors.New("no address")

// take waits for its turn and returns an idle or a new connection; give must follow, if it returns no error.
func (n *node) take(ctx context.Context) (*stream, error) {
	select {
	case n.turns <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for a connection: %w", context.Cause(ctx))
	}
	n.mu.Lock()
	for len(n.idle) > 0 {
		s := n.idle[len(n.idle)-1]
		n.idle = n.idle[:len(n.idle)-1]
		if s.expiry.Stop() {
			n.mu.Unlock()
			s.reused = true
			return s, nil
		}
	}
	n.mu.Unlock()
	s, err := n.dial(ctx)
	if err != nil {
		<-n.turns
		return nil, err
	}
	return s, nil
}

// give takes a connection back, to be used again if it is good.
func (n *node) give(s *stream, good bool) {
	n.mu.Lock()
	if good {
		s.expiry = time.AfterFunc(n.c.cfg.Idle, func() { n.expire(s) })
		n.idle = append(n.idle, s)
	} else {
		_ = s.conn.Close() // it has failed, or is given up
	}
	n.mu.Unlock()
	<-n.turns
}

func (n *node) expire(s *stream) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for i, other := range n.idle {
		if other == s {
			n.idle = append(n.idle[:i], n.idle[i+1:]...)
			break
		}
	}
	_ = s.conn.Close() // whoever took it meanwhile saw that its time is up, and left it
}

func (n *node) closeIdle() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, s := range n.idle {
		s.expiry.Stop()
		_ = s.conn.Close() // nothing is under way on it
	}
	n.idle = nil
}

// dial connects and says hello. The answer is awaited with that to the first request, which saves a round trip.
func (n *node) dial(ctx context.Context) (*stream, error) {
	addr, err := n.c.cfg.Address(ctx, n.name)
	if err != nil {
		return nil, fmt.Errorf("looking for node %q: %w: %w", n.name, errAddress, err)
	}
	ctx, cancel := context.WithTimeout(ctx, n.c.cfg.Stall)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("connecting to node %q: %w", n.name, err)
	}
	n.c.dials.Add(1)
	if n.c.cfg.TLS != nil {
		cfg := n.c.cfg.TLS.Clone()
		if cfg.ServerName == "" {
			cfg.ServerName = n.name
		}
		secure := tls.Client(conn, cfg)
		if err := secure.HandshakeContext(ctx); err != nil {
			return nil, errors.Join(fmt.Errorf("connecting to node %q: TLS: %w", n.name, err), conn.Close())
		}
		conn = secure
	}
	s := &stream{conn: conn}
	if err := conn.SetDeadline(time.Now().Add(n.c.cfg.Stall)); err != nil {
		return nil, errors.Join(fmt.Errorf("greeting node %q: %w", n.name, err), conn.Close())
	}
	if _, err := conn.Write(helloFrame()); err != nil {
		return nil, errors.Join(s.refusal(fmt.Errorf("greeting node %q: %w", n.name, err)), conn.Close())
	}
	return s, nil
}
