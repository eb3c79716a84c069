package transfer

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"trireme.dev/shared/mem"
)

// Content is what an object holds, for as long as it takes to send one span of it.
type Content struct {
	// Bytes is the whole content, Handle.Bytes long, mapped memory as a rule. It is read until Release.
	Bytes []byte
	// Release ends the use of Bytes; it is called exactly once. May be nil.
	Release func()
}

// Source is what a Server serves. The HMM is one.
type Source interface {
	// Open checks the handle (node, generation, capability) and keeps the object until Content.Release: mem.ErrGone when
	// it is freed, mem.ErrDenied when the handle is forged. It is called for every span, so that nobody's memory stays
	// because of a taker that went away. Several goroutines call it at a time.
	Open(h mem.Handle) (Content, error)
}

// ServerConfig is what a Server is made from. Source is required; zero numbers stand for the defaults.
type ServerConfig struct {
	Source Source
	TLS    *tls.Config  // nil: plain TCP; see MutualTLS
	Log    *slog.Logger // nil: none

	Connections     int           // most connections at a time; 0: 256
	PeerConnections int           // of those, of one address; 0: 64
	Spans           int           // most spans sent at a time; 0: 64
	PeerSpans       int           // of those, to one address; 0: 16
	Frame           int           // bytes of a data frame, the unit of checksums, at most 16 MiB; 0: 256 KiB
	Handshake       time.Duration // for TLS and hello; 0: 5 s
	Idle            time.Duration // a connection without requests is closed after that; 0: 1 min
	Stall           time.Duration // a taker must read a frame, and a request wait for its turn, in that time; 0: 10 s
}

// ServerStats counts what a Server has done since it was made.
type ServerStats struct {
	Connections int64 // open now
	Refused     int64 // connections, for being too many
	Spans       int64 // requests answered with data
	Bytes       int64 // of content, sent
	Failures    int64 // requests answered with an error
	Malformed   int64 // connections ended for bytes that are no frame
}

// Server sends spans of objects to whoever asks with a valid handle.
type Server struct {
	cfg ServerConfig

	refused, spans, bytes, failures, malformed atomic.Int64

	turns  chan struct{} // a token a span that is being sent
	frames sync.Pool     // of *[]byte with room for a data frame, head included
	work   sync.WaitGroup

	mu    sync.Mutex
	conns map[net.Conn]bool
	peers map[string]*takers
}

// takers is one address.
type takers struct {
	conns int
	turns chan struct{}
}

func orDefault[T int | time.Duration](v *T, d T) {
	if *v == 0 {
		*v = d
	}
}

// NewServer returns a server; mem.ErrInvalid for a configuration that makes no sense.
func NewServer(cfg ServerConfig) (*Server, error) {
	orDefault(&cfg.Connections, 256)
	orDefault(&cfg.PeerConnections, 64)
	orDefault(&cfg.Spans, 64)
	orDefault(&cfg.PeerSpans, 16)
	orDefault(&cfg.Frame, 256<<10)
	orDefault(&cfg.Handshake, 5*time.Second)
	orDefault(&cfg.Idle, time.Minute)
	orDefault(&cfg.Stall, 10*time.Second)
	if cfg.Source == nil || min(cfg.Connections, cfg.PeerConnections, cfg.Spans, cfg.PeerSpans, cfg.Frame) < 1 ||
		cfg.Frame > maxData || min(cfg.Handshake, cfg.Idle, cfg.Stall) < 0 {
		return nil, fmt.Errorf("transfer server configuration %+v: %w", cfg, mem.ErrInvalid)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg, turns: make(chan struct{}, cfg.Spans), conns: map[net.Conn]bool{}, peers: map[string]*takers{}}
	s.frames.New = func() any {
		frame := make([]byte, headBytes+cfg.Frame)
		return &frame
	}
	return s, nil
}

