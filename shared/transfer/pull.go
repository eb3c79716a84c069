package transfer

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"trireme.dev/shared/mem"
)

// errDamaged is wrapped by errors about a frame whose content does not match its checksum: it may be right next time.
var errDamaged = errors.New("content was damaged on the way")

// Pull copies the content of an object on another node into dst, which must be as long. Every byte is checked against
// the checksum of its frame and, if the object is sealed, all together against the handle's. A connection that fails is
// made again, and asked only for what is still missing. progress, if not nil, is told the bytes that are there and good,
// from one goroutine at a time, in rising order; it must not block.
//
// Errors: mem.ErrGone when the object was freed, even in the middle; mem.ErrDenied for a forged handle; mem.ErrCorrupt
// when the bytes keep being damaged or are not those that were sealed; mem.ErrExhausted when the node stays too busy;
// mem.ErrLost when it cannot be reached any more; ctx's when that ends; what ClientConfig.Address said. dst is then
// undefined. Nothing touches dst after Pull has returned.
func (c *Client) Pull(ctx context.Context, h mem.Handle, dst []byte, progress func(done int64)) error {
	if h.Bytes < 1 || int64(len(dst)) != h.Bytes {
		return fmt.Errorf("pulling %v %d of %d bytes into %d: %w", h.Kind, h.Object, h.Bytes, len(dst), mem.ErrInvalid)
	}
	name, err := appendHandle(nil, h)
	if err != nil {
		return fmt.Errorf("pulling: %w", err)
	}
	n, err := c.enter(h.Node)
	if err != nil {
		return fmt.Errorf("pulling: %w", err)
	}
	defer c.work.Done()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := context.AfterFunc(c.ctx, func() { cancel(fmt.Errorf("client is closed: %w", mem.ErrLost)) })
	defer stop()

	p := &pull{c: c, node: n, handle: name, dst: dst, progress: progress}
	p.missing, p.step = []span{{0, h.Bytes}}, step(h.Bytes, c.cfg)
	streams := min(int64(c.cfg.Streams), (h.Bytes+p.step-1)/p.step)
	all, inner := errgroup.WithContext(ctx)
	for range streams {
		all.Go(func() error { return p.run(inner) })
	}
	if err := all.Wait(); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return fmt.Errorf("pulling %v %d of %d bytes from node %q: %w", h.Kind, h.Object, h.Bytes, h.Node, err)
	}
	if crc := p.checksum(); h.Sealed && crc != h.CRC {
		return fmt.Errorf("%v %d of %d bytes came from node %q with checksum %08x, its handle says %08x: %w",
			h.Kind, h.Object, h.Bytes, h.Node, crc, h.CRC, mem.ErrCorrupt)
	}
	c.pulls.Add(1)
	return nil
}

// step is how many bytes a request asks for: so few that every stream has as many requests as go ahead, but whole MiB.
func step(bytes int64, cfg ClientConfig) int64 {
	pieces := int64(cfg.Streams * cfg.Ahead)
	s := mem.Padded((bytes+pieces-1)/pieces, 1<<20)
	return min(s, int64(cfg.Span))
}

// pull is one call of Pull.
type pull struct {
	c        *Client
	node     *node
	handle   []byte // encoded
	dst      []byte
	step     int64
	progress func(int64)

	mu      sync.Mutex
	missing []span // not asked for by anybody, in order
	good    []piece
	done    int64
}

// piece is a frame that was received and found good.
type piece struct {
	span
	crc uint32
}

// next returns what to ask for; false when all is there or asked for.
func (p *pull) next() (span, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.missing) == 0 {
		return span{}, false
	}
	s := p.missing[0]
	if s.end-s.at > p.step {
		s.end = s.at + p.step
		p.missing[0].at = s.end
	} else {
		p.missing = p.missing[1:]
	}
	return s, true
}

