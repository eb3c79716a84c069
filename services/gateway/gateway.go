// Package gateway is Trireme's front door: the OpenAI-compatible HTTP API. It owns each request's life: it checks and
// renders the request, gets its pictures, cuts the prompt into tokens, puts what is large into host memory, publishes
// the first messages, takes numbered tokens, and gives the client text in order, once, whatever fails on the way.
//
// It runs no model and maps no device memory but the objects that it makes itself. Its parts: gateway/openai is the API's
// wire, gateway/media gets pictures, gateway/admission gives credits, gateway/request is the answer as a pure state
// machine. This package ties them to NATS, the HMM and the model folder.
//
// Goroutines: one for each request (net/http's own), which alone touches the request's state; one that brings messages
// from NATS to the requests' mailboxes; one that keeps the connection to the HMM; one for the heartbeat; and short ones
// that tell the HMM of ended requests.
package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/labstack/echo/v4"

	"trireme.dev/services/gateway/admission"
	"trireme.dev/services/gateway/media"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/sched"
	"trireme.dev/shared/wire"
)

// Parts are what a Gateway is put together from. The Gateway owns none of them but the connections that Dial makes.
type Parts struct {
	Bus   *bus.Bus
	Dial  Dialer
	Model *Model
	Log   *slog.Logger
}

// Gateway serves the API. Make it with New.
type Gateway struct {
	cfg       Config
	name      string // of the model, for clients
	model     *Model
	bus       *bus.Bus
	log       *slog.Logger
	memory    *memoryLink
	media     *media.Fetcher
	gate      *admission.Gate
	paces     paces
	demand    *demand
	metrics   *metrics
	instances *bus.Instances
	dispatch  *dispatcher
	graveyard *graveyard
	echo      *echo.Echo
	created   int64 // Unix time, for /v1/models
	node      string
	pid       int
	address   string // that it listens on

	doors       doors
	base        context.Context // ends when the gateway stops; its cause is errStopping
	stop        context.CancelCauseFunc
	unsubscribe func()
	background  sync.WaitGroup // of ends of requests
	announced   atomic.Bool    // the heartbeat was seen
	rooms       atomic.Pointer[rooms]
}

// New makes a gateway that listens for tokens but serves nothing yet. Its owner calls Serve, once.
func New(ctx context.Context, cfg Config, parts Parts) (*Gateway, error) {
	cfg = cfg.withDefaults()
	g := &Gateway{
		cfg: cfg, name: cfg.ModelName, model: parts.Model, bus: parts.Bus, log: parts.Log.With("instance", cfg.Instance),
		media: media.New(cfg.Media), created: time.Now().Unix(), pid: os.Getpid(),
	}
	g.graveyard = &graveyard{g: g, turn: make(chan struct{}, 1)}
	if g.name == "" {
		g.name = parts.Model.Config.Name
	}
	policy, err := sched.ParsePolicy(cfg.Policy)
	if err != nil {
		return nil, err
	}
	g.gate = admission.New(admission.Limits{
		Requests: cfg.MaxOpen, Queue: cfg.MaxQueue, Wait: cfg.QueueWait, RefuseLate: cfg.Late == LateRefuse,
		Order: sched.Order{Policy: policy},
	}, time.Now)
	g.metrics = newMetrics(g.name, g.gate, slices.Sorted(maps.Keys(cfg.Classes)))
	g.metrics.registry.MustRegister(queueMetrics{g.bus.Queues, g.log})
	g.demand = newDemand()
	g.memory = newMemoryLink(parts.Dial, g.log)
	g.base, g.stop = context.WithCancelCause(context.Background())
	if g.instances, err = g.bus.Instances(ctx); err != nil {
		return nil, err
	}
	g.metrics.registry.MustRegister(pacedMetrics{g.instances})
	if g.dispatch, g.unsubscribe, err = subscribe(g.bus.Conn(), cfg.Instance, cfg.Inbox, g.log); err != nil {
		return nil, err
	}
	g.node, _ = os.Hostname() // only shown
	g.routes()
	return g, nil
}

// capacityInterval is how often the HMM is asked how much memory there is.
const capacityInterval = 2 * time.Second

