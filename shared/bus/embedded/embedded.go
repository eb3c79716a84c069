// Package embedded runs a real nats-server with JetStream inside this process, for `trireme up` and for tests. It makes
// no streams (package bus does) and offers no clustering: whoever needs that runs nats-server on its own.
//
// A server whose disk was full stores nothing any more until it is started again (nats-server 2.15: a write error of a
// stream is for good, and publishers get no answer). So Server does that by itself when there is room.
package embedded

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"trireme.dev/shared/wire"
)

// ErrPortInUse is wrapped by the error of Start when another process listens on the client or the monitoring port; the
// error names the address.
var ErrPortInUse = errors.New("port is in use")

// headroom is what headers and JetStream's own API requests may add to a message of wire.MaxMessage bytes.
const headroom = 8 << 10

// startTimeout bounds how long Start waits for the server to accept clients, recovery of its store included.
const startTimeout = 30 * time.Second

// Options says where the server listens and keeps its data.
type Options struct {
	Host        string // address that clients connect to; empty means 127.0.0.1
	Port        int    // client port; 0 means a free one
	MonitorHost string // address of the monitoring pages; empty means Host
	MonitorPort int    // HTTP monitoring port; 0 means a free one, negative no monitoring
	StoreDir    string // folder of JetStream's files; made when it is not there
	// Ping is how often clients are asked for a sign of life; the third question finds two unanswered, and the connection is taken
	// for broken. 0 means 5 s.
	Ping time.Duration
	Log  *slog.Logger // the server's warnings and errors go here; nil discards them
}

// Server is a running nats-server. Its owner calls Shutdown.
type Server struct {
	opts    *server.Options // with the ports that it was given
	log     *slog.Logger
	url     string
	monitor string
	done    chan struct{}  // closed by Shutdown
	guard   sync.WaitGroup // of the goroutine that starts the server again

	mu     sync.Mutex
	server *server.Server
}

// Start starts a server and returns once it takes clients. It fails at once with ErrPortInUse (the error names the
// address), and when the store cannot be opened (the error names the folder and has the server's own words).
func Start(o Options) (*Server, error) {
	if o.Host == "" {
		o.Host = "127.0.0.1"
	}
	if o.MonitorHost == "" {
		o.MonitorHost = o.Host
	}
	if o.Log == nil {
		o.Log = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	if err := checkFree(o.Host, o.Port); err != nil {
		return nil, fmt.Errorf("starting nats-server: %w", err)
	}
	if err := os.MkdirAll(o.StoreDir, 0o700); err != nil {
		return nil, fmt.Errorf("starting nats-server: making its store %s: %w", o.StoreDir, err)
	}
	opts := &server.Options{
		ServerName: "trireme",
		Host:       o.Host,
		Port:       orRandom(o.Port),
		JetStream:  true,
		StoreDir:   o.StoreDir,
		MaxPayload: wire.MaxMessage + headroom,
		NoSigs:     true,
		// Who is gone without a word holds up what waits for its answer (the lease of gateways, shared/stage): by default
		// nats-server would take six minutes to notice.
		PingInterval: cmp.Or(o.Ping, 5*time.Second),
		MaxPingsOut:  2,
	}
	if o.MonitorPort >= 0 {
		if err := checkFree(o.MonitorHost, o.MonitorPort); err != nil {
			return nil, fmt.Errorf("starting nats-server's monitoring: %w", err)
		}
		opts.HTTPHost = o.MonitorHost
		opts.HTTPPort = orRandom(o.MonitorPort)
	}
	s := &Server{opts: opts, log: o.Log, done: make(chan struct{})}
	var err error
	if s.server, err = start(opts, o.Log); err != nil {
		return nil, err
	}
	addr := s.server.Addr().(*net.TCPAddr)
	opts.Port, s.url = addr.Port, "nats://"+addr.String()
	if o.MonitorPort >= 0 {
		addr := s.server.MonitorAddr()
		opts.HTTPPort, s.monitor = addr.Port, "http://"+addr.String()
	}
	s.guard.Go(s.watch)
	return s, nil
}

// start starts a server and waits until it takes clients.
func start(opts *server.Options, log *slog.Logger) (*server.Server, error) {
	s, err := server.NewServer(opts.Clone())
	if err != nil {
		return nil, fmt.Errorf("starting nats-server: %w", err)
	}
	l := &logger{log: log}
	s.SetLoggerV2(l, false, false, false)
	s.Start()
	if err := awaitReady(s, l); err != nil {
		s.Shutdown()
		s.WaitForShutdown()
		return nil, fmt.Errorf("starting nats-server with store %s: %w", opts.StoreDir, err)
	}
	return s, nil
}

const (
	// watchEvery is the time between two looks at a server's health.
	watchEvery = time.Second
	// enoughRoom is how much of the disk must be free before a server that ran out of it is started again; less on a disk
	// of which this is more than a quarter.
	enoughRoom = 64 << 20
)

// watch starts the server again when a stream could not be written and there is room now. Clients see their connections end and
// connect again; what was confirmed is in the store.
func (s *Server) watch() {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for broken := false; ; {
		select {
		case <-tick.C:
		case <-s.done:
			return
		}
		if !broken {
			health := s.current().Healthz(nil)
			if !strings.Contains(health.Error, "write error") {
				continue
			}
			broken = true
			s.log.Error("nats-server stores no messages: is the disk full? It is started again when there is room",
				"store", s.opts.StoreDir, "error", health.Error)
		}
		if !hasRoom(s.opts.StoreDir) {
			continue
		}
		s.log.Warn("starting nats-server again, as its store can be written again", "store", s.opts.StoreDir)
		if err := s.restart(); err != nil {
			s.log.Error("starting nats-server again; it is tried again", "error", err)
			continue
		}
		broken = false
	}
}

func (s *Server) current() *server.Server {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.server
}

// restart replaces the server by a new one on the same ports and store.
func (s *Server) restart() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.server.Shutdown()
	s.server.WaitForShutdown()
	next, err := start(s.opts, s.log)
	if err != nil {
		return err
	}
	s.server = next
	return nil
}

