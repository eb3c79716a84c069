package stage_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/stagetest"
	"trireme.dev/shared/wire"
)

// What an instance has in work goes on elsewhere when it gives up its last NPU. The last one with NPUs does not, nor do both of two
// that want to at once: who is about to counts for nobody.
func TestStandby(t *testing.T) {
	r := newRig(t, stagetest.Long)
	took := make(chan *stage.Stage, 8)
	var stages []*stage.Stage
	for range 2 {
		s, _ := r.stage(func(ctx context.Context, s *stage.Stage, _ wire.Request, _ *hbm.Claim) error {
			took <- s
			<-ctx.Done()
			return context.Cause(ctx)
		})
		stages = append(stages, s)
	}
	view, err := r.Rig.Bus.Instances(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r.Until("heartbeats say that both are ready", func() bool {
		return len(slices.DeleteFunc(view.Role(stage.Decode), func(i wire.Instance) bool { return !i.Ready })) == 2
	})
	change := func(s *stage.Stage, c wire.Change, told func(*wire.ChangeReport)) error {
		c.ID, c.Kind, c.Left = bus.NewChangeID(), wire.ChangeScale, time.Minute
		_, err := r.Rig.Bus.Change(t.Context(), s.ID, wire.LayoutKey("n", s.ID), c, told)
		return err
	}
	refused := func(err error) bool {
		return errors.Is(err, bus.ErrGivenUp) && strings.Contains(err.Error(), "could decode")
	}
	r.publish()
	first := <-took
	other := stages[0]
	if other == first {
		other = stages[1]
	}
	if err := change(first, wire.Change{}, nil); err != nil {
		t.Fatal(err)
	}
	if s := <-took; s != other || r.Outcomes(first, "handed back") != 1 {
		t.Errorf("%s has the work of %s, which has handed %d back", s.ID, first.ID, r.Outcomes(first, "handed back"))
	}
	if n := len(first.HBM.NPUs()); n != 0 || !first.Ready() {
		t.Errorf("the standby has %d NPUs, and is ready: %v", n, first.Ready())
	}
	if err := change(other, wire.Change{}, nil); !refused(err) {
		t.Errorf("the last one: %v", err)
	}
	r.Until("the heartbeat says that it stands by", func() bool {
		return slices.ContainsFunc(view.Role(stage.Decode), func(i wire.Instance) bool { return i.ID == first.ID && i.Standby })
	})
	for _, x := range []struct {
		s    *stage.Stage
		npus int
	}{{first, 1}, {other, 0}, {other, 1}} { // one right behind the other, before a heartbeat tells of it
		if err := change(x.s, wire.Change{NPUs: x.npus}, nil); err != nil {
			t.Fatalf("%s to %d NPUs: %v", x.s.ID, x.npus, err)
		}
	}
	held := make(chan struct{})
	go change(first, wire.Change{Hold: "plan", HoldTime: time.Minute}, func(r *wire.ChangeReport) { //nolint:errcheck // it ends with the test
		if r.Held {
			close(held)
		}
	})
	<-held
	if err := change(other, wire.Change{}, nil); !refused(err) {
		t.Errorf("both at once: %v", err)
	}
}
