package stage

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/wire"
)

// A gateway owns its requests; when it is gone nobody takes their answers. So each has a lease, which its signs of life renew:
// its heartbeat, and failing that its answers. When the lease has ended every stage gives up what it has of that gateway, and
// whatever comes to it later.
//
// Signs of life that NATS keeps from this process are not missing: only an unbroken row of answers by NATS that nobody listens
// at the gateway ends a lease. A gateway that was only cut off may come back; then it is told which of its requests were given
// up, and starts them again where its clients' answers stand.

// DefaultLease is the Config.Lease of 0.
const DefaultLease = 10 * time.Second

const (
	// probeTimeout is how long a gateway without heartbeat has to answer.
	probeTimeout = time.Second
	// heldWait is the time until a message comes back whose gateway shows no sign of life and still has its lease.
	heldWait = 500 * time.Millisecond
	// oweMost bounds the requests of one gateway that are remembered as given up.
	oweMost = 1 << 14
	// forgetWait is how long a gateway is remembered that has nothing here.
	forgetWait = time.Minute
	// oweWait is the pause after a failed try to tell a gateway what was given up.
	oweWait = time.Second
)

// errHeld is what the work on a message ends with whose gateway shows no sign of life: it comes back in a moment.
var errHeld = errors.New("its gateway shows no sign of life")

// errGivenUp is the end of work whose gateway's lease has ended.
var errGivenUp = fmt.Errorf("its gateway is gone: %w", mem.ErrEnded)

// gateways watches the leases of gateways.
type gateways struct {
	stage   *Stage
	alive   func(id string) bool // its heartbeat stands
	silence time.Duration        // without heartbeat, after which the lease ends

	mu   sync.Mutex
	seen map[string]*lease // of gateways without heartbeat, and of those that are owed something
}

// lease is what is known of a gateway.
type lease struct {
	silent silence
	ended  bool
	asked  time.Time       // when somebody last wanted to know
	owed   map[string]owed // given up, by request
}

type owed struct {
	request wire.Request
	until   time.Time // then nobody wants it any more
}

// newGateways watches with the view of heartbeats, which live for ttl.
func newGateways(s *Stage, view *bus.Instances, length, ttl time.Duration) *gateways {
	if length == 0 {
		length = DefaultLease
	}
	return &gateways{stage: s, alive: view.Alive, silence: max(length-ttl, length/2), seen: make(map[string]*lease)}
}

// admit says whether a message of a request is to be worked on: errHeld or errGivenUp if not.
func (g *gateways) admit(ctx context.Context, req wire.Request) error {
	g.mu.Lock()
	l := g.seen[req.Gateway]
	known := l != nil && !l.ended
	silent := known && l.silent.begun()
	if l != nil {
		l.asked = time.Now()
	}
	g.mu.Unlock()
	ended := false
	switch {
	case l == nil && g.alive(req.Gateway):
		return nil
	case !known: // or it is back just now
		ended, silent = g.probe(ctx, req.Gateway)
	}
	switch {
	case ended:
		if err := g.abandon(ctx, req); err != nil {
			return fmt.Errorf("%w: %w", errHeld, err)
		}
		return errGivenUp
	case silent:
		return errHeld
	}
	return nil
}