// hasRoom reports whether a folder's disk has room for messages.
func hasRoom(dir string) bool {
	var fs syscall.Statfs_t
	if err := syscall.Statfs(dir, &fs); err != nil {
		return false
	}
	size := uint64(fs.Bsize)
	return fs.Bavail*size >= min(enoughRoom, fs.Blocks*size/4)
}

// awaitReady waits until the server takes clients. What it cannot go on after it only logs, as fatal.
func awaitReady(s *server.Server, l *logger) error {
	for deadline := time.Now().Add(startTimeout); ; {
		ready := s.ReadyForConnections(100 * time.Millisecond)
		switch fatal := l.lastFatal(); {
		case fatal != "":
			return errors.New(fatal)
		case ready && s.JetStreamEnabled():
			return nil
		case time.Now().After(deadline):
			return fmt.Errorf("not ready after %v", startTimeout)
		}
	}
}

// URL is where clients connect.
func (s *Server) URL() string { return s.url }

// Port is the client port.
func (s *Server) Port() int { return s.opts.Port }

// MonitorURL is the address of the monitoring pages (/varz, /jsz, /connz), or empty without monitoring.
func (s *Server) MonitorURL() string { return s.monitor }

// Shutdown closes all connections, flushes the store and returns when the server has stopped. Idempotent.
func (s *Server) Shutdown() {
	s.mu.Lock()
	select {
	case <-s.done:
	default:
		close(s.done)
	}
	s.mu.Unlock()
	s.guard.Wait()
	s.current().Shutdown()
	s.current().WaitForShutdown()
}

func orRandom(port int) int {
	if port == 0 {
		return server.RANDOM_PORT
	}
	return port
}

// checkFree reports a port that another process listens on. nats-server itself would only log that and go on.
func checkFree(host string, port int) error {
	if port == 0 {
		return nil
	}
	addr := net.JoinHostPort(host, strconv.Itoa(port))
	l, err := net.Listen("tcp", addr)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("%s: %w", addr, ErrPortInUse)
	case err != nil:
		return err
	}
	return l.Close()
}

// logger carries nats-server's log to slog and remembers the last fatal error, which says why a start failed.
type logger struct {
	log *slog.Logger

	mu    sync.Mutex
	fatal string
}

func (l *logger) lastFatal() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.fatal
}

// Noticef implements server.Logger.
func (l *logger) Noticef(format string, v ...any) { l.log.Debug("nats: " + fmt.Sprintf(format, v...)) }

// Warnf implements server.Logger.
func (l *logger) Warnf(format string, v ...any) { l.log.Warn("nats: " + fmt.Sprintf(format, v...)) }

// Errorf implements server.Logger.
func (l *logger) Errorf(format string, v ...any) { l.log.Error("nats: " + fmt.Sprintf(format, v...)) }

// Fatalf implements server.Logger. It does not exit: Start reports the words.
func (l *logger) Fatalf(format string, v ...any) {
	l.mu.Lock()
	l.fatal = strings.TrimSpace(fmt.Sprintf(format, v...))
	l.mu.Unlock()
	l.log.Error("nats: " + fmt.Sprintf(format, v...))
}

// Debugf implements server.Logger; the server is started without debug logging.
func (l *logger) Debugf(string, ...any) {}

// Tracef implements server.Logger; the server is started without traces.
func (l *logger) Tracef(string, ...any) {}
