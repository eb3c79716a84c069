package hmm

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/mem/host"
	"trireme.dev/shared/transfer"

	"trireme.dev/services/hmm/ledger"
)

// Peers is how a daemon exchanges objects with those of other nodes.
type Peers struct {
	Listen   string            // address to serve objects at; empty: they cannot be pulled
	Announce string            // address that others are told on NATS; empty: what Listen says
	Known    map[string]string // where other nodes' HMMs serve, by node; those of all others are asked for on NATS
	TLS      *tls.Config       // nil: plain TCP; see transfer.MutualTLS
}

// peers is the daemon's side of the exchange. All memory that it maps, it maps here, and only while it is copied.
type peers struct {
	d        *Daemon
	listener net.Listener // nil: does not serve
	server   *transfer.Server
	client   *transfer.Client
	id       ledger.Conn // holds what is being sent
	spaces   []mem.Space // by store

	mu   sync.Mutex
	uses map[mem.Extent]int
}

// openPeers listens and makes what is needed; the stores are there.
func openPeers(d *Daemon, cfg Peers) (*peers, error) {
	p := &peers{d: d, uses: map[mem.Extent]int{}}
	var err error
	if cfg.Listen != "" {
		p.server, err = transfer.NewServer(transfer.ServerConfig{Source: p, TLS: cfg.TLS, Log: d.log})
		if err == nil {
			p.listener, err = net.Listen("tcp", cfg.Listen)
		}
		if err != nil {
			return p, fmt.Errorf("listening for other nodes: %w", err)
		}
	}
	if p.client, err = transfer.NewClient(transfer.ClientConfig{Address: d.peerAddress, TLS: cfg.TLS}); err != nil {
		return p, fmt.Errorf("preparing to pull from other nodes: %w", err)
	}
	for _, store := range d.stores {
		fd, err := unix.FcntlInt(store.File().Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return p, fmt.Errorf("opening memory for other nodes: %w", err)
		}
		space, err := host.OpenSpace(os.NewFile(uintptr(fd), store.File().Name()), store.Bytes())
		if err != nil {
			return p, fmt.Errorf("opening memory for other nodes: %w", err)
		}
		p.spaces = append(p.spaces, space)
	}
	return p, nil
}

// serve answers other nodes until ctx ends. The books run.
func (p *peers) serve(ctx context.Context) {
	if p == nil || p.server == nil {
		return
	}
	var err error
	if !p.d.books.do(func(l *ledger.Ledger, now time.Time) {
		p.id, _, err = l.Connect(now, protocol.Hello{Instance: "other nodes", Role: "hmm"})
	}) || err != nil {
		return // closed already: an instance's name and no NPU are never refused
	}
	p.d.log.Info("serving other nodes", "address", p.listener.Addr().String(), "announced", p.d.announced(),
		"tls", p.d.cfg.Peers.TLS != nil)
	if err := p.server.Serve(ctx, p.listener); err != nil {
		p.d.log.Error("serving other nodes", "error", err)
	}
	p.d.books.do(func(l *ledger.Ledger, _ time.Time) { l.Disconnect(p.id) })
	p.d.books.reap(p.id)
}

// hangUp ends what is being pulled.
func (p *peers) hangUp() {
	if p != nil && p.client != nil {
		_ = p.client.Close() // always nil
	}
}

// close gives everything back; nothing is under way.
func (p *peers) close() error {
	if p == nil {
		return nil
	}
	var errs []error
	if p.listener != nil {
		if err := p.listener.Close(); !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	p.hangUp()
	for _, s := range p.spaces {
		errs = append(errs, s.Close())
	}
	return errors.Join(errs...)
}

// Open implements transfer.Source: the object is held and mapped while a span of it is sent.
func (p *peers) Open(h mem.Handle) (transfer.Content, error) {
	var grants []protocol.Grant
	err := mem.ErrLost
	p.d.books.do(func(l *ledger.Ledger, _ time.Time) {
		grants, err = l.Attach(p.id, protocol.Attach{Access: mem.ReadOnly, NPU: -1, Handles: []mem.Handle{h}})
	})
	if err != nil {
		return transfer.Content{}, err
	}
	g := grants[0]
	letGo := func() {
		p.d.books.do(func(l *ledger.Ledger, _ time.Time) { err = l.Free(p.id, []protocol.Object{nameOf(g)}) })
	}
	b, err := p.acquire(g.Extent, mem.ReadOnly)
	if err != nil {
		letGo()
		return transfer.Content{}, err
	}
	return transfer.Content{Bytes: b[:g.Handle.Bytes], Release: func() {
		if err := p.release(g.Extent); err != nil {
			p.d.log.Error("unmapping what was sent", "error", err)
		}
		letGo()
	}}, nil
}

func nameOf(g protocol.Grant) protocol.Object {
	return protocol.Object{ID: g.Handle.Object, Generation: g.Handle.Generation}
}

// acquire maps an extent, or counts one use more of its map. Extents in use do not overlap: each is somebody's object.
func (p *peers) acquire(e mem.Extent, a mem.Access) ([]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.uses[e] == 0 {
		if _, err := p.spaces[e.Space].Map(e, a); err != nil {
			return nil, err
		}
	}
	p.uses[e]++
	return p.spaces[e.Space].Bytes(e), nil
}

func (p *peers) release(e mem.Extent) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.uses[e]--; p.uses[e] > 0 {
		return nil
	}
	delete(p.uses, e)
	return p.spaces[e.Space].Unmap(e)
}

