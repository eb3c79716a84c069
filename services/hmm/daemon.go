package hmm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/mem/host"
	"trireme.dev/shared/wire"

	"trireme.dev/services/hmm/ledger"
)

// Daemon is the HMM of one node.
type Daemon struct {
	cfg     Config
	log     *slog.Logger
	id      string // another one for each daemon
	began   time.Time
	books   *books
	stores  []*host.Store // by space
	rooms   []protocol.Space
	domains []int   // by NPU: its space
	ready   []int64 // by space: bytes that are to be ready
	free    func() (free, total int64, err error)
	table   *host.Table
	board   *host.Board // what holders of claims say of their work, by slot
	others  *peers      // nil: the node is alone

	listener *net.UnixListener
	peers    sync.WaitGroup // sessions, and watchers of processes whose connection has ended

	mu       sync.Mutex
	sessions map[*session]bool // connected
	watched  map[*session]bool // the connection has ended, the process not
	stopping bool
	quit     chan struct{} // closed with stopping
}

// Run serves the node's memory until ctx ends, then takes leave: connections are ended and all memory goes back. It is
// New and Serve in one, for those who need no hold of the Daemon, as tests do; the command needs one.
func Run(ctx context.Context, cfg Config, log *slog.Logger) error {
	d, err := New(cfg, log)
	if err != nil {
		return err
	}
	return d.Serve(ctx)
}

// New makes the memory files and the socket; clients can connect, and are answered once Serve runs, which must be called. A socket left behind
// by a daemon that died is replaced, one that is served is an error.
func New(cfg Config, log *slog.Logger) (*Daemon, error) {
	cfg = cfg.withDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("HMM configuration: %w", err)
	}
	d := &Daemon{
		cfg: cfg, log: log, id: rand.Text(), began: time.Now(),
		sessions: map[*session]bool{}, watched: map[*session]bool{}, quit: make(chan struct{}), free: host.Free,
	}
	if err := d.open(); err != nil {
		return nil, errors.Join(fmt.Errorf("starting the HMM: %w", err), d.close())
	}
	return d, nil
}

func (d *Daemon) open() error {
	var err error
	if d.listener, err = listen(d.cfg.Socket); err != nil {
		return err
	}
	capacities := []int64{d.cfg.HostBytes}
	d.ready = []int64{0}
	names := []string{"trireme-host"}
	npus := make([]ledger.NPU, d.cfg.NPUs)
	for i := range npus {
		if i == 0 || d.cfg.PerNPU { // a domain begins
			capacities = append(capacities, d.cfg.Weights)
			names = append(names, fmt.Sprintf("trireme-hbm-%d", i))
			d.ready = append(d.ready, 0)
		}
		space := len(capacities) - 1
		capacities[space] += d.cfg.NPUBytes
		d.ready[space] += d.cfg.Ready
		npus[i] = ledger.NPU{Bytes: d.cfg.NPUBytes, Space: space}
		d.domains = append(d.domains, space)
	}
	var spaces []int64
	for i, capacity := range capacities {
		s, err := host.NewStore(names[i], addressRoom*capacity, capacity, max(d.cfg.CacheBytes, d.ready[i]))
		if err != nil {
			return err
		}
		d.stores = append(d.stores, s)
		d.rooms = append(d.rooms, protocol.Space{Page: s.Page(), Bytes: s.Bytes()})
		spaces = append(spaces, s.Bytes())
	}
	if d.table, err = host.NewTable("trireme-claims", d.cfg.Claims); err != nil {
		return err
	}
	if d.board, err = host.NewBoard("trireme-board", d.cfg.Claims); err != nil {
		return err
	}
	if d.cfg.Peers != nil {
		if d.others, err = openPeers(d, *d.cfg.Peers); err != nil {
			return err
		}
	}
	key := make([]byte, 32)
	if _, err := rand.Read(key); err != nil {
		return fmt.Errorf("drawing the capability key: %w", err)
	}
	d.books = newBooks(d, ledger.New(ledger.Config{
		Node: d.cfg.Node, Page: d.stores[0].Page(), Spaces: spaces, Host: d.cfg.HostBytes, NPUs: npus, Slots: d.cfg.Claims, Key: key,
		// Generations of this daemon are above those of one before it on the node, at less than one a nanosecond.
		First:   uint64(time.Now().UnixNano()),
		Board:   d.board.Load,
		MMCache: d.cfg.MMCache, KVCache: d.cfg.KVCache, Weights: d.cfg.Weights,
		Margin: d.cfg.Margin, Tombstone: d.cfg.Tombstone, MaxTombstones: maxTombstones, MaxRequests: maxRequests, Unknown: unknownDeadline,
		Reserve: d.cfg.Reserve,
	}))
	return nil
}

// listen opens the socket for this user alone.
func listen(path string) (*net.UnixListener, error) {
	if info, err := os.Lstat(path); err == nil {
		if info.Mode().Type() != os.ModeSocket {
			return nil, fmt.Errorf("%s is there and is no socket", path)
		}
		if conn, err := net.Dial("unix", path); err == nil {
			return nil, errors.Join(fmt.Errorf("another HMM serves %s", path), conn.Close())
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("removing the socket of an HMM that has ended: %w", err)
		}
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listening: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("protecting the socket: %w", err), l.Close())
	}
	return l, nil
}

