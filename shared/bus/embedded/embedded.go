// Package embedded runs a real nats-server with JetStream inside this process, for `trireme up` and for tests. It makes
// no streams (package bus does) and offers no clustering: whoever needs that runs nats-server on its own.
package embedded

import (
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
	Host        string       // address that clients connect to; empty means 127.0.0.1
	Port        int          // client port; 0 means a free one
	MonitorHost string       // address of the monitoring pages; empty means Host
	MonitorPort int          // HTTP monitoring port; 0 means a free one, negative no monitoring
	StoreDir    string       // folder of JetStream's files; made when it is not there
	Log         *slog.Logger // the server's warnings and errors go here; nil discards them
}

// Server is a running nats-server. Its owner calls Shutdown.
type Server struct {
	server  *server.Server
	monitor bool
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
	}
	if o.MonitorPort >= 0 {
		if err := checkFree(o.MonitorHost, o.MonitorPort); err != nil {
			return nil, fmt.Errorf("starting nats-server's monitoring: %w", err)
		}
		opts.HTTPHost = o.MonitorHost
		opts.HTTPPort = orRandom(o.MonitorPort)
	}
	s, err := server.NewServer(opts)
	if err != nil {
		return nil, fmt.Errorf("starting nats-server: %w", err)
	}
	l := &logger{log: o.Log}
	s.SetLoggerV2(l, false, false, false)
	s.Start()
	if err := awaitReady(s, l); err != nil {
		s.Shutdown()
		s.WaitForShutdown()
		return nil, fmt.Errorf("starting nats-server with store %s: %w", o.StoreDir, err)
	}
	return &Server{server: s, monitor: o.MonitorPort >= 0}, nil
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
func (s *Server) URL() string { return "nats://" + s.server.Addr().String() }

// Port is the client port.
func (s *Server) Port() int { return s.server.Addr().(*net.TCPAddr).Port }

// MonitorURL is the address of the monitoring pages (/varz, /jsz, /connz), or empty without monitoring.
func (s *Server) MonitorURL() string {
	if !s.monitor {
		return ""
	}
	return "http://" + s.server.MonitorAddr().String()
}

// Shutdown closes all connections, flushes the store and returns when the server has stopped. Idempotent.
func (s *Server) Shutdown() {
	s.server.Shutdown()
	s.server.WaitForShutdown()
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
