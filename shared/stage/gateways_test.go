package stage_test

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/stagetest"
	"trireme.dev/shared/wire"
)

// blocked is a stage of a role whose work waits until its context ends; causes gets why. busy is how many works were begun.
func (r *rig) blocked(name string) (s *stage.Stage, busy *atomic.Int32, causes chan error) {
	r.Helper()
	busy, causes = new(atomic.Int32), make(chan error, 16)
	s, _ = r.Open(name, func(ctx context.Context, s *stage.Stage) error {
		return s.Serve(ctx, role(name, 1, func(ctx context.Context, d *bus.Delivery) {
			req := r.request(name, d.Data)
			s.Work(ctx, d, req, 0, func(ctx context.Context, _ *hbm.Claim) error {
				busy.Add(1)
				<-ctx.Done()
				causes <- context.Cause(ctx)
				return ctx.Err()
			})
		}))
	})
	return s, busy, causes
}

// request reads whose message it is.
func (r *rig) request(name string, data []byte) wire.Request {
	r.Helper()
	var e wire.Encode
	var p wire.Prefill
	var d wire.Decode
	m := map[string]any{stage.Encode: &e, stage.Prefill: &p, stage.Decode: &d}[name]
	if err := wire.Unmarshal(data, m); err != nil {
		r.Error(err)
	}
	return map[string]wire.Request{stage.Encode: e.Request, stage.Prefill: p.Request, stage.Decode: d.Request}[name]
}

// send puts a message of a new request of the test's gateway on a queue, and something into memory for it.
func (r *rig) send(name string) wire.Request {
	r.Helper()
	req := r.Request(r.gateway.ID)
	r.Put(req, mem.KindPixels, []byte("pixels"))
	r.Publish(name, req.ID, map[string]any{
		stage.Encode: &wire.Encode{Request: req}, stage.Prefill: &wire.Prefill{Request: req}, stage.Decode: &wire.Decode{Request: req},
	}[name])
	return req
}

// When a gateway is gone, what every stage does for it ends with its lease, what is queued is never begun, and all memory of
// its requests is free long before their deadline.
func TestGatewayIsGone(t *testing.T) {
	for _, name := range []string{stage.Encode, stage.Prefill, stage.Decode} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, stagetest.Long)
			r.Stage.Lease = 200 * time.Millisecond
			s, busy, causes := r.blocked(name)
			r.send(name)
			r.Until("it is in work", func() bool { return busy.Load() == 1 })
			r.send(name)
			r.gateway.Leave()
			if err := <-causes; !errors.Is(err, mem.ErrEnded) {
				t.Errorf("the work ended because of %v", err)
			}
			r.Until("what was queued is settled", func() bool { return r.Outcomes(s, "ended") == 2 })
			r.Empty(name)
			r.NoMemory()
			if n := busy.Load(); n != 1 {
				t.Errorf("%d works were begun, one was before the gateway left", n)
			}
		})
	}
}

// A gateway that was away for longer than its lease is told what was given up, when it is back: it can start the next attempt,
// and new requests are worked on.
func TestGatewayComesBack(t *testing.T) {
	r := newRig(t, stagetest.Long)
	r.Stage.Lease = 200 * time.Millisecond
	s, busy, causes := r.blocked(stage.Decode)
	given := r.send(stage.Decode)
	r.Until("it is in work", func() bool { return busy.Load() == 1 })
	r.gateway.Leave()
	<-causes
	r.Until("it is given up", func() bool { return r.Outcomes(s, "ended") == 1 })
	r.NoMemory()
	r.gateway.Return()
	if lost := r.gateway.Lost(1)[0]; lost.Request != given.ID || lost.Attempt != 1 || lost.Final {
		t.Errorf("it was told %+v", lost)
	}
	again := given
	again.Attempt = 2
	r.Put(again, mem.KindPixels, []byte("pixels")) // the HMM takes the next attempt
	r.Publish(stage.Decode, again.ID, &wire.Decode{Request: again})
	r.Until("the next attempt is in work", func() bool { return busy.Load() == 2 })
	r.Done(again.ID, -1)
	if err := <-causes; !errors.Is(err, mem.ErrEnded) {
		t.Errorf("the next attempt ended because of %v", err)
	}
	r.Empty(stage.Decode)
	r.NoMemory()
}

