package stage_test

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"testing"

	"github.com/nats-io/nats.go"

	"trireme.dev/services/hmm"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/sched/placement"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/stagetest"
)

// A stage of three NPUs has the experts spread over them. Where they are one memory domain, that has all of them once; else each
// NPU's domain has the experts of its own and no others.
func TestSeveralNPUs(t *testing.T) {
	for _, perNPU := range []bool{false, true} {
		r := &rig{T: t, Rig: stagetest.New(t, func(ctx context.Context, socket string, conn *nats.Conn, log *slog.Logger) error {
			return hmm.Run(ctx, hmm.Config{
				Socket: socket, Node: "n", NPUs: 4, NPUBytes: 1 << 20, HostBytes: 1 << 20, NATS: conn, PerNPU: perNPU,
			}, log)
		}, stagetest.Long)}
		cfg := r.Stage
		cfg.NPUs = 3
		s, err := stage.Open(t.Context(), stage.Decode, cfg, r.Rig.Log)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		layout := stage.Layout(&s.Model.Text, placement.First(3))
		if err := layout.Check(placement.First(3)); err != nil {
			t.Fatal(err)
		}
		for i, n := range s.NPUs() {
			if n.Number != i+1 { // the test has 0
				t.Errorf("NPU %d of the stage is %d of the node", i, n.Number)
			}
			for l, experts := range n.Experts {
				for e, x := range experts {
					if has := x.Down.Data != nil; has != layout[l][e].Has(i) {
						t.Errorf("NPU %d has expert %d of layer %d: %v", i, e, l, has)
					} else if has && !slices.Equal(x.Down.Data, r.Model.Weights.Layers[l].Experts[e].Down.Data) {
						t.Errorf("expert %d of layer %d has other weights", e, l)
					}
				}
			}
		}
		stats := r.Stats()
		var all int64
		for _, e := range r.Model.Weights.Layers[0].Experts {
			all += 2 * int64(len(e.Gate.Data)+len(e.Up.Data)+len(e.Down.Data))
		}
		all *= int64(len(r.Model.Weights.Layers))
		sets, most := 1, all
		if perNPU {
			sets, most = 3, all/3+all/int64(3*len(s.NPUs()[0].Experts))
		}
		var sum int64
		for _, d := range stats.Shared {
			sum += d.Used
			if d.Used > most {
				t.Errorf("a domain has %d bytes of experts, %d are all", d.Used, all)
			}
		}
		if len(stats.Weights) != sets || sum != all {
			t.Errorf("%d sets of %d bytes, want %d of %d", len(stats.Weights), sum, sets, all)
		}
	}
}

// Who looks for room tries the emptiest NPU first, or the one that has something of it already.
func TestSeats(t *testing.T) {
	r := newRig(t, stagetest.Long)
	cfg := r.Stage
	cfg.NPUs = 3
	s, err := stage.Open(t.Context(), stage.Decode, cfg, r.Rig.Log)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	expect := func(has int, want ...int) {
		t.Helper()
		var got []int
		err := s.Seat(has, 1, func(seat *stage.Seat) error {
			got = append(got, seat.NPU)
			return mem.ErrExhausted
		})
		if !slices.Equal(got, want) || !errors.Is(err, mem.ErrExhausted) {
			t.Errorf("NPUs in the order %v, want %v; %v", got, want, err)
		}
	}
	sit := func(npu, slabs int) (got *stage.Seat) {
		t.Helper()
		if err := s.Seat(s.NPUs()[npu].Number, slabs, func(seat *stage.Seat) error { got = seat; return nil }); err != nil || got.NPU != npu {
			t.Fatalf("a place on NPU %d instead of %d: %v", got.NPU, npu, err)
		}
		return got
	}
	expect(-1, 0, 1, 2)
	a, b := sit(0, 3), sit(1, 1)
	expect(-1, 2, 1, 0)
	expect(a.Number(), 0, 2, 1)
	expect(99, 2, 1, 0)
	b.Grow(4)
	expect(-1, 2, 0, 1)
	b.Leave()
	expect(-1, 1, 2, 0)
	a.Leave()
	expect(-1, 0, 1, 2)
	s.Leave(1) // it is about to leave: no new work comes there, not even what has something there already
	expect(-1, 0, 2)
	expect(s.NPUs()[1].Number, 0, 2)
	s.Leave(0)
	expect(-1, 2)
	s.Leave(2)
	expect(-1)
	s.Stay(1)
	expect(-1, 1)
}
