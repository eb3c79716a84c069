package stage_test

import (
	"context"
	"testing"
	"time"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/stagetest"
)

// draining starts a stage whose role finishes what it has, with two places; its works wait for finish, or for their context.
func (r *rig) draining(finish <-chan struct{}) (s *stage.Stage, entered chan struct{}, stop func()) {
	r.Helper()
	entered = make(chan struct{}, 8)
	s, stop = r.Open(stage.Prefill, func(ctx context.Context, s *stage.Stage) error {
		x := role(stage.Prefill, 2, func(ctx context.Context, d *bus.Delivery) {
			s.Work(ctx, d, r.request(stage.Prefill, d.Data), 0, func(ctx context.Context, _ *hbm.Claim) error {
				entered <- struct{}{}
				select {
				case <-finish:
					return nil
				case <-ctx.Done():
					return context.Cause(ctx)
				}
			})
		})
		x.Finish = true
		return s.Serve(ctx, x)
	})
	return s, entered, stop
}

// A stage that is told to stop is not ready any more and takes nothing more, while it finishes what it has; cancels reach it.
func TestDrainFinishes(t *testing.T) {
	r := newRig(t, stagetest.Long)
	r.Stage.Drain = time.Minute
	finish := make(chan struct{})
	s, entered, stop := r.draining(finish)
	r.send(stage.Prefill)
	cancelled := r.send(stage.Prefill)
	<-entered
	<-entered
	r.send(stage.Prefill) // stays on the queue
	instances, err := r.Bus.Instances(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r.Until("it is there", func() bool { return len(instances.Role(stage.Prefill)) == 1 })
	stopped := make(chan struct{})
	go func() { stop(); close(stopped) }()
	r.Until("its heartbeat says that it is not ready", func() bool {
		all := instances.Role(stage.Prefill)
		return len(all) == 1 && !all[0].Ready && !s.Ready()
	})
	r.Cancel(s, cancelled)
	r.Until("the cancelled one is settled", func() bool { return r.Outcomes(s, "ended") == 1 })
	close(finish)
	<-stopped
	if done, back := r.Outcomes(s, "done"), r.Outcomes(s, "handed back"); done != 1 || back != 0 {
		t.Errorf("%d finished, %d handed back; it had one to finish", done, back)
	}
	waiting, taken := r.Queue(stage.Prefill)
	if waiting+taken != 1 {
		t.Errorf("%d messages are left, one was never begun", waiting+taken)
	}
}

// What takes longer than a stage has to stop is handed back.
func TestDrainEnds(t *testing.T) {
	r := newRig(t, stagetest.Long)
	r.Stage.Drain = 50 * time.Millisecond
	s, entered, stop := r.draining(nil)
	req := r.send(stage.Prefill)
	<-entered
	stop()
	if n := r.Outcomes(s, "handed back"); n != 1 {
		t.Errorf("%d handed back", n)
	}
	r.Stage.Drain = -1
	finish := make(chan struct{})
	close(finish)
	next, _, _ := r.draining(finish)
	r.Until("another one does it", func() bool { return r.Outcomes(next, "done") == 1 })
	r.Empty(stage.Prefill)
	r.Done(req.ID, -1)
	r.NoMemory()
}
