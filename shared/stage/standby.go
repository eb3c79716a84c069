package stage

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/wire"
)

// A standby is an instance without NPUs: it has all its connections, knows its model, and takes no work. It becomes one, or ceases to be
// one, by an operation like any other that changes the NPUs of an instance (scale.go). With the last NPU, what is in work goes to other
// instances as if the process stopped: there must be one for each role.

// standsBy reports whether the instance has no NPUs.
func (s *Stage) standsBy() bool { return setOf(s.NPUs()) == 0 }

// tellReady tells operators that the instance takes work from now on, or stands by.
func (s *Stage) tellReady() {
	if s.standsBy() {
		s.emit(wire.EventStandby, fmt.Sprintf("stands by for %s, without NPUs", s.Model.Name))
		return
	}
	var npus []string
	for _, n := range s.HBM.NPUs() {
		npus = append(npus, strconv.Itoa(n))
	}
	text := fmt.Sprintf("serves %s on NPU %s", s.Model.Name, strings.Join(npus, ", "))
	if _, epoch := s.changes.current(); epoch > 0 { // also of an operation whose process died behind its commit
		text += fmt.Sprintf(", in epoch %d", epoch)
	}
	s.emit(wire.EventReady, text)
}

// survivorsWait bounds the look for other instances.
const survivorsWait = 5 * time.Second

// survivors returns an error if this instance is the last one that could do the work of one of its roles. One whose layout record says
// that it is about to give up its last NPUs does not count. So of two instances that do that at once, each of which has its record say so
// before it looks for the last time, at least one sees the other.
func (s *Stage) survivors(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, survivorsWait)
	defer cancel() // which ends the view
	view, err := s.Bus.Instances(ctx)
	if err != nil {
		return fmt.Errorf("looking for other instances: %w", err)
	}
	mine := s.heartbeat()
	for _, role := range wire.Roles(s.Role) {
		found := false
		for _, i := range view.Role(role) {
			// A sequence never goes on with other kernels.
			if found || i.ID == s.ID || !i.Ready || i.Digest != mine.Digest || i.Kernels != mine.Kernels {
				continue
			}
			l, _, err := s.Bus.Layout(ctx, i.Record())
			switch {
			case errors.Is(err, bus.ErrNoLayout):
				found = !i.Standby
			case err != nil:
				return fmt.Errorf("looking for other instances: %w", err)
			default: // what it has now; its last heartbeat may be from before an operation that has just ended
				found = !l.Empty()
			}
		}
		if !found {
			return fmt.Errorf("no other instance with NPUs could %s: give a standby some first (trireme scale NAME 1), or start another "+
				"instance (trireme scale … --replicas)", role)
		}
	}
	return nil
}

// errHandedOver is why work ends that another instance is to go on with.
var errHandedOver = errors.New("the instance gives up its last NPU")

// handOver takes nothing more, has what is in work go on elsewhere, and returns when nothing is left: as a process does that is to stop,
// roles that Finish have Config.Drain for it. When ctx ends before, work is taken again; what has gone stays where it is. Nothing is
// taken until takeAgain.
func (s *Stage) handOver(ctx context.Context) (err error) {
	s.load.doors(true)
	s.makeRoom()
	takers := s.offers.all()
	for _, t := range takers {
		if !t.role.Finish {
			t.close(errHandedOver)
		}
	}
	defer func() {
		for _, t := range takers {
			t.open()
		}
		if err != nil {
			s.takeAgain()
		}
	}()
	late := time.NewTimer(max(0, s.drainWait))
	defer late.Stop()
	tick := time.NewTicker(busyWait)
	defer tick.Stop()
	for s.load.running() > 0 {
		select {
		case <-tick.C:
		case <-late.C:
			for _, t := range takers {
				t.close(errHandedOver)
			}
		case <-ctx.Done():
			return fmt.Errorf("handing over what is in work, of which %d pictures, prompts and sequences are left: %w", s.load.running(),
				context.Cause(ctx))
		}
	}
	return nil
}

// takeAgain ends what handOver has begun: work is taken as far as there are NPUs.
func (s *Stage) takeAgain() {
	s.load.doors(false)
	s.makeRoom()
}

// all are the roles that take messages.
func (o *offers) all() (takers []*taker) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, t := range o.takers {
		takers = append(takers, t)
	}
	return takers
}

// openOffers are the subscriptions to what is offered to any instance of the node: to those that take work.
type openOffers struct {
	mu        sync.Mutex
	subscribe func() ([]*nats.Subscription, error) // nil: not begun, or ended
	subs      []*nats.Subscription
}

// begin has subscribe be what listen calls.
func (o *openOffers) begin(subscribe func() ([]*nats.Subscription, error)) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.subscribe = subscribe
}

// listen sets whether such offers come here.
func (o *openOffers) listen(on bool) (err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case on && len(o.subs) == 0 && o.subscribe != nil:
		o.subs, err = o.subscribe()
	case !on:
		o.leave()
	}
	return err
}

// end is listen(false) for good.
func (o *openOffers) end() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.subscribe = nil
	o.leave()
}

func (o *openOffers) leave() {
	for _, sub := range o.subs {
		_ = sub.Unsubscribe() // it ends with the connection at the latest
	}
	o.subs = nil
}
