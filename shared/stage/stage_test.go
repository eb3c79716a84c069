package stage_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/services/hmm"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/leaktest"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/stagetest"
	"trireme.dev/shared/wire"
)

func TestMain(m *testing.M) {
	stagetest.Child("", nil)
	leaktest.VerifyTestMain(m)
}

func serveHMM(ctx context.Context, socket string, conn *nats.Conn, log *slog.Logger) error {
	return hmm.Run(ctx, hmm.Config{Socket: socket, Node: "n", NPUs: 4, NPUBytes: 1 << 20, HostBytes: 1 << 20, NATS: conn}, log)
}

type rig struct {
	*stagetest.Rig
	*testing.T
	gateway *stagetest.Gateway
}

func newRig(t *testing.T, ackWait time.Duration) *rig {
	t.Helper()
	r := &rig{Rig: stagetest.New(t, serveHMM, ackWait), T: t}
	r.gateway = r.Gateway()
	return r
}

// worker is a role that computes nothing.
type worker func(context.Context, *bus.Delivery)

func (w worker) Handle(ctx context.Context, d *bus.Delivery) { w(ctx, d) }

func (w worker) Close() {}

// role is a role whose messages handle gets.
func role(name string, slots int, handle func(context.Context, *bus.Delivery)) stage.Role {
	return stage.Role{Name: name, Slots: slots, Start: func(*stage.Stage) (stage.Worker, error) {
		return worker(handle), nil
	}}
}

// stage starts a decode stage whose work on a message is do; it claims and settles.
func (r *rig) stage(do func(ctx context.Context, s *stage.Stage, req wire.Request, claim *hbm.Claim) error) (*stage.Stage, func()) {
	r.Helper()
	return r.Open(stage.Decode, func(ctx context.Context, s *stage.Stage) error {
		return s.Serve(ctx, role(stage.Decode, 2, func(ctx context.Context, d *bus.Delivery) {
			var m wire.Decode
			if err := wire.Unmarshal(d.Data, &m); err != nil {
				r.Error(err)
			}
			s.Work(ctx, d, m.Request, m.Choice, func(ctx context.Context, claim *hbm.Claim) error { return do(ctx, s, m.Request, claim) })
		}))
	})
}

func part(req wire.Request) hbm.Part {
	return hbm.Part{Request: req.ID, Attempt: req.Attempt, Stage: stage.Decode, Left: req.Left}
}

// publish puts a message of a new request on the queue.
func (r *rig) publish() wire.Request {
	r.Helper()
	req := r.Request(r.gateway.ID)
	r.Publish(stage.Decode, req.ID, &wire.Decode{Request: req})
	return req
}

// Every way in which work can end, with the claim still held, and what becomes of the message.
func TestSettle(t *testing.T) {
	r := newRig(t, stagetest.Long)
	fault := &stage.Fault{Status: 400, Param: "messages", Err: errors.New("bad picture")}
	for name, x := range map[string]struct {
		err     error // of the first try; later ones succeed
		outcome string
		tries   int32
		lost    *wire.Lost
	}{
		"done":               {nil, "done", 1, nil},
		"ended":              {fmt.Errorf("attaching: %w", mem.ErrEnded), "ended", 1, nil},
		"no memory":          {fmt.Errorf("allocating: %w", mem.ErrExhausted), "no memory", 2, nil},
		"old writer":         {fmt.Errorf("appending: %w", mem.ErrFenced), "again", 2, nil},
		"HMM is lost":        {fmt.Errorf("attaching: %w", mem.ErrLost), "handed back", 2, nil},
		"wrong bytes":        {fmt.Errorf("reading: %w", mem.ErrCorrupt), "lost", 1, &wire.Lost{Attempt: 1, Status: 500}},
		"gives up":           {fmt.Errorf("growing: %w", stage.ErrNoRoom), "no room", 1, &wire.Lost{Attempt: 1, Status: 500, NoRoom: true}},
		"client fault":       {fmt.Errorf("reading: %w", fault), "lost", 1, &wire.Lost{Attempt: 1, Final: true, Status: 400, Param: "messages"}},
		"others lack memory": {fmt.Errorf("allocating: %w", mem.ErrExhausted), "no room", 1, &wire.Lost{Attempt: 1, Status: 500, NoRoom: true}},
	} {
		t.Run(name, func(t *testing.T) {
			var tries atomic.Int32
			s, stop := r.stage(func(context.Context, *stage.Stage, wire.Request, *hbm.Claim) error {
				if tries.Add(1) == 1 {
					return x.err
				}
				return nil
			})
			defer stop()
			if name == "others lack memory" {
				s.Short("another", true)
			}
			r.gateway = r.Gateway()
			req := r.publish()
			r.Until("it is settled", func() bool { return tries.Load() == x.tries })
			r.Empty(stage.Decode)
			if r.Outcomes(s, x.outcome) != 1 {
				t.Errorf("not settled as %q", x.outcome)
			}
			if x.lost == nil {
				r.gateway.NothingLost()
			} else {
				want := *x.lost
				want.Stage = stage.Decode
				want.Request, want.Why = req.ID, x.err.Error()
				if got := r.gateway.Lost(1)[0]; got != want {
					t.Errorf("gateway was told %+v, want %+v", got, want)
				}
			}
			r.Done(req.ID, -1)
			r.NoMemory()
		})
	}
}

