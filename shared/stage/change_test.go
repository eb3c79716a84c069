package stage_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"log/slog"

	"trireme.dev/services/hmm"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/sched/placement"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/stagetest"
	"trireme.dev/shared/wire"
)

// A process starts in the layout that the one before it has left, clears what that one had pending, and does not follow a record that is not
// made for it.
func TestLayoutRestored(t *testing.T) {
	r := &rig{T: t, Rig: stagetest.New(t, func(ctx context.Context, socket string, conn *nats.Conn, log *slog.Logger) error {
		return hmm.Run(ctx, hmm.Config{Socket: socket, Node: "n", NPUs: 4, NPUBytes: 1 << 20, HostBytes: 1 << 20, NATS: conn}, log)
	}, stagetest.Long)}
	model := &r.Model.Config.Text
	layout := stage.Layout(model, placement.First(2))
	for l := range layout {
		slices.Reverse(layout[l]) // as no process places its experts by itself
	}
	key := wire.LayoutKey("n", "decoder-7")
	for name, x := range map[string]struct {
		change  func(*wire.Layout)
		follows bool
	}{
		"as it is":        {func(*wire.Layout) {}, true},
		"pending":         {func(l *wire.Layout) { l.Pending = &wire.Pending{ID: "op", Kind: wire.ChangeRebalance} }, true},
		"another model":   {func(l *wire.Layout) { l.Model[0]++ }, false},
		"asked for three": {func(l *wire.Layout) { l.Asked = 3 }, false},
		"other slots":     {func(l *wire.Layout) { l.NPUs = []int{1, -1, 2} }, false},
		"taken":           {func(l *wire.Layout) { l.NPUs = []int{0, 3} }, true}, // the test has 0
		"damaged":         {func(l *wire.Layout) { l.Experts = l.Experts[1:] }, false},
	} {
		record := &wire.Layout{
			Instance: "before", Model: r.Model.Config.Digest, Asked: 2, Epoch: 7, NPUs: []int{1, 2}, Experts: layout.Encode(),
			Last: &wire.Ended{ID: "before", Committed: true},
		}
		x.change(record)
		if err := r.Bus.DeleteLayout(t.Context(), key); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Bus.SwapLayout(t.Context(), key, record, 0); err != nil {
			t.Fatal(err)
		}
		cfg := r.Stage
		cfg.NPUs, cfg.Name = 2, "decoder-7"
		s, err := stage.Open(t.Context(), stage.Decode, cfg, r.Rig.Log)
		if err != nil {
			t.Fatal(err)
		}
		follows := true
		for slot, n := range s.NPUs() {
			for l := range layout {
				for e := range layout[l] {
					follows = follows && (n.Experts[l][e].Down.Data != nil) == layout[l][e].Has(slot)
				}
			}
		}
		if follows != x.follows {
			t.Errorf("%s: the process follows the record: %v", name, follows)
		}
		now, _, err := r.Bus.Layout(t.Context(), key)
		if err != nil || now.Instance != s.ID || now.Pending != nil || now.Epoch != map[bool]uint64{true: 7, false: 8}[x.follows] || record.Pending != nil && (now.Last.ID != "op" || now.Last.Committed) {
			t.Errorf("%s: the record is %+v, %v", name, now, err)
		}
		s.Close()
	}
	var told []string
	r.Until("two events tell of the end of what was pending", func() bool {
		told = nil
		if err := r.Bus.Events(t.Context(), bus.EventQuery{Kinds: []string{"scale"}}, func(e wire.Event) error {
			told = append(told, e.Kind)
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return len(told) >= 2
	})
	if !slices.Equal(told, []string{wire.EventScaleAbort, wire.EventScaleDone}) {
		t.Errorf("events %v", told)
	}
}

// A record that cannot be read, as one of another version of the program, keeps nobody from starting.
func TestUnreadableLayout(t *testing.T) {
	r := newRig(t, stagetest.Long)
	js, err := jetstream.New(r.Rig.Bus.Conn())
	if err != nil {
		t.Fatal(err)
	}
	records, err := js.KeyValue(t.Context(), wire.BucketLayouts)
	if err != nil {
		t.Fatal(err)
	}
	key := wire.LayoutKey("n", "decoder-7")
	good, err := wire.Marshal(&wire.Layout{Instance: "before", Asked: 1, NPUs: []int{0}})
	if err != nil {
		t.Fatal(err)
	}
	for name, record := range map[string][]byte{
		"nothing": {}, "another version": append([]byte{good[0] + 1}, good[1:]...), "damaged": good[:len(good)-1], "another struct": {good[0], 0x91, 0xa1, 'x'},
	} {
		if _, err := records.Put(t.Context(), key, record); err != nil {
			t.Fatal(err)
		}
		cfg := r.Stage
		cfg.Name = "decoder-7"
		s, err := stage.Open(t.Context(), stage.Decode, cfg, r.Rig.Log)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if now, _, err := r.Bus.Layout(t.Context(), key); err != nil || now.Instance != s.ID || now.Epoch != 1 || len(s.HBM.NPUs()) != 1 {
			t.Errorf("%s: the record is %+v, %v; NPUs %v", name, now, err, s.HBM.NPUs())
		}
		s.Close()
	}
}

// Asked again for what a process before has done or given up, the instance says how it ended and does nothing.
func TestOperationOfTheProcessBefore(t *testing.T) {
	for _, committed := range []bool{true, false} {
		r := newRig(t, stagetest.Long)
		record := &wire.Layout{Instance: "before", Model: r.Model.Config.Digest, Asked: 1, Epoch: 7, NPUs: []int{0}, Last: &wire.Ended{
			ID: "op", Kind: wire.ChangeScale, Committed: committed, Why: map[bool]string{false: "it was late"}[committed],
		}}
		record.Experts = stage.Layout(&r.Model.Config.Text, placement.First(1)).Encode()
		if _, err := r.Rig.Bus.SwapLayout(t.Context(), wire.LayoutKey("n", "decoder-7"), record, 0); err != nil {
			t.Fatal(err)
		}
		r.Stage.Name = "decoder-7"
		s := r.serving(t)
		got, err := r.Rig.Bus.Change(t.Context(), s.ID, wire.LayoutKey("n", "decoder-7"), wire.Change{ID: "op", Kind: wire.ChangeScale, Left: time.Minute}, nil)
		if committed && (err != nil || !got.Committed || got.Epoch != 7) || !committed && (!errors.Is(err, bus.ErrGivenUp) || !strings.Contains(err.Error(), "it was late")) {
			t.Errorf("committed %v: %+v, %v", committed, got, err)
		}
		if l, _, err := r.Rig.Bus.Layout(t.Context(), wire.LayoutKey("n", "decoder-7")); err != nil || l.Epoch != 7 || l.Last.ID != "op" {
			t.Errorf("committed %v: the record is %+v, %v", committed, l, err)
		}
	}
}

// What a scaler asks for is refused when one that leads later has asked for something, but what is known is told to everybody, and operators
// are never refused for that.
func TestFences(t *testing.T) {
	r := newRig(t, stagetest.Long)
	s := r.serving(t)
	for _, x := range []struct {
		what    string
		id      string
		fence   uint64
		refused bool
	}{
		{"the first", "a", 5, false},
		{"a later one", "b", 7, false},
		{"one of the first's", "c", 6, true},
		{"that of the first again", "a", 5, false},
		{"an operator's", "d", 0, false},
		{"one of the later one's", "e", 7, false},
	} {
		got, err := r.Rig.Bus.Change(t.Context(), s.ID, wire.LayoutKey("n", s.ID),
			wire.Change{ID: x.id, Kind: wire.ChangeScale, NPUs: len(s.HBM.NPUs()), Left: time.Minute, Fence: x.fence}, nil)
		if refused := errors.Is(err, bus.ErrRefused); refused != x.refused || !refused && (err != nil || got.Fence != 0) || refused && got.Fence != 7 {
			t.Errorf("%s: %+v, %v", x.what, got, err)
		}
	}
}

// What an instance cannot read, as a program of another version may send it, it refuses, so that nobody waits.
func TestUnreadableChange(t *testing.T) {
	r := newRig(t, stagetest.Long)
	s := r.serving(t)
	var got wire.ChangeReport
	err := r.Rig.Bus.Ask(t.Context(), wire.SubjectChange(s.ID), &wire.Done{Request: "r"}, &got)
	if err != nil || !got.Refused || got.Number == 0 || !strings.Contains(got.Why, "another version") {
		t.Errorf("%+v, %v", got, err)
	}
}

// serving is a stage that takes work and gets none, once its heartbeat says that it is ready.
func (r *rig) serving(t *testing.T) *stage.Stage {
	t.Helper()
	s, _ := r.stage(func(context.Context, *stage.Stage, wire.Request, *hbm.Claim) error { return nil })
	view, err := r.Rig.Bus.Instances(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r.Until("the heartbeat says that it is ready", func() bool {
		return slices.ContainsFunc(view.Role(stage.Decode), func(i wire.Instance) bool { return i.ID == s.ID && i.Ready })
	})
	return s
}

// A dry run refuses nobody: what is asked for meanwhile begins when it has ended. It is refused while something is changed.
func TestDryRunRefusesNobody(t *testing.T) {
	r := newRig(t, stagetest.Long)
	s := r.serving(t)
	ask := func(c wire.Change, told func(*wire.ChangeReport)) (*wire.ChangeReport, error) {
		c.Kind, c.Left = wire.ChangeScale, time.Minute
		return r.Rig.Bus.Change(t.Context(), s.ID, wire.LayoutKey("n", s.ID), c, told)
	}
	held := func(c wire.Change) (ended chan error) { // returns when it waits
		t.Helper()
		waits, ended := make(chan struct{}), make(chan error, 1)
		go func() {
			_, err := ask(c, func(now *wire.ChangeReport) {
				if now.Held {
					close(waits)
				}
			})
			ended <- err
		}()
		select {
		case <-waits:
		case err := <-ended:
			t.Fatalf("%s has ended: %v", c.ID, err)
		}
		return ended
	}
	same, other := len(s.HBM.NPUs()), len(s.HBM.NPUs())+1
	dry := held(wire.Change{ID: "dry", NPUs: other, DryRun: true, Hold: "plan", HoldTime: 4 * time.Second}) // long enough to be seen
	for _, id := range []string{"another dry run", "a change"} {
		if got, err := ask(wire.Change{ID: id, NPUs: same, DryRun: id != "a change"}, nil); err != nil || got.Refused {
			t.Errorf("%s beside a dry run: %+v, %v", id, got, err)
		}
		if got, err := ask(wire.Change{ID: "dry", NPUs: other}, nil); err != nil || got.State != "done" || got.Held {
			t.Errorf("%s has not waited for the dry run: %+v, %v", id, got, err)
		}
	}
	if err := <-dry; err != nil {
		t.Errorf("the dry run: %v", err)
	}
	held(wire.Change{ID: "real", NPUs: other, Hold: "plan", HoldTime: time.Minute}) // it ends with the test
	for id, dry := range map[string]bool{"dry2": true, "real2": false} {
		if _, err := ask(wire.Change{ID: id, NPUs: other, DryRun: dry}, nil); !errors.Is(err, bus.ErrRefused) {
			t.Errorf("%s while another one is under way: %v", id, err)
		}
	}
}

// NPUs may join and leave in one operation: none gets the slot of one that is there until the switch. What is named twice, or both to join
// and to leave, is refused.
func TestNPUsJoinAndLeaveAtOnce(t *testing.T) {
	r := &rig{T: t, Rig: stagetest.New(t, servePerNPU, stagetest.Long)}
	s := r.serving(t)
	has := s.HBM.NPUs()[0]
	for _, rate := range []int64{0, 1 << 20} { // how long it takes is told also where no rate is given
		dry, err := r.Rig.Bus.Change(t.Context(), s.ID, wire.LayoutKey("n", s.ID), wire.Change{
			ID: bus.NewChangeID(), Kind: wire.ChangeScale, Left: time.Minute, Join: []int{2}, DryRun: true, Rate: rate,
		}, nil)
		if err != nil || dry.Plan.Bytes == 0 || rate == 0 && dry.Plan.Expect <= 0 ||
			rate > 0 && dry.Plan.Expect != time.Duration(float64(dry.Plan.Bytes)/float64(rate)*float64(time.Second)) {
			t.Errorf("a dry run at %d bytes a second: %+v, %v", rate, dry, err)
		}
	}
	for _, x := range []struct {
		join, leave []int
		wants       string
	}{
		{nil, []int{has, has}, "is to leave"}, {[]int{3, 3}, nil, "is to join"}, {[]int{3}, []int{3}, "is to leave"}, {[]int{has}, []int{has}, "is to join"},
		{[]int{3}, []int{has}, ""},
	} {
		got, err := r.Rig.Bus.Change(t.Context(), s.ID, wire.LayoutKey("n", s.ID),
			wire.Change{ID: bus.NewChangeID(), Kind: wire.ChangeScale, Left: time.Minute, Join: x.join, Leave: x.leave}, nil)
		if x.wants != "" && (!errors.Is(err, bus.ErrGivenUp) || !strings.Contains(err.Error(), x.wants)) || x.wants == "" && (err != nil || !got.Committed) {
			t.Errorf("%v join and %v leave: %+v, %v", x.join, x.leave, got, err)
		}
	}
	if now := s.HBM.NPUs(); !slices.Equal(now, []int{3}) {
		t.Errorf("the instance has NPUs %v", now)
	}
	if npus := s.NPUs(); len(npus) != 2 || npus[0].Compute != nil || npus[1].Number != 3 {
		t.Errorf("NPUs by slot: %+v", npus)
	}
}
