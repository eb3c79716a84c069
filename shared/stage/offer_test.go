package stage_test

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/stagetest"
	"trireme.dev/shared/wire"
)

// trader is a decode role that offers what it takes, and bids for what it is offered.
type trader struct {
	*stage.Stage
	to    string      // whom it offers what it takes; "": nobody
	bids  atomic.Bool // whether it bids
	did   atomic.Int32
	begun chan struct{} // if not nil: work begins when it is closed
}

func (w *trader) Close() {}

func (w *trader) Handle(ctx context.Context, d *bus.Delivery) {
	var m wire.Decode
	if err := wire.Unmarshal(d.Data, &m); err != nil {
		panic(err)
	}
	if w.to == "" || !w.Offer(ctx, d, part(m.Request), wire.SubjectOffer(w.to), wire.Offer{}) {
		w.work(ctx, d, &m)
	}
}

func (w *trader) Bid(o *wire.Offer) func(context.Context, *bus.Delivery) {
	var m wire.Decode
	if !w.bids.Load() || wire.Unmarshal(o.Data, &m) != nil {
		return nil
	}
	return func(ctx context.Context, d *bus.Delivery) { w.work(ctx, d, &m) }
}

func (w *trader) work(ctx context.Context, d *bus.Delivery, m *wire.Decode) {
	w.Work(ctx, d, m.Request, m.Choice, func(ctx context.Context, _ *hbm.Claim) error {
		if w.begun != nil {
			select {
			case <-w.begun:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		w.did.Add(1)
		return nil
	})
}

// trade starts a stage that is a trader.
func (r *rig) trade(slots int, w *trader) (*stage.Stage, func()) {
	r.Helper()
	return r.Open(stage.Decode, func(ctx context.Context, s *stage.Stage) error {
		w.Stage = s
		return s.Serve(ctx, stage.Role{Name: stage.Decode, Slots: slots, Start: func(*stage.Stage) (stage.Worker, error) { return w, nil }})
	})
}

// hold takes a message of a new request, as an instance does that then offers it.
func (r *rig) hold() (wire.Request, *bus.Delivery) {
	r.Helper()
	c, err := r.Bus.Consumer(r.Context(), stage.Decode)
	if err != nil {
		r.Fatal(err)
	}
	req := r.publish()
	for {
		got, err := c.Next(r.Context(), 1, time.Second)
		if err != nil {
			r.Fatal(err)
		}
		if len(got) == 1 {
			return req, got[0]
		}
	}
}

// offer offers a message to a stage and reports whether that takes it.
func (r *rig) offer(s *stage.Stage, d *bus.Delivery) bool {
	r.Helper()
	var answer wire.Offered
	o := wire.Offer{Instance: "test", Stage: d.Stage, Data: d.Data, Reply: d.Reply}
	if err := r.Bus.Ask(r.Context(), wire.SubjectOffer(s.ID), &o, &answer); err != nil {
		r.Fatal(err)
	}
	return answer.Taken
}

// An offer that is accepted is the acceptor's to claim and to settle; one that it does not bid for, has no room for, or that
// somebody has claimed since, is refused, and the message is still the offerer's.
func TestOffersAreAccepted(t *testing.T) {
	r := newRig(t, stagetest.Long)
	w := &trader{begun: make(chan struct{})}
	s, stop := r.trade(2, w)
	full := []wire.Request{r.publish(), r.publish()}
	r.Until("it works on both", func() bool { return r.Stats().Claims == 2 })
	req, d := r.hold()
	w.bids.Store(true)
	if r.offer(s, d) {
		t.Error("accepted without room")
	}
	close(w.begun)
	r.Until("it is done with them", func() bool { return w.did.Load() == 2 })
	w.bids.Store(false)
	if r.offer(s, d) {
		t.Error("accepted without a bid")
	}
	w.bids.Store(true)
	r.Until("it accepts", func() bool { return r.offer(s, d) })
	d.Drop()
	r.Until("all are settled", func() bool { return r.Outcomes(s, "done") == 3 })
	r.Empty(stage.Decode)
	if n := r.Offers(s, "accepted"); n != 1 || w.did.Load() != 3 {
		t.Errorf("%d offers accepted, %d messages worked on", n, w.did.Load())
	}
	for _, req := range append(full, req) {
		r.Done(req.ID, -1)
	}
	stop()
	r.NoMemory()
}

// Whoever has no answer works on the message, unless the other one has claimed it: then it is forgotten, and not acked, as the
// other one settles it.
func TestOffersWithoutAnAnswer(t *testing.T) {
	r := newRig(t, stagetest.Long)
	for name, x := range map[string]struct {
		other func(wire.Offer) (answers, taken bool)
		wait  time.Duration // for an answer: those that come may take long, on a busy machine, and so may a claim
		ours  int32         // messages that the offerer works on
		count map[string]int
	}{
		"refused":                   {func(wire.Offer) (bool, bool) { return true, false }, time.Minute, 1, map[string]int{"refused": 1}},
		"accepted":                  {func(wire.Offer) (bool, bool) { return true, true }, time.Minute, 0, map[string]int{"taken": 1}},
		"lost":                      {func(wire.Offer) (bool, bool) { return false, false }, 0, 1, map[string]int{"unanswered": 1}},
		"accepted, the answer lost": {func(wire.Offer) (bool, bool) { return false, true }, 4 * time.Second, 0, map[string]int{"taken": 1}},
	} {
		t.Run(name, func(t *testing.T) {
			var mu sync.Mutex
			var offer wire.Offer
			var claims []*hbm.Claim
			id := "other-" + name[:4]
			sub, err := r.Bus.Handle(wire.SubjectOffer(id), func(data []byte, respond func(any) error) {
				mu.Lock()
				defer mu.Unlock()
				if err := wire.Unmarshal(data, &offer); err != nil {
					t.Error(err)
				}
				answers, taken := x.other(offer)
				if taken {
					var m wire.Decode
					if err := wire.Unmarshal(offer.Data, &m); err != nil {
						t.Error(err)
					}
					k, err := r.HBM.Claim(context.Background(), part(m.Request), offer.Reply)
					if err != nil {
						t.Error(err)
					}
					claims = append(claims, k)
				}
				if answers {
					if err := respond(&wire.Offered{Taken: taken}); err != nil {
						t.Error(err)
					}
				}
			})
			if err != nil {
				t.Fatal(err)
			}
			defer sub.Unsubscribe() //nolint:errcheck // it ends with the connection
			w := &trader{to: id}
			r.Stage.OfferTimeout = x.wait
			s, stop := r.trade(2, w)
			defer stop()
			req := r.publish()
			r.Until("it has offered it", func() bool {
				for outcome, n := range x.count {
					if r.Offers(s, outcome) != n {
						return false
					}
				}
				return true
			})
			if x.ours > 0 {
				r.Until("it is worked on", func() bool { return w.did.Load() == x.ours })
				r.Empty(stage.Decode)
			} else {
				if _, taken := r.Queue(stage.Decode); taken != 1 || w.did.Load() != 0 {
					t.Errorf("%d messages in work, %d done by who has given it away", taken, w.did.Load())
				}
				mu.Lock()
				d := r.Bus.Adopt(stage.Decode, offer.Data, offer.Reply)
				if !claims[0].Held() {
					t.Error("the acceptor's claim was taken away")
				}
				if err := r.HBM.Unclaim(t.Context(), claims[0]); err != nil {
					t.Error(err)
				}
				mu.Unlock()
				if err := d.Ack(t.Context()); err != nil {
					t.Error(err)
				}
				r.Empty(stage.Decode)
			}
			r.Done(req.ID, -1)
			r.NoMemory()
		})
	}
}

// If whoever accepts claims only when the taker has waited in vain, and has looked for a claim too early, both work: the taker is fenced,
// and leaves the message to the other one, which settles it.
func TestBothClaim(t *testing.T) {
	r := newRig(t, stagetest.Long)
	offers := make(chan wire.Offer, 1)
	sub, err := r.Bus.Handle(wire.SubjectOffer("other"), func(data []byte, _ func(any) error) {
		var o wire.Offer
		if err := wire.Unmarshal(data, &o); err != nil {
			t.Error(err)
		}
		offers <- o
	})
	if err != nil {
		t.Fatal(err)
	}
	defer sub.Unsubscribe() //nolint:errcheck // it ends with the connection
	w := &trader{to: "other", begun: make(chan struct{})}
	s, stop := r.trade(2, w)
	defer stop()
	req := r.publish()
	o := <-offers
	r.Until("the taker has claimed it", func() bool { return r.Stats().Claims == 1 })
	claim, err := r.HBM.Claim(t.Context(), part(req), o.Reply)
	if err != nil {
		t.Fatal(err)
	}
	close(w.begun)
	r.Until("the taker leaves it", func() bool { return r.Outcomes(s, "taken over") == 1 })
	if _, taken := r.Queue(stage.Decode); taken != 1 || !claim.Held() {
		t.Errorf("%d messages in work, the claim of the one who accepted is held: %v", taken, claim.Held())
	}
	if err := r.HBM.Unclaim(t.Context(), claim); err != nil {
		t.Error(err)
	}
	if err := r.Bus.Adopt(stage.Decode, o.Data, o.Reply).Ack(t.Context()); err != nil {
		t.Error(err)
	}
	r.Empty(stage.Decode)
	r.gateway.NothingLost()
	r.Done(req.ID, -1)
	r.NoMemory()
}

// An offer that is read late is refused: whoever has made it works by now.
func TestOldOffersAreRefused(t *testing.T) {
	r := newRig(t, stagetest.Long)
	req, d := r.hold()
	claim, err := r.HBM.Claim(t.Context(), part(req), d.Reply)
	if err != nil {
		t.Fatal(err)
	}
	w := &trader{}
	w.bids.Store(true)
	s, stop := r.trade(2, w)
	defer stop()
	if r.offer(s, d) || !claim.Held() {
		t.Error("a message that is worked on was accepted from an old offer")
	}
	if err := r.HBM.Unclaim(t.Context(), claim); err != nil {
		t.Error(err)
	}
	if err := d.Ack(t.Context()); err != nil {
		t.Error(err)
	}
}