// When the claim is not held any more, what took it away counts, and not how the work ended: a later claim keeps the
// message; an end of the request or of the attempt makes it go.
func TestSettleWithoutTheClaim(t *testing.T) {
	r := newRig(t, stagetest.Short)
	later := func(s *stage.Stage, req wire.Request) error {
		_, err := r.HBM.Claim(context.Background(), part(req), "nowhere")
		return err
	}
	laterAndGone := func(s *stage.Stage, req wire.Request) error {
		claim, err := r.HBM.Claim(context.Background(), part(req), "nowhere")
		return errors.Join(err, r.HBM.Unclaim(context.Background(), claim))
	}
	attempt := func(s *stage.Stage, req wire.Request) error {
		p := part(req)
		p.Attempt++
		_, err := r.HBM.Claim(context.Background(), p, "nowhere")
		return err
	}
	end := func(s *stage.Stage, req wire.Request) error { return s.HBM.End(context.Background(), req.ID) }
	for name, x := range map[string]struct {
		lose    func(*stage.Stage, wire.Request) error
		err     error
		outcome string
		tries   int32
	}{
		"later claim":                 {later, nil, "taken over", 2},
		"later claim, after an error": {later, mem.ErrCorrupt, "taken over", 2},
		"later claim, given up":       {laterAndGone, nil, "taken over", 2},
		"request ended":               {end, mem.ErrFenced, "ended", 1},
		"request ended, with error":   {end, mem.ErrGone, "ended", 1},
		"newer attempt":               {attempt, mem.ErrFenced, "ended", 1},
	} {
		t.Run(name, func(t *testing.T) {
			var tries atomic.Int32
			s, stop := r.stage(func(_ context.Context, s *stage.Stage, req wire.Request, _ *hbm.Claim) error {
				if tries.Add(1) > 1 {
					return nil // after AckWait
				}
				if err := x.lose(s, req); err != nil {
					t.Error(err)
				}
				return x.err
			})
			defer stop()
			req := r.publish()
			r.Until("it is settled", func() bool { return r.Outcomes(s, x.outcome) == 1 })
			if _, taken := r.Queue(stage.Decode); x.tries == 2 && taken != 1 && tries.Load() == 1 {
				t.Errorf("%d messages in work after a takeover", taken)
			}
			r.Empty(stage.Decode)
			if tries.Load() != x.tries {
				t.Errorf("%d tries, want %d", tries.Load(), x.tries)
			}
			r.gateway.NothingLost()
			r.Done(req.ID, -1)
			r.NoMemory()
		})
	}
}

// A gateway that does not hear that an attempt is lost, as the word is, is told again, and the message is there until it knows.
func TestLostIsHeard(t *testing.T) {
	r := newRig(t, stagetest.Long)
	r.Stage.Lease = 200 * time.Millisecond
	r.gateway.Set(func() { r.gateway.Unheard = 1 })
	s, _ := r.stage(func(context.Context, *stage.Stage, wire.Request, *hbm.Claim) error { return mem.ErrCorrupt })
	req := r.publish()
	if got := r.gateway.Lost(1)[0]; got.Request != req.ID {
		t.Errorf("the gateway was told %+v", got)
	}
	r.Empty(stage.Decode)
	if r.Outcomes(s, "lost") != 1 {
		t.Error("not settled as lost")
	}
	// One that is gone need not know: its requests are given up.
	r.gateway.Leave()
	r.publish()
	r.Until("it is settled", func() bool { return r.Outcomes(s, "ended") == 1 })
	r.Empty(stage.Decode)
}