// Stats returns the counters.
func (s *Server) Stats() ServerStats {
	s.mu.Lock()
	open := int64(len(s.conns))
	s.mu.Unlock()
	return ServerStats{
		Connections: open, Refused: s.refused.Load(), Spans: s.spans.Load(), Bytes: s.bytes.Load(),
		Failures: s.failures.Load(), Malformed: s.malformed.Load(),
	}
}

// Serve answers connections of l, which it takes over, until ctx ends: then it closes all of them, waits for what is
// under way and returns nil. A server serves once.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	for ctx.Err() == nil {
		conn, err := l.Accept()
		switch {
		case err == nil:
			s.start(ctx, conn)
		case errors.Is(err, net.ErrClosed):
			if ctx.Err() == nil {
				return errors.Join(fmt.Errorf("accepting takers: %w", err), s.stop())
			}
		default: // out of descriptors, most likely
			s.cfg.Log.Error("accepting a taker", "error", err)
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
		}
	}
	_ = l.Close() // it is, unless ctx had ended before
	return s.stop()
}

func (s *Server) stop() error {
	s.mu.Lock()
	for c := range s.conns {
		_ = c.Close() // ends reads and writes; nothing is left to be said
	}
	s.mu.Unlock()
	s.work.Wait()
	return nil
}

// start serves a connection, or refuses it when there are too many.
func (s *Server) start(ctx context.Context, conn net.Conn) {
	addr := conn.RemoteAddr().String()
	if host, _, err := net.SplitHostPort(addr); err == nil {
		addr = host
	}
	s.mu.Lock()
	peer := s.peers[addr]
	if peer == nil {
		peer = &takers{turns: make(chan struct{}, s.cfg.PeerSpans)}
	}
	total, own := len(s.conns), peer.conns
	full := total >= s.cfg.Connections || own >= s.cfg.PeerConnections
	if !full {
		peer.conns++
		s.peers[addr] = peer
		s.conns[conn] = true
	}
	s.mu.Unlock()
	if full {
		s.refused.Add(1)
		if s.cfg.TLS == nil { // else it takes a handshake to say anything
			_ = conn.SetWriteDeadline(time.Now().Add(time.Second)) // fits into the empty send buffer, so nobody waits
			_, _ = conn.Write(failureFrame(fmt.Errorf("%d connections, %d of them from %s, are as many as this node takes: %w",
				total, own, addr, mem.ErrExhausted)))
		}
		_ = conn.Close()
		return
	}
	s.work.Go(func() {
		err := s.serve(ctx, conn, peer)
		s.mu.Lock()
		delete(s.conns, conn)
		if peer.conns--; peer.conns == 0 {
			delete(s.peers, addr)
		}
		s.mu.Unlock()
		_ = conn.Close()
		if errors.Is(err, ErrFrame) {
			s.malformed.Add(1)
		}
		if err != nil && ctx.Err() == nil {
			s.cfg.Log.Debug("connection of a taker ended", "peer", addr, "error", err)
		}
	})
}

// serve greets and answers one request after the other. The next ones may wait in the socket: a taker that sends them
// ahead never waits for the way there and back.
func (s *Server) serve(ctx context.Context, raw net.Conn, peer *takers) error {
	conn := raw
	if err := conn.SetDeadline(time.Now().Add(s.cfg.Handshake)); err != nil {
		return fmt.Errorf("greeting: %w", err)
	}
	if s.cfg.TLS != nil {
		secure := tls.Server(raw, s.cfg.TLS)
		if err := secure.HandshakeContext(ctx); err != nil {
			return fmt.Errorf("TLS: %w", err)
		}
		conn = secure
	}
	r := bufio.NewReaderSize(conn, 4<<10)
	h, err := readHead(r)
	if err == nil && h.kind != kindHello {
		err = fmt.Errorf("frame of kind %d before hello: %w", h.kind, ErrFrame)
	}
	if err != nil {
		return fmt.Errorf("greeting: %w", err)
	}
	if _, err := conn.Write(helloFrame()); err != nil { // whatever version the other has: it can tell by this
		return fmt.Errorf("greeting: %w", err)
	}
	if h.offset != Version {
		err := fmt.Errorf("this node speaks version %d, the taker %d: %w", Version, h.offset, ErrVersion)
		_, werr := conn.Write(failureFrame(err))
		return errors.Join(err, werr)
	}
	for {
		if err := conn.SetDeadline(time.Now().Add(s.cfg.Idle)); err != nil {
			return fmt.Errorf("waiting for a request: %w", err)
		}
		h, err := readHead(r)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil && h.kind != kindRequest {
			err = fmt.Errorf("frame of kind %d is no request: %w", h.kind, ErrFrame)
		}
		if err != nil {
			return fmt.Errorf("waiting for a request: %w", err)
		}
		tail, err := readTail(r, h)
		if err != nil {
			return fmt.Errorf("reading a request: %w", err)
		}
		handle, err := parseHandle(tail)
		if err != nil {
			return fmt.Errorf("reading a request: %w", err)
		}
		if err := s.answer(ctx, conn, peer, handle, span{int64(h.offset), int64(h.offset) + int64(h.bytes)}); err != nil {
			return err
		}
	}
}

