package gateway

import (
	"net/http"
	"sync"
	"time"

	"github.com/labstack/echo/v4"

	"trireme.dev/services/gateway/openai"
)

// A gateway that is told to stop does so in three steps. First /health and the heartbeat say that it is not ready, while it still
// takes requests, for Config.Notice: load balancers learn it only when they ask. Then it refuses new ones (503, Retry-After, and
// the connection is closed, so that the client's next try goes elsewhere), but keeps listening: who meets a closed port learns
// less. When all that it had taken is answered, or Config.Grace is over, it ends.

// stopRetry is when to come again to a gateway that stops: a balancer has noticed by then, or another one has started.
const stopRetry = time.Second

// doors counts who is inside.
type doors struct {
	mu       sync.Mutex
	stopping bool // not ready
	closed   bool // nobody is let in
	inside   int
	empty    chan struct{} // closed when nobody is inside after the doors were closed
}

// enter lets a request in, unless the doors are closed.
func (d *doors) enter() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return false
	}
	d.inside++
	return true
}

func (d *doors) leave() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.inside--; d.inside == 0 && d.closed {
		close(d.empty)
	}
}

// stop says that the gateway is about to stop.
func (d *doors) stop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stopping = true
}

// isStopping reports whether the gateway is about to stop.
func (d *doors) isStopping() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.stopping
}

// close lets nobody in any more. The channel is closed when nobody is inside.
func (d *doors) close() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed, d.empty = true, make(chan struct{})
	if d.inside == 0 {
		close(d.empty)
	}
	return d.empty
}

// errClosed is the answer to who comes too late.
func errClosed() error {
	e := openai.Server(http.StatusServiceUnavailable, "This server is stopping; please try again.")
	e.RetryAfter = stopRetry
	return e
}

// guard is the way in of requests that are worked on.
func (g *Gateway) guard(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		if !g.doors.enter() {
			return errClosed()
		}
		defer g.doors.leave()
		return next(c)
	}
}

// windDown returns when all requests that were taken are answered, or have had their time.
func (g *Gateway) windDown(server *http.Server) {
	server.SetKeepAlivesEnabled(false) // each answer says that it is the connection's last
	g.doors.stop()                     // behind that: who hears it sends no more on a connection that is about to be closed
	g.log.Info("stopping: not ready any more", "notice", g.cfg.Notice, "grace", g.cfg.Grace)
	time.Sleep(g.cfg.Notice)
	empty := g.doors.close()
	late := time.NewTimer(g.cfg.Grace)
	defer late.Stop()
	select {
	case <-empty:
	case <-late.C:
		g.log.Warn("stopping: requests are still open, and end with an error", "grace", g.cfg.Grace)
	}
}