// relay has stages reach NATS by a way of their own, which nobody gets through while it is shut.
func (r *rig) relay() (shut *atomic.Bool) {
	r.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		r.Fatal(err)
	}
	shut = new(atomic.Bool)
	var work sync.WaitGroup
	work.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			var server net.Conn
			if !shut.Load() {
				server, err = net.Dial("tcp", strings.TrimPrefix(r.NATS.URL(), "nats://"))
			}
			if server == nil || err != nil {
				_ = client.Close()
				continue
			}
			for _, way := range [][2]net.Conn{{client, server}, {server, client}} {
				work.Go(func() { _, _ = io.Copy(way[0], way[1]); _ = way[0].Close() })
			}
		}
	})
	r.Cleanup(func() { _ = l.Close(); work.Wait() }) // stages have ended, and with them their connections
	r.Stage.NATSURL = "nats://" + l.Addr().String()
	return shut
}

// Signs of life that NATS does not bring are not missing: work goes on over an outage that is longer than the lease.
func TestOutageIsNoSilence(t *testing.T) {
	r := newRig(t, stagetest.Long)
	r.Stage.Lease = 200 * time.Millisecond
	shut := r.relay()
	s, busy, causes := r.blocked(stage.Decode)
	req := r.send(stage.Decode)
	r.Until("it is in work", func() bool { return busy.Load() == 1 })
	r.NATS.Stop()
	time.Sleep(15 * r.Stage.Lease) // the outage, in which two questions go unanswered; nothing is waited for
	// The gateway is back first: with so short a lease it would be gone for good if it were the later one.
	shut.Store(true)
	r.NATS.Start()
	if err := r.Bus.Conn().FlushTimeout(time.Minute); err != nil {
		t.Fatal(err)
	}
	shut.Store(false)
	if err := s.Bus.Conn().FlushTimeout(time.Minute); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-causes:
		t.Fatalf("the work was ended: %v", err)
	case <-time.After(5 * r.Stage.Lease):
	}
	r.Done(req.ID, -1) // the HMM may not be back yet: then the stage tells it
	if err := <-causes; !errors.Is(err, mem.ErrEnded) {
		t.Errorf("the work ended because of %v", err)
	}
	r.NoMemory()
}

// The end of a request, of its attempt, or of its choice reaches the work for it wherever that waits, and no other.
func TestEndsReachTheWork(t *testing.T) {
	for name, x := range map[string]struct {
		role  string
		event wire.Done
		reach bool
	}{
		"request":                 {stage.Prefill, wire.Done{Choice: -1}, true},
		"attempt":                 {stage.Encode, wire.Done{Choice: -1, Attempt: 1}, true},
		"earlier attempt":         {stage.Decode, wire.Done{Choice: -1, Attempt: -1}, false},
		"choice":                  {stage.Decode, wire.Done{Choice: 0}, true},
		"other choice":            {stage.Decode, wire.Done{Choice: 1}, false},
		"choice, work for all":    {stage.Prefill, wire.Done{Choice: 0}, false},
		"choice, picture for all": {stage.Encode, wire.Done{Choice: 0}, false},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, stagetest.Long)
			s, busy, causes := r.blocked(x.role)
			req := r.send(x.role)
			r.Until("it is in work", func() bool { return busy.Load() == 1 })
			x.event.Request = req.ID
			if err := r.Bus.Send(wire.SubjectDone, &x.event); err != nil {
				t.Fatal(err)
			}
			r.Done("later", -1)
			r.Until("the event is known", func() bool { return s.Ended(wire.Request{ID: "later", Attempt: 1}, -1) })
			if !x.reach {
				select {
				case err := <-causes:
					t.Errorf("it ended: %v", err)
				default:
				}
				r.Done(req.ID, -1)
			}
			if err := <-causes; !errors.Is(err, mem.ErrEnded) {
				t.Errorf("the work ended because of %v", err)
			}
			r.Until("it is settled", func() bool { return r.Outcomes(s, "ended") == 1 })
			r.Done(req.ID, -1)
			r.Empty(x.role)
			r.NoMemory()
		})
	}
}
