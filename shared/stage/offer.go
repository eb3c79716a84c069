package stage

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/sched"
	"trireme.dev/shared/wire"
)

// Whoever takes a message may offer it to an instance that has what the work needs in its memory (sched.Routing says when). Who
// accepts claims and settles it as if it had come from the queue; the taker, who has not claimed it, forgets it. What can go wrong
// ends like this:
//
//	the offer is lost, or the other one dies before it answers   the taker gets no answer, finds nobody's claim, and works
//	the answer is lost                                           the taker finds the other's claim, and forgets the message; if it
//	                                                             looks too early both claim, and the first of them is fenced
//	the offer is read late, the taker has given up               it is refused: the part is claimed
//	the other one dies once it has accepted                      its claim is an orphan, or the message a stray
//	the taker dies                                               no matter to the one who has accepted; else the message is a stray
//
// What was handed back once is not offered: it goes to whoever is idle.

const (
	// DefaultOfferWait is the Config.OfferWait of 0.
	DefaultOfferWait = 500 * time.Millisecond
	// DefaultOfferTimeout is the Config.OfferTimeout of 0. Who does not answer is offered nothing for silentWait.
	DefaultOfferTimeout = 20 * time.Millisecond
	silentWait          = time.Second
	// offerLeast is what an offer has to gain: it takes a question and an answer over NATS, which a busy machine makes long.
	offerLeast = 2 * time.Millisecond
)

// Bidder is a Worker that takes messages of its queue that others offer.
type Bidder interface {
	Worker
	// Bid decides on an offer, soon. It returns how the message is handled, in place of Handle, or nil to refuse it.
	Bid(*wire.Offer) func(context.Context, *bus.Delivery)
}

// Outcomes of offers, as they are counted.
const (
	offerTaken    = "taken"
	offerRefused  = "refused"
	offerSilent   = "unanswered"
	offerAccepted = "accepted" // another's
)

// offers is what a process offers to others and takes from them.
type offers struct {
	routing sched.Routing
	timeout time.Duration // for an answer

	mu     sync.Mutex
	takers map[string]*taker    // by role, while it takes messages
	silent map[string]time.Time // until when those who did not answer are offered nothing, by subject
	open   openOffers           // those to any instance of the node
	nodes  int                  // that answered when they were last waited for
	waited time.Time            // when that was
}

// taker is a role that takes messages.
type taker struct {
	role    Role
	handle  func(context.Context, *bus.Delivery)
	worker  Worker
	life    context.Context // of work
	working *sync.WaitGroup

	mu    sync.Mutex
	shift context.Context // of the work that begins now: ends with life, or when it is to be handed over
	end   context.CancelCauseFunc
}

// open begins another shift.
func (t *taker) open() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.shift, t.end = context.WithCancelCause(t.life)
}

// close ends the shift: what is in work is handed back.
func (t *taker) close(why error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.end(why)
}

// begin has a message handled, on a goroutine of its own, if there is room for it; d gives it then.
func (t *taker) begin(s *Stage, handle func(context.Context, *bus.Delivery), d func() *bus.Delivery) bool {
	if !s.load.take(t.role) {
		return false
	}
	message := d()
	t.mu.Lock()
	defer t.mu.Unlock()
	shift := t.shift
	t.working.Go(func() {
		defer s.load.drop(t.role.Name)
		handle(shift, message)
	})
	return true
}

// Routing is how this process offers work to others.
func (s *Stage) Routing() sched.Routing { return s.offers.routing }

// Offers reports whether work may be offered to others at all.
func (s *Stage) Offers() bool { return s.offers.routing.Limit > 0 }

// Travels reports whether what work needs has to be copied between instances of this node.
func (s *Stage) Travels() bool { return s.HBM.Domains() > 1 }

// Offer offers a message that was just taken off the queue to those who listen at a subject, wire.SubjectOffer or SubjectNodeOffer,
// within the bounds that o has, and reports whether one has it now: the caller then forgets it. part is what whoever works on it
// claims.
func (s *Stage) Offer(ctx context.Context, d *bus.Delivery, part hbm.Part, to string, o wire.Offer) bool {
	if s.offers.isSilent(to, time.Now()) {
		return false
	}
	o.Instance, o.Stage, o.Data, o.Reply = s.ID, d.Stage, d.Data, d.Reply
	try, cancel := context.WithTimeout(ctx, s.offers.timeout)
	defer cancel()
	var answer wire.Offered
	err := s.Bus.Ask(try, to, &o, &answer)
	outcome := offerRefused
	switch {
	case err == nil && answer.Taken:
		outcome = offerTaken
	case err == nil, errors.Is(err, nats.ErrNoResponders), errors.Is(err, wire.ErrTooLarge):
	default:
		s.offers.hush(to, time.Now().Add(silentWait))
		if outcome = offerSilent; s.claimed(ctx, part) {
			outcome = offerTaken
		}
	}
	s.Metrics.Offers.WithLabelValues(d.Stage, outcome).Inc()
	if outcome != offerTaken {
		return false
	}
	d.Drop()
	return true
}

const (
	// reachTimeout bounds the wait for HMMs that may answer, and reachAgain how long it is relied on that there are no more than
	// have answered then.
	reachTimeout = 5 * time.Millisecond
	reachAgain   = 10 * time.Second
)