// answer sends a span or says why it does not come; its error is the end of the connection.
func (s *Server) answer(ctx context.Context, conn net.Conn, peer *takers, h mem.Handle, want span) error {
	done, err := s.turn(ctx, peer)
	if err != nil {
		return s.fail(conn, err)
	}
	defer done()
	content, err := s.cfg.Source.Open(h)
	if err != nil {
		return s.fail(conn, err)
	}
	if content.Release != nil {
		defer content.Release()
	}
	if n := int64(len(content.Bytes)); want.end > n {
		return s.fail(conn, fmt.Errorf("bytes %d to %d of an object of %d: %w", want.at, want.end, n, mem.ErrInvalid))
	}
	s.spans.Add(1)
	// The kernel gets a copy that is warm in the cache and always at the same place, never the mapped pages (RATIONALE.md).
	frame := s.frames.Get().(*[]byte)
	defer s.frames.Put(frame)
	for at := want.at; at < want.end; {
		n := copy((*frame)[headBytes:], content.Bytes[at:want.end])
		p := (*frame)[:headBytes+n]
		head{kind: kindData, bytes: uint32(n), offset: uint64(at), crc: mem.Checksum(p[headBytes:])}.put((*[headBytes]byte)(p))
		if err := conn.SetWriteDeadline(time.Now().Add(s.cfg.Stall)); err != nil {
			return fmt.Errorf("sending: %w", err)
		}
		sent, err := conn.Write(p)
		s.bytes.Add(int64(max(0, sent-headBytes)))
		if err != nil {
			return fmt.Errorf("sending bytes %d to %d: %w", at, at+int64(n), err)
		}
		at += int64(n)
	}
	return nil
}

func (s *Server) fail(conn net.Conn, failure error) error {
	s.failures.Add(1)
	if err := conn.SetWriteDeadline(time.Now().Add(s.cfg.Stall)); err != nil {
		return fmt.Errorf("answering: %w", err)
	}
	if _, err := conn.Write(failureFrame(failure)); err != nil {
		return fmt.Errorf("answering: %w", err)
	}
	return nil
}

// turn waits until the peer, then the server has room for one span more; done gives the room back. The peer's bound
// comes first, so that one who does not read keeps at most its own share from the others.
func (s *Server) turn(ctx context.Context, peer *takers) (done func(), err error) {
	timer := time.NewTimer(s.cfg.Stall)
	defer timer.Stop()
	for i, turns := range []chan struct{}{peer.turns, s.turns} {
		select {
		case turns <- struct{}{}:
			continue
		case <-timer.C:
			err = fmt.Errorf("no turn within %v, %d spans are being sent: %w", s.cfg.Stall, len(s.turns), mem.ErrExhausted)
		case <-ctx.Done():
			err = fmt.Errorf("this node is closing: %w", mem.ErrLost)
		}
		if i == 1 {
			<-peer.turns
		}
		return nil, err
	}
	return func() { <-s.turns; <-peer.turns }, nil
}