// pulls reports whether an Attach names objects of other nodes and this daemon pulls such.
func (d *Daemon) pulls(a protocol.Attach) bool {
	if d.others == nil {
		return false
	}
	for _, h := range a.Handles {
		if h.Node != d.cfg.Node {
			return true
		}
	}
	return false
}

// attachCopies is Attach with objects of other nodes: they are copied into new ones here, which only this connection
// holds. NPU memory needs to be told its NPU, host memory stays host memory.
func (s *session) attachCopies(ctx context.Context, a protocol.Attach) (grants []protocol.Grant, err error) {
	var specs []protocol.Spec
	local := protocol.Attach{Access: a.Access, NPU: a.NPU}
	for _, h := range a.Handles {
		if h.Node == s.d.cfg.Node {
			local.Handles = append(local.Handles, h)
			continue
		}
		spec := protocol.Spec{Kind: h.Kind, NPU: a.NPU, Bytes: h.Bytes, Shape: h.Shape}
		switch {
		case h.NPU == mem.HostNPU:
			spec.NPU = mem.HostNPU
		case a.NPU < 0:
			return nil, fmt.Errorf("attaching %v %d of node %q: to which NPU it is to be copied is not said: %w", h.Kind, h.Object, h.Node, mem.ErrInvalid)
		}
		if h.Sealed && a.Access == mem.ReadWrite {
			return nil, fmt.Errorf("attaching %v %d of node %q for writing: %w", h.Kind, h.Object, h.Node, mem.ErrSealed)
		}
		specs = append(specs, spec)
	}
	var own []protocol.Grant
	defer func() {
		if err == nil {
			return
		}
		var names []protocol.Object
		for _, g := range own {
			names = append(names, nameOf(g))
		}
		var ferr error
		if s.d.books.do(func(l *ledger.Ledger, _ time.Time) { ferr = l.Free(s.id, names) }) {
			err = errors.Join(err, ferr)
		}
	}()
	if len(local.Handles) > 0 {
		err = mem.ErrLost
		s.d.books.do(func(l *ledger.Ledger, _ time.Time) { own, err = l.Attach(s.id, local) })
		if err != nil {
			return nil, err
		}
	}
	here := own
	copies, err := s.give(specs)
	if err != nil {
		return nil, err
	}
	own = append(own[:len(own):len(own)], copies...)
	grants = make([]protocol.Grant, len(a.Handles))
	pulls, pulling := errgroup.WithContext(ctx)
	pulls.SetLimit(maxPulls)
	for i, h := range a.Handles {
		g := &grants[i]
		if h.Node == s.d.cfg.Node {
			*g, here = here[0], here[1:]
			continue
		}
		*g, copies = copies[0], copies[1:]
		g.Pulled = true
		pulls.Go(func() (err error) {
			g.Handle, err = s.fill(pulling, *g, h)
			return err
		})
	}
	if err := pulls.Wait(); err != nil {
		return nil, err
	}
	return grants, nil
}

// fill copies the content of another node's object into a new one, and seals it if that is sealed.
func (s *session) fill(ctx context.Context, g protocol.Grant, from mem.Handle) (mem.Handle, error) {
	p := s.d.others
	b, err := p.acquire(g.Extent, mem.ReadWrite)
	if err != nil {
		return mem.Handle{}, err
	}
	start := time.Now()
	err = p.client.Pull(ctx, from, b[:from.Bytes], nil)
	if errors.Is(err, mem.ErrLost) {
		select {
		case <-s.d.quit: // it is this HMM that is lost
		default:
			err = fmt.Errorf("%w: %w", mem.ErrGone, err) // what cannot be had is gone
		}
	}
	if err = errors.Join(err, p.release(g.Extent)); err != nil {
		return mem.Handle{}, err
	}
	s.d.log.Debug("object pulled", "node", from.Node, "kind", from.Kind.String(), "bytes", from.Bytes, "took", time.Since(start))
	if !from.Sealed {
		return g.Handle, nil
	}
	h, err := mem.Handle{}, mem.ErrLost
	s.d.books.do(func(l *ledger.Ledger, _ time.Time) {
		h, err = l.Finish(s.id, protocol.Sealing{Object: nameOf(g), CRC: from.CRC})
	})
	return h, err
}
