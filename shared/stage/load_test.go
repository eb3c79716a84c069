package stage_test

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/sched"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/stagetest"
	"trireme.dev/shared/wire"
)

// takers are stages that keep what they take until they are let go; it counts who has taken what.
type takers struct {
	*rig
	mu    sync.Mutex
	taken map[string]int // by stage, so far
	goOn  map[string]chan struct{}
}

func newTakers(t *testing.T) *takers {
	return &takers{rig: newRig(t, stagetest.Long), taken: map[string]int{}, goOn: map[string]chan struct{}{}}
}

// start starts a stage that has the roles.
func (k *takers) start(name string, roles ...stage.Role) (*stage.Stage, func()) {
	goOn := make(chan struct{})
	k.goOn[name] = goOn
	var names []string
	for _, r := range roles {
		names = append(names, r.Name)
	}
	return k.Open(strings.Join(names, "+"), func(ctx context.Context, s *stage.Stage) error {
		start := func(s *stage.Stage) (stage.Worker, error) {
			return worker(func(ctx context.Context, d *bus.Delivery) {
				var m wire.Prefill // on all queues here
				if err := wire.Unmarshal(d.Data, &m); err != nil {
					k.Error(err)
				}
				s.Work(ctx, d, m.Request, 0, func(ctx context.Context, _ *hbm.Claim) error {
					k.mu.Lock()
					k.taken[name]++
					k.mu.Unlock()
					select {
					case <-goOn:
						return nil
					case <-ctx.Done():
						return ctx.Err()
					}
				})
			}), nil
		}
		for i := range roles {
			roles[i].Start = start
		}
		return s.Serve(ctx, roles...)
	})
}

func (k *takers) all() (n int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, taken := range k.taken {
		n += taken
	}
	return n
}

func (k *takers) of(name string) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.taken[name]
}

// asks counts how often stages ask for messages of a queue at a level, from now on.
func (k *takers) asks(queue string, level int) *atomic.Int64 {
	k.Helper()
	n := new(atomic.Int64)
	sub, err := k.Bus.Conn().Subscribe("$JS.API.CONSUMER.MSG.NEXT.TRIREME_"+strings.ToUpper(queue)+".*", func(m *nats.Msg) {
		var ask struct{ Priority int }
		if json.Unmarshal(m.Data, &ask) == nil && ask.Priority == level {
			n.Add(1)
		}
	})
	if err == nil {
		err = k.Bus.Conn().FlushTimeout(time.Minute)
	}
	if err != nil {
		k.Fatal(err)
	}
	k.Cleanup(func() { _ = sub.Unsubscribe() })
	return n
}

// publish puts n messages on a queue, one after the other as they are taken, each when both stages ask for it.
func (k *takers) publish(queue string, n int) {
	k.Helper()
	for range n {
		k.Until("all ask", func() bool {
			all, err := k.Bus.Queues(k.Context())
			i := slices.IndexFunc(all, func(q bus.Queue) bool { return q.Stage == queue })
			return err == nil && all[i].Waiting >= len(k.goOn)
		})
		before := k.all()
		req := k.Request(k.gateway.ID)
		k.Publish(queue, req.ID, &wire.Prefill{Request: req})
		k.Until("it is taken", func() bool { return k.all() == before+1 })
	}
}

// Work goes to the instance that has the least of it: evenly where all are alike, and past one that is busy although it has room
// and has asked first.
func TestIdleTakesFirst(t *testing.T) {
	k := newTakers(t)
	prompts := stage.Role{Name: stage.Prefill, Slots: 32}
	_, stopA := k.start("a", prompts)
	defer stopA()
	other, stopB := k.start("b", prompts)
	defer stopB()
	k.publish(stage.Prefill, 8)
	if a, b := k.of("a"), k.of("b"); a != 4 || b != 4 {
		t.Errorf("of 8 prompts one has %d, the other %d", a, b)
	}
	idle := k.asks(stage.Prefill, sched.Load{}.LevelToCompute(false)) // of the other one: this one is busy from now on
	asked := idle.Load()
	close(k.goOn["b"]) // from now on it works at once
	for range 24 {
		k.Until("the idle one has nothing in work, and has asked since", func() bool {
			return other.LoadWithout("") == sched.Load{} && idle.Load() > asked
		})
		asked = idle.Load()
		k.publish(stage.Prefill, 1)
	}
	if a := k.of("a") - 4; a > 0 { // in turns it would have been 12
		t.Errorf("%d of 24 prompts went to an instance that was busy while another one was idle", a)
	}
	close(k.goOn["a"])
}

// Of idle instances the one that does the next stage, too, is given a picture or a prompt: nothing has to travel. When it has anything
// in work, one for the stage alone is.
func TestOnwardTakesFirst(t *testing.T) {
	for _, queue := range []string{stage.Encode, stage.Prefill} {
		k := newTakers(t)
		role := func(name string) stage.Role { return stage.Role{Name: name, Slots: 2} }
		_, stopA := k.start("alone", role(queue))
		_, stopB := k.start("whole", role(stage.Encode), role(stage.Prefill), role(stage.Decode))
		k.publish(queue, 1)
		if k.of("whole") != 1 {
			t.Errorf("a message for %s went to an instance that does nothing else with it", queue)
		}
		k.publish(queue, 1)
		if k.of("alone") != 1 {
			t.Errorf("the second message for %s went to the busy one", queue)
		}
		for _, c := range k.goOn {
			close(c)
		}
		k.Empty(queue)
		stopA()
		stopB()
	}
}

// A role that is held takes nothing beside what it has, however much room there is, and goes on when it is held no more.
func TestHold(t *testing.T) {
	k := newTakers(t)
	s, stop := k.start("a", stage.Role{Name: stage.Encode, Slots: 4, Late: true})
	defer stop()
	k.publish(stage.Encode, 1)
	for range 2 {
		req := k.Request(k.gateway.ID)
		k.Publish(stage.Encode, req.ID, &wire.Prefill{Request: req})
	}
	for want := 1; want <= 3; want++ {
		k.Until("it asks for no more", func() bool {
			q, err := k.Bus.Queues(t.Context())
			return err == nil && q[0].Waiting == 0
		})
		if n := k.of("a"); n != want {
			t.Fatalf("it has taken %d messages, want %d", n, want)
		}
		if want < 3 {
			s.Hold(stage.Encode, false)
			k.Until("it takes the next", func() bool { return k.of("a") == want+1 })
		}
	}
	close(k.goOn["a"])
}