// giveBack puts what did not come in front.
func (p *pull) giveBack(spans []span) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.missing = append(slices.Clone(spans), p.missing...)
}

func (p *pull) accept(s span, crc uint32) {
	n := s.end - s.at
	p.c.bytes.Add(n)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.good = append(p.good, piece{s, crc})
	p.done += n
	if p.progress != nil {
		p.progress(p.done)
	}
}

// state returns how many bytes are good and whether anything waits to be asked for.
func (p *pull) state() (done int64, waiting bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.done, len(p.missing) > 0
}

// checksum puts those of the frames together. All bytes are there.
func (p *pull) checksum() uint32 {
	slices.SortFunc(p.good, func(a, b piece) int { return cmp.Compare(a.at, b.at) })
	var crc, shift uint32
	var at, width int64
	for _, g := range p.good {
		if g.at != at {
			panic("BUG: a frame is missing or came twice")
		}
		at = g.end
		if n := g.end - g.at; n != width {
			width, shift = n, power(8*uint64(n))
		}
		crc = combine(crc, g.crc, shift)
	}
	if at != int64(len(p.dst)) {
		panic("BUG: the last frame is missing")
	}
	return crc
}

// run pulls spans over one connection at a time until nothing waits, or it has failed too often without progress.
func (p *pull) run(ctx context.Context) error {
	var seen int64
	for tries, pause := 0, p.c.cfg.Backoff; ; {
		if _, waiting := p.state(); !waiting {
			return nil
		}
		s, err := p.attempt(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if s.stale() {
			continue
		}
		p.c.failures.Add(1)
		if errors.Is(err, errDamaged) {
			p.c.damaged.Add(1)
		}
		if final(err) {
			return err
		}
		if done, _ := p.state(); done > seen {
			seen, tries, pause = done, 0, p.c.cfg.Backoff
		}
		if tries++; tries > p.c.cfg.Retries {
			return fmt.Errorf("tried %d times without progress: %w", tries, last(err))
		}
		select {
		case <-time.After(pause/2 + rand.N(pause/2+1)): // spread, so that streams do not come back together
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		pause = min(2*pause, maxBackoff)
	}
}

// final reports whether asking again cannot help: the other node has said what is wrong with the request itself, or it
// cannot be talked to at all. Being busy (mem.ErrExhausted) or closing (mem.ErrLost) and failed connections may pass.
func final(err error) bool {
	var remote *remoteError
	if errors.As(err, &remote) {
		return remote.sentinel != mem.ErrExhausted && remote.sentinel != mem.ErrLost
	}
	var certificate *tls.CertificateVerificationError
	return errors.Is(err, errAddress) || errors.Is(err, ErrVersion) || errors.As(err, &certificate)
}

// last gives the error that ends a pull its sentinel.
func last(err error) error {
	switch {
	case errors.Is(err, errDamaged):
		return fmt.Errorf("%w: %w", mem.ErrCorrupt, err)
	case errors.Is(err, mem.ErrExhausted):
		return err
	}
	return fmt.Errorf("%w: %w", mem.ErrLost, err)
}

// attempt pulls over one connection until nothing waits. It returns the connection for what it tells about the failure;
// it is not to be used any more.
func (p *pull) attempt(ctx context.Context) (*stream, error) {
	s, err := p.node.take(ctx)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = s.conn.Close() }) // ends every read and write at once
	err = p.exchange(s)
	live := stop()
	p.node.give(s, live && err == nil)
	return s, err
}

// exchange keeps some requests under way and receives what they bring.
func (p *pull) exchange(s *stream) error {
	asked := make([]span, 0, p.c.cfg.Ahead)
	for {
		for len(asked) < p.c.cfg.Ahead {
			want, ok := p.next()
			if !ok {
				break
			}
			asked = append(asked, want)
			if err := s.request(p, want); err != nil {
				p.giveBack(asked)
				return err
			}
		}
		if len(asked) == 0 {
			return nil
		}
		if err := s.receive(p, &asked[0]); err != nil {
			p.giveBack(asked)
			return err
		}
		asked = append(asked[:0], asked[1:]...)
	}
}