// Serve serves the API on l until ctx ends, then stops in order (see doors), ends what is open after Config.Grace, tells the
// stages, and returns nil. It closes l.
func (g *Gateway) Serve(ctx context.Context, l net.Listener) error {
	g.address = l.Addr().String()
	server := &http.Server{
		Handler:           g.echo,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(g.log.Handler(), slog.LevelDebug),
		BaseContext:       func(net.Listener) context.Context { return g.base },
	}
	links, unlink := context.WithCancel(context.Background()) // end after the last request
	defer unlink()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer unlink()
	defer g.unsubscribe()
	wg.Go(func() { g.dispatch.run(links) })
	if sub, err := g.answerStats(); err != nil {
		g.log.Error("nobody is told of this gateway's demand", "error", err)
	} else {
		defer sub.Unsubscribe() //nolint:errcheck // it ends with the connection at the latest
	}
	members := make(chan struct{}, 1)
	wg.Go(func() { g.watchRoles(links, members) })
	wg.Go(func() { g.sweepJoins(links) })
	wg.Go(func() { g.memory.run(links, capacityInterval, members, g.refresh) })
	wg.Go(func() {
		if err := g.bus.Announce(links, g.heartbeat); err != nil {
			g.log.Error("the heartbeat has ended", "error", err)
		}
	})
	failed := make(chan error, 1)
	wg.Go(func() { failed <- server.Serve(l) })
	g.log.Info("serving", "address", g.address, "model", g.name, "api_keys", len(g.cfg.Keys), "origins", g.cfg.Origins)
	g.emit(wire.EventReady, fmt.Sprintf("serves %s on %s", g.name, g.address))

	var err error
	select {
	case <-ctx.Done():
		g.windDown(server)
	case err = <-failed:
		err = fmt.Errorf("serving HTTP on %s: %w", g.address, err)
	}
	g.stop(errStopping)
	last, cancel := context.WithTimeout(context.Background(), stopWait)
	_ = server.Shutdown(last) // what is left is closed
	cancel()
	_ = server.Close()
	g.background.Wait()
	if err != nil {
		g.emit(wire.EventFailed, err.Error())
	} else {
		g.emit(wire.EventStopped, "has answered or ended its requests")
	}
	return err
}

// emit tells operators what happened to this gateway.
func (g *Gateway) emit(kind, text string) {
	g.bus.Emit(wire.Event{Kind: kind, Node: g.node, Instance: g.cfg.Instance, Role: "gateway", Text: text})
}

// stopWait is how long requests may take to end once they were told to.
const stopWait = 2 * time.Second

// watchRoles leaves a value in changed when there are other instances, or with other roles or NPUs, than before, until ctx ends: whose
// NPUs they have says what fits, which must not be found out only when requests have been let in.
func (g *Gateway) watchRoles(ctx context.Context, changed chan<- struct{}) {
	var before []string
	for {
		next := g.instances.Changed()
		var now []string
		for _, i := range g.instances.All() {
			if !i.Standby {
				now = append(now, fmt.Sprint(i.ID, i.Role, i.NPUs))
			}
		}
		if !slices.Equal(now, before) {
			before = now
			select {
			case changed <- struct{}{}:
			default: // one look is due anyway
			}
		}
		select {
		case <-next:
		case <-ctx.Done():
			return
		}
	}
}

// serving are the instances that have a role and NPUs.
func (g *Gateway) serving(role string) []wire.Instance {
	return slices.DeleteFunc(g.instances.Role(role), func(i wire.Instance) bool { return i.Standby })
}

// refresh asks the HMM how much memory there is, and whose it is.
func (g *Gateway) refresh(ctx context.Context, m Memory) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	npus, err := m.Capacity(ctx)
	if err != nil {
		if !errors.Is(err, mem.ErrLost) { // which is told by whoever connects again
			g.log.Warn("asking the HMM for its capacity", "error", err)
		}
		return
	}
	r, c := capacities(npus, func(role string) map[string]bool {
		has := make(map[string]bool)
		for _, i := range g.serving(role) {
			has[i.ID] = true
		}
		return has
	})
	g.rooms.Store(&r)
	g.gate.SetAhead(g.cfg.Ahead * max(1, countNPUs(g.serving("encode"), g.serving("prefill")))) // those that bring requests to their first token
	g.gate.SetCapacity(c)
}
