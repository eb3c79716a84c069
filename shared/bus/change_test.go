package bus_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/wire"
)

// driven is an instance that drives an operation: it has planned when it is asked first, and is done when it is asked again.
func driven(t *testing.T, b *bus.Bus) *nats.Subscription {
	t.Helper()
	sub, err := b.Handle(wire.SubjectChange("d"), func(data []byte, respond func(any) error) {
		var c wire.Change
		if err := wire.Unmarshal(data, &c); err != nil {
			t.Error(err)
		}
		r := &wire.ChangeReport{ID: c.ID, Kind: c.Kind, Instance: "d", Record: layoutKey, Number: 1, State: "plan"}
		if c.Seen > 0 {
			r.Number, r.State, r.Committed, r.Epoch, r.Pause = 2, "done", true, 5, time.Microsecond
		}
		_ = respond(r)
	})
	if err != nil {
		t.Fatal(err)
	}
	return sub
}

// asked waits until a connection has been answered once more: that nobody listens is an answer of the server.
func asked(t *testing.T, b *bus.Bus) {
	t.Helper()
	before := b.Conn().Stats().InMsgs
	for deadline := time.Now().Add(time.Minute); b.Conn().Stats().InMsgs == before; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("nobody was asked again")
		}
	}
}

// An instance that does not listen for a moment, because it connects to NATS anew, is not gone: it tells how its operation has ended, and not its
// record, in which that is not, or not yet.
func TestChangeOfWhoIsAwayForAMoment(t *testing.T) {
	for name, record := range map[string]*wire.Layout{"no record": nil, "under way": underWay("op"), "committed": committed("op")} {
		t.Run(name, func(t *testing.T) {
			url := bustest.Run(t).URL()
			instance, b := connect(t, url), connect(t, url)
			if record != nil {
				swap(t, instance, record, 0)
			}
			sub := driven(t, instance)
			planned, ended := make(chan struct{}), make(chan error, 1)
			go func() {
				r, err := b.Change(t.Context(), "d", layoutKey, wire.Change{ID: "op", Kind: wire.ChangeScale, Left: time.Minute}, func(r *wire.ChangeReport) {
					if r.State == "plan" {
						if err := errors.Join(sub.Unsubscribe(), instance.Conn().Flush()); err != nil {
							t.Error(err)
						}
						close(planned)
					}
				})
				if err == nil && (r.Epoch != 5 || r.Pause == 0 || r.Why != "") {
					err = errors.New("not what the instance has said: " + r.Sentence())
				}
				ended <- err
			}()
			<-planned
			asked(t, b)
			driven(t, instance)
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
	}
}

// Of an instance that is gone the record says how its operation has ended, when its successor has written it.
func TestChangeOfWhoIsGone(t *testing.T) {
	for name, x := range map[string]struct {
		record    *wire.Layout
		committed bool
		why       string
	}{
		"nothing is known": {nil, false, "instance d is gone"},
		"committed":        {committed("op"), true, "starts in the new layout"},
		"given up":         {given("op"), false, "late"},
	} {
		t.Run(name, func(t *testing.T) {
			b := connect(t, bustest.Run(t).URL())
			if x.record != nil {
				x.record.Instance = "successor"
				swap(t, b, x.record, 0)
			}
			r, err := b.Change(t.Context(), "d", layoutKey, wire.Change{ID: "op", Kind: wire.ChangeScale, Left: time.Minute}, nil)
			if r.Committed != x.committed || errors.Is(err, bus.ErrGivenUp) == x.committed || !strings.Contains(r.Why, x.why) {
				t.Errorf("%+v, %v", r, err)
			}
		})
	}
}

// Of an instance that is there and never answers nobody says that it does something.
func TestChangeOfWhoNeverAnswers(t *testing.T) {
	b := connect(t, bustest.Run(t).URL())
	asked := make(chan struct{}, 100)
	if _, err := b.Handle(wire.SubjectChange("d"), func([]byte, func(any) error) { asked <- struct{}{} }); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-asked; cancel() }()
	_, err := b.Change(ctx, "d", layoutKey, wire.Change{ID: "op", Kind: wire.ChangeScale, Left: time.Minute}, nil)
	if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "has not answered") || strings.Contains(err.Error(), "goes on") {
		t.Errorf("%v", err)
	}
}