// Nobody works once more on what has ended since: a message that comes again is for a request that its gateway still has. An HMM
// that has started since does not learn of the request by it.
func TestEndedBeforeItComesAgain(t *testing.T) {
	r := newRig(t, stagetest.Long)
	var tries atomic.Int32
	s, _ := r.stage(func(context.Context, *stage.Stage, wire.Request, *hbm.Claim) error {
		if tries.Add(1) == 1 {
			return mem.ErrFenced // it comes again, to somebody
		}
		r.gateway.Set(func() { r.gateway.Without = true })
		return mem.ErrFenced
	})
	r.publish()
	r.Until("it is settled", func() bool { return r.Outcomes(s, "ended") == 1 })
	r.Empty(stage.Decode)
	if tries.Load() != 2 {
		t.Errorf("worked on %d times, want twice", tries.Load())
	}
	r.NoRequest()
}

// A stage that is told to stop waits for its handlers and hands back what they have not finished.
func TestServeStopsInOrder(t *testing.T) {
	r := newRig(t, stagetest.Long)
	entered := make(chan struct{}, 8)
	var returned atomic.Int32
	s, stop := r.stage(func(ctx context.Context, _ *stage.Stage, _ wire.Request, _ *hbm.Claim) error {
		entered <- struct{}{}
		<-ctx.Done()
		returned.Add(1)
		return ctx.Err()
	})
	for range 3 {
		r.publish()
	}
	<-entered
	<-entered
	instances, err := r.Bus.Instances(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r.Until("its heartbeat says what it does", func() bool {
		all := instances.Role(stage.Decode)
		return len(all) == 1 && all[0].ID == s.ID && all[0].Ready && all[0].Running == 2 && all[0].Node == "n" &&
			slices.Equal(all[0].NPUs, []int{s.NPUs()[0].Number})
	})
	r.Until("with 2 slots 2 messages are in work and 1 waits", func() bool {
		waiting, taken := r.Queue(stage.Decode)
		return waiting == 1 && taken == 2
	})
	stop()
	r.Until("its heartbeat is gone", func() bool { return len(instances.Role(stage.Decode)) == 0 })
	if returned.Load() != 2 || r.Outcomes(s, "handed back") != 2 || s.Ready() {
		t.Errorf("%d handlers returned, %d messages handed back", returned.Load(), r.Outcomes(s, "handed back"))
	}
	var tries atomic.Int32
	r.stage(func(context.Context, *stage.Stage, wire.Request, *hbm.Claim) error { tries.Add(1); return nil })
	r.Empty(stage.Decode)
	if tries.Load() != 3 {
		t.Errorf("%d messages came to the next stage", tries.Load())
	}
}

// A stage that loses the HMM ends with an error, and its handlers' contexts end.
func TestServeEndsWithoutTheHMM(t *testing.T) {
	r := newRig(t, stagetest.Long)
	s, err := stage.Open(t.Context(), stage.Decode, r.Stage, r.Rig.Log)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	entered := make(chan struct{})
	ended := make(chan error, 1)
	go func() {
		// With one place it asks for no more meanwhile, and is not given the message that it hands back.
		ended <- s.Serve(t.Context(), role(stage.Decode, 1, func(ctx context.Context, d *bus.Delivery) {
			close(entered)
			<-ctx.Done()
			s.Settle(ctx, d, wire.Request{}, nil, ctx.Err())
		}))
	}()
	r.publish()
	<-entered
	r.StopHMM()
	if err := <-ended; !errors.Is(err, mem.ErrLost) {
		t.Errorf("Serve returned %v", err)
	}
	if n := r.Outcomes(s, "handed back"); n != 1 {
		t.Errorf("%d messages handed back", n)
	}
	// It is still there, whichever way NATS counts it.
	if waiting, taken := r.Queue(stage.Decode); waiting+taken != 1 {
		t.Errorf("%d messages wait, %d are taken", waiting, taken)
	}
}

// take takes n messages as an instance that dies when its client is closed.
func (r *rig) take(n int) *hbm.Client {
	r.Helper()
	client, err := hbm.Dial(r.Context(), r.Stage.HMM, hbm.Hello{Instance: "dying", Role: stage.Decode})
	if err != nil {
		r.Fatal(err)
	}
	consumer, err := r.Bus.Consumer(r.Context(), stage.Decode)
	if err != nil {
		r.Fatal(err)
	}
	for taken := 0; taken < n; {
		got, err := consumer.Next(r.Context(), n-taken, time.Second)
		if err != nil {
			r.Fatal(err)
		}
		for _, d := range got {
			var m wire.Decode
			if err := wire.Unmarshal(d.Data, &m); err != nil {
				r.Fatal(err)
			}
			if _, err := client.Claim(r.Context(), part(m.Request), d.Reply); err != nil {
				r.Fatal(err)
			}
			d.Drop()
		}
		taken += len(got)
	}
	return client
}

// What a gone instance had claimed comes to a sibling at once, and once, although all siblings are told; so does what
// was left before a stage starts.
func TestTakeOver(t *testing.T) {
	const messages = 4
	for name, siblings := range map[string]bool{"siblings": true, "next to start": false} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, stagetest.Long)
			for range messages {
				r.publish()
			}
			dying := r.take(messages)
			var tries atomic.Int32
			gate := make(chan struct{}) // so that a message that came twice would meet itself
			work := func(context.Context, *stage.Stage, wire.Request, *hbm.Claim) error { tries.Add(1); <-gate; return nil }
			start := func() {
				r.stage(work)
				r.stage(work)
			}
			if siblings {
				start()
			}
			if err := dying.Close(); err != nil {
				t.Fatal(err)
			}
			if !siblings {
				start()
			}
			r.Until("all are in work", func() bool { return tries.Load() == messages })
			if o, err := r.HBM.Orphans(t.Context(), stage.Decode); err != nil || len(o) > 0 {
				t.Errorf("orphans that nobody took: %v, %v", o, err)
			}
			close(gate)
			r.Empty(stage.Decode)
			if n := tries.Load(); n != messages {
				t.Errorf("%d messages were worked on %d times", messages, n)
			}
		})
	}
}