// probe looks for a sign of life of a gateway, and reports whether its lease has ended, and whether NATS says that nobody
// listens there.
func (g *gateways) probe(ctx context.Context, id string) (ended, silent bool) {
	var err error
	if !g.alive(id) {
		var c wire.Confirmed
		try, cancel := context.WithTimeout(ctx, probeTimeout)
		err = g.stage.Bus.Ask(try, wire.SubjectConfirm(id), &wire.Confirm{Instance: g.stage.ID}, &c) // of no request
		cancel()
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	l := g.seen[id]
	if l == nil {
		l = &lease{owed: make(map[string]owed), asked: time.Now()}
		g.seen[id] = l
	}
	away := l.silent.after(err, time.Now())
	if err == nil && l.ended {
		l.ended = false
		g.stage.Log.Warn("a gateway is back whose requests were given up", "gateway", id, "requests", len(l.owed))
	}
	if away >= g.silence && !l.ended {
		l.ended = true
		g.stage.Log.Warn("a gateway is gone: giving its requests up", "gateway", id)
	}
	return l.ended, l.silent.begun()
}

// run watches until ctx ends.
func (g *gateways) run(ctx context.Context) {
	tick := time.NewTicker(max(g.silence/10, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		var round sync.WaitGroup
		for id := range g.watched() {
			round.Go(func() { g.look(ctx, id) })
		}
		round.Wait()
	}
}

// watched is the gateways to look at: those without heartbeat that have something in work here, or on the queues, and those
// that are owed something. What it knows of others it forgets.
func (g *gateways) watched() map[string]bool {
	all := g.stage.works.gateways()
	for id := range all {
		if g.alive(id) {
			delete(all, id)
		}
	}
	now := time.Now()
	g.mu.Lock()
	defer g.mu.Unlock()
	for id, l := range g.seen {
		for request, o := range l.owed {
			if now.After(o.until) {
				delete(l.owed, request)
			}
		}
		if !all[id] && len(l.owed) == 0 && (now.Sub(l.asked) > forgetWait || g.alive(id)) {
			delete(g.seen, id)
		} else {
			all[id] = true
		}
	}
	return all
}

// look looks at one gateway and does what follows.
func (g *gateways) look(ctx context.Context, id string) {
	ended, silent := g.probe(ctx, id)
	switch {
	case ended:
		for _, req := range g.stage.works.owned(id) {
			if err := g.abandon(ctx, req); err != nil && ctx.Err() == nil {
				g.stage.Log.Warn("ending a request of a gone gateway; it is tried again", "request", req.ID, "error", err)
			}
		}
	case !silent:
		g.tell(ctx, id)
	}
}

// abandon gives up a request of a gateway whose lease has ended.
func (g *gateways) abandon(ctx context.Context, req wire.Request) error {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	if err := g.stage.giveUp(ctx, req); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if l := g.seen[req.Gateway]; l != nil && len(l.owed) < oweMost {
		l.owed[req.ID] = owed{req, time.Now().Add(req.Left)}
	}
	return nil
}

// tell tells a gateway that is there what was given up while it was not.
func (g *gateways) tell(ctx context.Context, id string) {
	for {
		req, ok := g.next(id)
		if !ok {
			return
		}
		m := &wire.Lost{Request: req.ID, Attempt: req.Attempt, Status: 500, Why: "its gateway was cut off for longer than its lease"}
		try, cancel := context.WithTimeout(ctx, tellTimeout)
		err := g.stage.Bus.Ask(try, wire.SubjectLost(id), m, new(wire.Confirmed))
		cancel()
		if err != nil {
			pause(ctx, oweWait) //nolint:errcheck // the next round tries again, if there is one
			return
		}
		g.mu.Lock()
		if l := g.seen[id]; l != nil && l.owed[req.ID].request.Attempt == req.Attempt {
			delete(l.owed, req.ID)
		}
		g.mu.Unlock()
	}
}

// next is a request that a gateway is to be told of.
func (g *gateways) next(id string) (wire.Request, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if l := g.seen[id]; l != nil {
		for _, o := range l.owed {
			return o.request, true
		}
	}
	return wire.Request{}, false
}

// silence is for how long nobody has listened at a gateway.
type silence struct{ since time.Time } // zero: somebody has, or it is not known

// after takes the outcome of a question at a time and returns for how long NATS has said without a break that nobody listens:
// the gateway's connection has ended. That there is no answer, or no NATS, says nothing of the gateway; after an outage of NATS
// it may only be the later one to be back.
func (s *silence) after(err error, now time.Time) time.Duration {
	switch {
	case !errors.Is(err, nats.ErrNoResponders):
		s.since = time.Time{}
		return 0
	case s.since.IsZero():
		s.since = now
	}
	return now.Sub(s.since)
}

// begun reports whether nobody listened when that was last asked.
func (s *silence) begun() bool { return !s.since.IsZero() }
