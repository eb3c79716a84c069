package encoder_test

import (
	"context"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/services/encoder"
	"trireme.dev/services/hmm"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/stagetest"
	"trireme.dev/shared/wire"
)

// metered is a rig whose HMM caches MM objects, with an encoder that counts.
func metered(t *testing.T) (*rig, *stage.Stage, *stagetest.Meter) {
	t.Helper()
	r := &rig{Rig: stagetest.New(t, func(ctx context.Context, socket string, conn *nats.Conn, log *slog.Logger) error {
		return hmm.Run(ctx, hmm.Config{Socket: socket, Node: "n", NPUs: 3, NPUBytes: 16 << 20, HostBytes: 16 << 20, NATS: conn}, log)
	}, stagetest.Long), T: t}
	r.gateway = r.Gateway()
	var m *stagetest.Meter
	s, _ := r.Open(stage.Encode, func(ctx context.Context, s *stage.Stage) error {
		m = r.Meter(s)
		return encoder.Serve(ctx, s)
	})
	return r, s, m
}

// A request that is cancelled is encoded no further than the piece that has begun, whether its picture is on the NPU, in line
// for it, or still on the queue; nobody gets a prefill message of it, all its memory is free, and others are not disturbed.
func TestCancelStopsAtThePiece(t *testing.T) {
	r, s, m := metered(t)
	single := singles(t)
	pieces := r.pieces(m, single[0])

	for _, at := range []int{1, pieces / 2, pieces} { // the last one: all is computed, and the join record not marked yet
		before := m.Begun()
		m.Hold(before + at - 1)
		var requests []wire.Request
		for _, c := range single[1:5] { // one on the NPU, the others on the queue; during its last piece one of them in line
			req, messages := r.request(c)
			requests = append(requests, req)
			r.publish(messages...)
		}
		m.Await()
		if at == pieces { // before, the next one may be taken or not
			r.Until("the next one is in line", func() bool { return r.Stats().Claims == 2 })
		}
		r.Cancel(s, requests...)
		m.Release()
		r.Empty(stage.Encode)
		if n := m.Begun() - before; n != at {
			t.Errorf("cancelled during piece %d of %d: %d were computed", at, pieces, n)
		}
		r.NoMemory()
	}
	after, messages := r.request(single[6])
	r.publish(messages...)
	p := r.joined(after)
	c := single[6]
	if !slices.Equal(r.embeddings(p.MM[0]), r.Model.Embed(r.Model.Picture(c.Images[0]), grid(c.Grids[0]))) {
		t.Error("the picture after the cancelled ones is wrong")
	}
	r.Done(after.ID, -1)
	r.NoMemory()
	r.gateway.NothingLost()
}

// singles are the cases of one picture each, all different.
func singles(t *testing.T) []*stagetest.Case {
	t.Helper()
	cases := stagetest.Cases(t)
	var single []*stagetest.Case
	for i := range cases {
		if c := &cases[i]; len(c.Images) == 1 {
			single = append(single, c)
		}
	}
	return single
}

// pieces is how many pieces a picture is computed in: each of them, as all go through the same network.
func (r *rig) pieces(m *stagetest.Meter, c *stagetest.Case) int {
	before := m.Begun()
	witness, messages := r.request(c)
	r.publish(messages...)
	r.joined(witness)
	r.Done(witness.ID, -1)
	return m.Begun() - before
}

// Of two requests with the same picture the second waits for the first one's MM object. If it is cancelled it waits no longer; if
// the first is cancelled the second encodes.
func TestCancelOfThoseWhoShareAPicture(t *testing.T) {
	for name, x := range map[string]struct{ cancelled, other int }{"who waits": {1, 0}, "who encodes": {0, 1}} {
		t.Run(name, func(t *testing.T) {
			r, s, m := metered(t)
			single := singles(t)
			pieces, c := r.pieces(m, single[0]), single[1]
			m.Hold(m.Begun() + pieces - 1) // in the last one, when the next picture is asked for
			var requests []wire.Request
			for range 2 {
				req, messages := r.request(c)
				requests = append(requests, req)
				r.publish(messages[0])
				if len(requests) == 1 {
					m.Await()
				}
			}
			r.Until("both are in work", func() bool { return r.Stats().Claims == 2 })
			r.Cancel(s, requests[x.cancelled])
			if x.cancelled == 1 {
				r.Until("it waits no longer", func() bool { return r.Outcomes(s, "ended") == 1 })
			}
			m.Release()
			r.Until("both are settled, like the first picture", func() bool { return r.Outcomes(s, "ended") == 1 && r.Outcomes(s, "done") == 2 })
			join, err := r.Bus.Join(t.Context(), wire.JoinKey(requests[x.other].ID, 1))
			if err != nil || !join.Have[0] {
				t.Fatalf("the other request's picture is not there: %+v, %v", join, err)
			}
			if !slices.Equal(r.embeddings(join.Prefill.MM[0]), r.Model.Embed(r.Model.Picture(c.Images[0]), grid(c.Grids[0]))) {
				t.Error("the other request's picture is wrong")
			}
			join, err = r.Bus.Join(t.Context(), wire.JoinKey(requests[x.cancelled].ID, 1))
			if err != nil || slices.Contains(join.Have, true) {
				t.Errorf("a cancelled request's join record was marked: %+v, %v", join, err)
			}
			r.Done(requests[x.other].ID, -1)
			r.Empty(stage.Encode)
			r.NoMemory()
		})
	}
}

// The word of an end that never comes: at the deadline, and a margin, the HMM takes the claim back, and the stage stops at the
// next piece.
func TestDeadlineEndsWhatNobodyCancels(t *testing.T) {
	r := &rig{Rig: stagetest.New(t, func(ctx context.Context, socket string, conn *nats.Conn, log *slog.Logger) error {
		cfg := hmm.Config{Socket: socket, Node: "n", NPUs: 3, NPUBytes: 16 << 20, HostBytes: 16 << 20, NATS: conn, Margin: 1}
		return hmm.Run(ctx, cfg, log)
	}, stagetest.Long), T: t}
	r.gateway = r.Gateway()
	var m *stagetest.Meter
	s, _ := r.Open(stage.Encode, func(ctx context.Context, s *stage.Stage) error {
		m = r.Meter(s)
		m.Hold(1)
		return encoder.Serve(ctx, s)
	})
	c := &stagetest.Cases(t)[6]
	req := r.Request(r.gateway.ID)
	req.Left = 5 * time.Second // in which a busy machine comes to the second piece
	_, messages := r.prepare(c, req)
	r.publish(messages...)
	m.Await()
	r.Until("the deadline has passed", func() bool { return r.Stats().Claims == 0 })
	m.Release()
	r.Until("it is settled", func() bool { return r.Outcomes(s, "ended") == 1 })
	if n := m.Begun(); n != 2 {
		t.Errorf("%d pieces were computed, 2 had begun before the deadline", n)
	}
	r.Empty(stage.Encode)
	r.Done(req.ID, -1)
	r.NoMemory()
}