// A message that an instance had taken and not yet claimed when it died goes to the next instance at once; one that somebody
// has claimed does not, and one whose request has ended leaves the queue.
func TestStraysAreHandedBack(t *testing.T) {
	r := newRig(t, stagetest.Long)
	stray, claimed, over := r.Request(r.gateway.ID), r.Request(r.gateway.ID), r.Request(r.gateway.ID)
	for _, req := range []wire.Request{stray, claimed, over} {
		r.Publish(stage.Decode, req.ID, &wire.Decode{Request: req})
	}
	c, err := r.Bus.Consumer(t.Context(), stage.Decode)
	if err != nil {
		t.Fatal(err)
	}
	replies := map[string]string{}
	for len(replies) < 3 {
		taken, err := c.Next(t.Context(), 3, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range taken {
			var m wire.Decode
			if err := wire.Unmarshal(d.Data, &m); err != nil {
				t.Fatal(err)
			}
			replies[m.Request.ID] = d.Reply
			d.Drop() // as one that dies
		}
	}
	k, err := r.HBM.Claim(t.Context(), part(claimed), replies[claimed.ID])
	if err != nil {
		t.Fatal(err)
	}
	if err := r.HBM.End(t.Context(), over.ID); err != nil {
		t.Fatal(err)
	}
	var worked atomic.Value
	s, _ := r.stage(func(_ context.Context, _ *stage.Stage, req wire.Request, _ *hbm.Claim) error {
		if old := worked.Swap(req.ID); old != nil {
			t.Errorf("worked on %v, then on %s", old, req.ID)
		}
		return nil
	})
	r.Until("two messages are settled", func() bool { return r.Outcomes(s, "done") == 1 && r.Outcomes(s, "ended") == 1 })
	if worked.Load() != stray.ID || !k.Held() {
		t.Errorf("worked on %v, want %s; the other claim holds: %v", worked.Load(), stray.ID, k.Held())
	}
	r.Until("the server has the two acks: only the claimed message is left", func() bool {
		waiting, taken := r.Queue(stage.Decode)
		return waiting+taken == 1
	})
	if gone, err := r.HBM.Gone(t.Context(), stage.Decode); gone || err != nil {
		t.Errorf("the stage has looked, and another one is to look again: %v, %v", gone, err)
	}
	other, err := hbm.Dial(t.Context(), r.Stage.HMM, hbm.Hello{Instance: "other", Role: "encode+prefill"})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []bool{true, false} {
		if gone, err := r.HBM.Gone(t.Context(), stage.Encode); gone != want || err != nil {
			t.Errorf("gone: %v, %v, want %v", gone, err, want)
		}
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	for _, role := range []string{stage.Encode, stage.Prefill} {
		if gone, err := r.HBM.Gone(t.Context(), role); !gone || err != nil {
			t.Errorf("after an encoder and prefill has gone: %s: %v, %v", role, gone, err)
		}
	}
	r.Done(claimed.ID, -1)
}

// Done events are remembered for a request and for a choice of it.
func TestEnded(t *testing.T) {
	r := newRig(t, stagetest.Long)
	s, _ := r.stage(func(context.Context, *stage.Stage, wire.Request, *hbm.Claim) error { return nil })
	r.Done("a", -1)
	r.Done("b", 2)
	if err := r.Bus.Send(wire.SubjectDone, &wire.Done{Request: "c", Choice: -1, Attempt: 2}); err != nil {
		t.Fatal(err)
	}
	if err := r.Bus.Conn().Publish(wire.SubjectDone, []byte("no event")); err != nil {
		t.Fatal(err)
	}
	r.Done("last", -1)
	of := func(id string, attempt int) wire.Request { return wire.Request{ID: id, Attempt: attempt} }
	r.Until("the last is known", func() bool { return s.Ended(of("last", 1), -1) })
	for _, x := range []struct {
		of     wire.Request
		choice int
		want   bool
	}{
		{of("a", 1), -1, true}, {of("a", 9), 0, true}, {of("a", 1), 5, true},
		{of("b", 1), 2, true}, {of("b", 2), 2, true}, {of("b", 1), 1, false}, {of("b", 1), -1, false},
		{of("c", 1), 0, true}, {of("c", 2), -1, true}, {of("c", 3), -1, false},
		{of("d", 1), -1, false},
	} {
		if got := s.Ended(x.of, x.choice); got != x.want {
			t.Errorf("attempt %d of %s/%d ended: %v", x.of.Attempt, x.of.ID, x.choice, got)
		}
	}
}

// A stage process has the model, an NPU of its own, and a heartbeat that says so; without NPUs it does not start.
func TestOpen(t *testing.T) {
	r := newRig(t, stagetest.Long)
	cfg := r.Stage
	var npus []int
	var told atomic.Int64
	cfg.Loading = func(done, _ int64) { told.Store(done) }
	for i := range 3 {
		s, err := stage.Open(t.Context(), stage.Prefill, cfg, r.Rig.Log)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		npus = append(npus, s.NPUs()[0].Number)
		if s.Model.Digest != r.Model.Config.Digest || s.ID == "" || s.Ready() {
			t.Errorf("stage %q of model %s, ready %v", s.ID, s.Model.Name, s.Ready())
		}
		// Its weights are those of the first one, and the same as in a process alone.
		stats := r.Stats()
		if len(stats.Weights) != 1 || stats.Weights[0].Holders != i+1 || stats.Shared[0].Used != told.Load() || told.Load() == 0 {
			t.Errorf("with %d stages %+v and %+v; %d bytes were loaded", i+1, stats.Shared, stats.Weights, told.Load())
		}
		if !reflect.DeepEqual(s.NPUs()[0].Weights.Layers, r.Model.Weights.Layers) {
			t.Error("the stage has other weights than the folder")
		}
	}
	slices.Sort(npus)
	if !slices.Equal(npus, []int{1, 2, 3}) { // the test has 0
		t.Errorf("NPUs %v", npus)
	}
	if _, err := stage.Open(t.Context(), stage.Prefill, cfg, r.Rig.Log); !errors.Is(err, mem.ErrExhausted) {
		t.Errorf("a fifth stage on four NPUs: %v", err)
	}
	cfg.Model = t.TempDir()
	if _, err := stage.Open(t.Context(), stage.Prefill, cfg, r.Rig.Log); err == nil {
		t.Error("a stage starts without a model")
	}
}