func (s *stream) request(p *pull, want span) error {
	if err := s.conn.SetDeadline(time.Now().Add(p.c.cfg.Stall)); err != nil {
		return fmt.Errorf("asking: %w", err)
	}
	if _, err := s.conn.Write(requestFrame(p.handle, want)); err != nil {
		return s.refusal(fmt.Errorf("asking: %w", err))
	}
	return nil
}

// refusal looks for the reason that a node sent before it closed a new connection, on which writing has failed with err.
func (s *stream) refusal(err error) error {
	if s.greeted {
		return err
	}
	if h, herr := readHead(s.conn); herr == nil && h.kind == kindFailure { // what has arrived can still be read; nothing more will
		if text, terr := readTail(s.conn, h); terr == nil {
			return decodeFailure(h.code, text)
		}
	}
	return err
}

// receive takes the frames of a span and moves its start behind each that is good.
func (s *stream) receive(p *pull, want *span) error {
	for want.at < want.end {
		if err := s.conn.SetReadDeadline(time.Now().Add(p.c.cfg.Stall)); err != nil {
			return fmt.Errorf("receiving: %w", err)
		}
		h, err := readHead(s.conn)
		if err != nil {
			return fmt.Errorf("receiving: %w", noEOF(err))
		}
		s.reused = false
		switch {
		case h.kind == kindFailure:
			text, err := readTail(s.conn, h)
			if err != nil {
				return fmt.Errorf("receiving: %w", err)
			}
			return decodeFailure(h.code, text)
		case h.kind == kindHello && !s.greeted:
			if h.offset != Version {
				return fmt.Errorf("node speaks version %d, this one %d: %w", h.offset, Version, ErrVersion)
			}
			s.greeted = true
		case h.kind == kindData && s.greeted && int64(h.offset) == want.at && int64(h.bytes) <= want.end-want.at:
			frame := span{want.at, want.at + int64(h.bytes)}
			if err := s.content(p, frame, h.crc); err != nil {
				return err
			}
			want.at = frame.end
		default:
			return fmt.Errorf("frame of kind %d with %d bytes from %d instead of bytes %d to %d: %w",
				h.kind, h.bytes, h.offset, want.at, want.end, ErrFrame)
		}
	}
	return nil
}

// warm is how much is read before its checksum is taken and it is copied to where it belongs: it is then still in the cache.
const warm = 256 << 10

// pieces are what is read into: the kernel writes to them, and never to the mapped pages (RATIONALE.md).
var pieces = sync.Pool{New: func() any { return new([warm]byte) }}

// content reads a frame's bytes to where they belong.
func (s *stream) content(p *pull, frame span, want uint32) error {
	piece := pieces.Get().(*[warm]byte)
	defer pieces.Put(piece)
	var crc uint32
	for at := frame.at; at < frame.end; {
		if err := s.conn.SetReadDeadline(time.Now().Add(p.c.cfg.Stall)); err != nil {
			return fmt.Errorf("receiving: %w", err)
		}
		n, err := s.conn.Read(piece[:min(warm, frame.end-at)])
		crc = mem.Extend(crc, piece[:n])
		copy(p.dst[at:], piece[:n])
		at += int64(n)
		if err != nil && at < frame.end {
			p.c.wasted.Add(at - frame.at)
			return fmt.Errorf("receiving bytes %d to %d, at %d: %w", frame.at, frame.end, at, noEOF(err))
		}
	}
	if crc != want {
		p.c.wasted.Add(frame.end - frame.at)
		return fmt.Errorf("bytes %d to %d have checksum %08x, were sent with %08x: %w", frame.at, frame.end, crc, want, errDamaged)
	}
	p.accept(frame, crc)
	return nil
}
