// Package bustest gives tests a real nats-server with JetStream on a free port. It is no mock, and no part of a
// running system.
package bustest

import (
	"errors"
	"os"
	"testing"
	"time"

	"trireme.dev/shared/bus/embedded"
)

// Server is a nats-server that belongs to one test.
type Server struct {
	tb     testing.TB
	dir    string
	port   int
	url    string
	server *embedded.Server
}

// Run starts a server with an empty store; it is shut down when the test ends.
func Run(tb testing.TB) *Server {
	tb.Helper()
	return RunAt(tb, tb.TempDir())
}

// RunAt is Run with the store in a folder of the caller's, which outlives the server.
func RunAt(tb testing.TB, dir string) *Server {
	tb.Helper()
	s := &Server{tb: tb, dir: dir}
	s.Start()
	s.port, s.url = s.server.Port(), s.server.URL()
	tb.Cleanup(func() { s.server.Shutdown() })
	return s
}

// URL is where clients connect; it stays the same over Stop and Start.
func (s *Server) URL() string { return s.url }

// Stop shuts the server down; clients lose their connections and the store stays.
func (s *Server) Stop() {
	s.tb.Helper()
	s.server.Shutdown()
}

// Wipe empties the store of a server that is stopped.
func (s *Server) Wipe() {
	s.tb.Helper()
	if err := os.RemoveAll(s.dir); err != nil {
		s.tb.Fatal(err)
	}
}

// Start starts the server again after Stop, with the same port and store.
func (s *Server) Start() {
	s.tb.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) { // until the port is free again
		server, err := embedded.Start(embedded.Options{Port: s.port, MonitorPort: -1, StoreDir: s.dir})
		if err == nil {
			s.server = server
			return
		}
		if !errors.Is(err, embedded.ErrPortInUse) || time.Now().After(deadline) {
			s.tb.Fatal(err)
		}
	}
}