// Serve answers clients until ctx ends and returns nil, or an error when it cannot go on: ErrName when another daemon has the node's name.
// A daemon serves once.
func (d *Daemon) Serve(ctx context.Context) error {
	ctx, end := context.WithCancel(ctx)
	defer end()
	bus, err := d.join()
	if err == nil {
		d.log.Info("HMM ready", "node", d.cfg.Node, "socket", d.cfg.Socket, "npus", d.cfg.NPUs, "domains", len(d.stores)-1,
			"npu_bytes", d.cfg.NPUBytes, "host_bytes", d.cfg.HostBytes, "weights_bytes", d.cfg.Weights)
		// At the very first start of a system nobody has made the stream yet: then there is nothing that was lost, either.
		d.emit(wire.Event{Kind: wire.EventHMMReady, Text: fmt.Sprintf("has the memory of %d NPUs, all of it empty", d.cfg.NPUs)})
		d.peers.Go(func() { d.accept(ctx) })
		d.peers.Go(func() { d.others.serve(ctx) })
		if d.cfg.Ready > 0 {
			d.peers.Go(func() { d.keepReady(ctx) })
		}
		if d.cfg.NATS != nil {
			err = d.keepName(ctx)
		} else {
			<-ctx.Done()
		}
	}
	end()
	err = errors.Join(err, bus.leave(), d.listener.Close())
	d.stop()
	d.others.hangUp()
	d.peers.Wait()
	d.books.close()
	return errors.Join(err, d.close())
}

func (d *Daemon) close() error {
	var errs []error
	if d.listener != nil {
		if err := d.listener.Close(); !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	errs = append(errs, d.others.close())
	for _, s := range d.stores {
		errs = append(errs, s.Close())
	}
	if d.table != nil {
		errs = append(errs, d.table.Close())
	}
	if d.board != nil {
		errs = append(errs, d.board.Close())
	}
	return errors.Join(errs...)
}

// accept takes connections until ctx has ended and the listener is closed.
func (d *Daemon) accept(ctx context.Context) {
	for {
		conn, err := d.listener.AcceptUnix()
		switch {
		case err == nil:
			d.start(conn)
		case ctx.Err() != nil:
			return
		default:
			// Out of descriptors, most likely; those who wait in the backlog are served when there are some again.
			d.log.Error("accepting a client", "error", err)
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
		}
	}
}

// start serves a connection, or refuses it: one of another user, or when there are too many, of all clients or of one
// process, which needs one only.
func (d *Daemon) start(conn *net.UnixConn) {
	s := &session{
		d: d, conn: conn, allocs: make(chan struct{}, maxAllocs), finds: make(chan struct{}, maxFinds),
	}
	var err error
	if s.peer, err = peerOf(conn); err == nil {
		err = s.peer.allowed()
	}
	if err != nil {
		d.log.Warn("client refused", "error", err)
		s.refuse(fmt.Errorf("%w: %w", mem.ErrDenied, err))
		return
	}
	d.mu.Lock()
	stopping := d.stopping
	if !stopping {
		if err = d.room(s.peer); err == nil {
			d.sessions[s] = true
		}
	}
	d.mu.Unlock()
	switch {
	case stopping:
		s.abort()
	case err != nil:
		s.refuse(err)
	default:
		d.peers.Go(func() {
			s.serve()
			d.mu.Lock()
			delete(d.sessions, s)
			delete(d.watched, s)
			d.mu.Unlock()
		})
	}
}

// room reports with ErrExhausted that there are as many connections as there may be. Those that have ended count for their
// process while it lives, as long as it may have maps. d.mu is held.
func (d *Daemon) room(p *peer) error {
	if n := d.cfg.Connections; len(d.sessions) >= n {
		return fmt.Errorf("the HMM has %d connections, as many as it takes: %w", n, mem.ErrExhausted)
	}
	if p.pid == 0 {
		return nil // of another container: the kernel does not tell which
	}
	own, most := 0, max(1, d.cfg.Connections/2)
	for _, all := range []map[*session]bool{d.sessions, d.watched} {
		for s := range all {
			if s.peer.pid == p.pid {
				own++
			}
		}
	}
	if own >= most {
		return fmt.Errorf("process %d has %d connections, as many as one may have: %w", p.pid, own, mem.ErrExhausted)
	}
	return nil
}

// stop ends all sessions and watchers.
func (d *Daemon) stop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stopping = true
	close(d.quit)
	for _, all := range []map[*session]bool{d.sessions, d.watched} {
		for s := range all {
			s.abort()
		}
	}
}

// PeerAddress is where this daemon serves other nodes; nil when it does not.
func (d *Daemon) PeerAddress() net.Addr {
	if d.others == nil || d.others.listener == nil {
		return nil
	}
	return d.others.listener.Addr()
}

// Stats is the state of the node's memory; zero once the daemon has ended.
func (d *Daemon) Stats() protocol.Stats {
	var s protocol.Stats
	d.books.do(func(l *ledger.Ledger, _ time.Time) {
		s = l.Stats()
		for i, store := range d.stores {
			space := &s.Spaces[i]
			space.Name, space.Kept, space.Unready = store.File().Name(), store.Cached(), store.Unready(d.ready[i])
			s.Cached += space.Kept
			var err error
			if space.Resident, err = store.Resident(); err != nil {
				d.log.Error("looking at what a space takes", "error", err)
			}
		}
	})
	s.Peer = d.announced()
	return s
}

// End is what a done event does: the request's holds and claims end, and it cannot come back.
func (d *Daemon) End(request string) error {
	var err error
	d.books.do(func(l *ledger.Ledger, now time.Time) { err = l.End(now, request) })
	return err
}

// gone tells everyone that an instance's connection ended.
func (d *Daemon) gone(instance, role string) {
	d.mu.Lock()
	stopping := d.stopping
	d.mu.Unlock()
	if stopping {
		return // the instances live, the HMM does not: they know
	}
	g := wire.Gone{Node: d.cfg.Node, Instance: instance, Role: role}
	d.log.Info("instance disconnected", "instance", instance, "role", role)
	if d.cfg.OnGone != nil {
		d.cfg.OnGone(g)
	}
	d.publish(g)
}