// Reach asks the HMMs of the other nodes how many of the first keys they have blocks of, and returns the node that has most.
func (s *Stage) Reach(ctx context.Context, role string, keys []hbm.Key) (node string, count int) {
	q := wire.Reach{Role: role}
	for i := range keys {
		q.Keys = append(q.Keys, keys[i][:])
	}
	expected, again := s.offers.expect(time.Now())
	ctx, cancel := context.WithTimeout(ctx, max(reachTimeout, s.offers.timeout/4))
	defer cancel()
	answers := 0
	err := s.Bus.AskAll(ctx, wire.SubjectReach, &q, func(data []byte) bool {
		var r wire.Reached
		if wire.Unmarshal(data, &r) == nil {
			answers++
			if r.Node != s.HBM.Node() && r.Count > count {
				node, count = r.Node, r.Count
			}
		}
		return again || answers < expected
	})
	if err != nil {
		s.Log.Debug("asking other nodes for a prompt", "error", err)
	}
	if again {
		s.offers.seen(answers)
	}
	return node, count
}

// expect is how many HMMs are going to answer, or, again, that this is to be found out.
func (o *offers) expect(now time.Time) (nodes int, again bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if again = now.Sub(o.waited) > reachAgain; again {
		o.waited = now
	}
	return o.nodes, again || o.nodes == 0
}

func (o *offers) seen(nodes int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.nodes = nodes
}

// claimed reports whether somebody on this node is known to have claimed a part.
func (s *Stage) claimed(ctx context.Context, part hbm.Part) bool {
	open, err := s.HBM.Unclaimed(ctx, []hbm.Part{part})
	return err == nil && len(open) == 0
}

func (o *offers) isSilent(to string, now time.Time) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	until, ok := o.silent[to]
	if ok && now.After(until) {
		delete(o.silent, to)
		return false
	}
	return ok
}

func (o *offers) hush(to string, until time.Time) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.silent == nil {
		o.silent = make(map[string]time.Time)
	}
	o.silent[to] = until
}

// take notes that a role takes messages, also those that others offer, until the returned function is called.
func (o *offers) take(t *taker) (end func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.takers == nil {
		o.takers = make(map[string]*taker)
	}
	o.takers[t.role.Name] = t
	return func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		delete(o.takers, t.role.Name)
	}
}

// offered considers another instance's offer and answers it. While it is considered, the process goes on taking messages.
func (s *Stage) offered(ctx context.Context, data []byte, respond func(any) error) {
	var o wire.Offer
	if err := wire.Unmarshal(data, &o); err != nil {
		s.Log.Warn("ignoring an offer", "error", err)
		return
	}
	taken := s.accept(ctx, &o)
	if taken {
		s.Metrics.Offers.WithLabelValues(o.Stage, offerAccepted).Inc()
	}
	if err := respond(&wire.Offered{Taken: taken}); err != nil {
		s.Log.Debug("answering an offer", "instance", o.Instance, "error", err) // who has no answer looks for the claim
	}
}

// accept takes an offered message if there is room for it, nobody has it yet, and its role bids for it.
func (s *Stage) accept(ctx context.Context, o *wire.Offer) bool {
	if s.gate.suspects.Load() > 0 || s.short.any() { // it takes no messages, or has no memory
		return false
	}
	part, err := partOf(o.Stage, o.Data)
	if err != nil {
		s.Log.Warn("ignoring an offer", "error", err)
		return false
	}
	part.Left = 0
	ctx, cancel := context.WithTimeout(ctx, s.offers.timeout)
	defer cancel()
	if open, err := s.HBM.Unclaimed(ctx, []hbm.Part{part}); err != nil || len(open) == 0 {
		return false // it is an old offer
	}
	s.offers.mu.Lock()
	defer s.offers.mu.Unlock() // until it has begun: the role may be about to take no more
	t := s.offers.takers[o.Stage]
	if t == nil {
		return false
	}
	bidder, ok := t.worker.(Bidder)
	if !ok {
		return false
	}
	if s.load.full(o.Stage) {
		return false
	}
	handle := bidder.Bid(o)
	return handle != nil && t.begin(s, handle, func() *bus.Delivery {
		return s.Bus.Adopt(o.Stage, o.Data, o.Reply)
	})
}

// LoadWithout is what the process has in work, without what it has for one request: that is about to be done, or offered.
func (s *Stage) LoadWithout(request string) sched.Load {
	own := s.works.load(request)
	s.load.mu.Lock()
	defer s.load.mu.Unlock()
	return s.load.work.Without(own)
}

// Sites sorts out who could do a piece of work: how long it takes here until all that it needs is at hand, on the NPU where that
// is soonest, and on each NPU of the other instances; to is where these are offered it.
func (s *Stage) Sites(at *hbm.Located, ready func(*hbm.Site) time.Duration) (
	own time.Duration, others []time.Duration, to []string,
) {
	own = sched.Never
	for i := range at.Sites {
		site := &at.Sites[i]
		if r := ready(site); site.Instance == s.ID {
			own = min(own, r)
		} else {
			others, to = append(others, r), append(to, wire.SubjectOffer(site.Instance))
		}
	}
	return own, others, to
}
