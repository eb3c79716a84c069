package decoder_test

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	dto "github.com/prometheus/client_model/go"

	"trireme.dev/services/decoder"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/wire"
)

// shuttle has the sequences of a stage move between its two NPUs until ctx ends, and counts how often an NPU that had some had none then.
func shuttle(ctx context.Context, s *stage.Stage, moves *atomic.Int64) {
	for slot := 0; ctx.Err() == nil; slot = 1 - slot {
		if !s.Ready() {
			continue
		}
		had := s.Held(slot).Seqs
		if s.Vacate(ctx, slot) == nil {
			if s.Stay(slot); had > 0 {
				moves.Add(1)
			}
		}
	}
}

// busy is the bytes of KV and logs that are booked to an NPU and are not only cached.
func (r *rig) busy(npu int) (n int64) {
	for _, kind := range []mem.Kind{mem.KindKV, mem.KindLog} {
		u := r.Stats().Memory[npu+1].Kinds[kind.String()]
		n += u.Used + u.Padded - u.Cached
	}
	return n
}

// Sequences that decode move off an NPU that is to leave, in one memory domain and between two, and go on; then nothing is booked to that
// NPU any more, it leaves, and the answers are those of sequences that never moved.
func TestSequencesMove(t *testing.T) {
	for name, newRig := range map[string]func(*testing.T) *rig{"one domain": together, "apart": apart} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			r.Stage.NPUs = 2
			s, stop := r.decoder(decoder.Config{})
			defer stop()
			long := r.Model.Random(slices.Repeat(prompt(t, "case02"), 12), 300, 1)
			short := r.Model.Random(prompt(t, "case01"), 300, 3)
			r.deaf(true) // so that none ends meanwhile
			requests := map[string]wire.Request{}
			specs := map[string]*wire.Spec{}
			for range 2 {
				for _, spec := range []*wire.Spec{long, short} {
					req := r.start(spec)
					requests[req.ID], specs[req.ID] = req, spec
				}
			}
			for id, spec := range specs {
				for c := range spec.Choices {
					r.gateway.Tokens(id, c, 10)
				}
			}
			if s.Held(0).Seqs == 0 || s.Held(1).Seqs == 0 {
				t.Fatalf("%+v and %+v are on the NPUs", s.Held(0), s.Held(1))
			}
			npus := s.NPUs()
			if err := s.Vacate(t.Context(), 0); err != nil {
				t.Fatal(err)
			}
			if a, b := s.Held(0), s.Held(1); a.Seqs != 0 || a.Slabs != 0 || b.Seqs != 8 {
				t.Errorf("%+v and %+v are on the NPUs, all should be on the second", a, b)
			}
			r.Until("nothing is booked to the NPU that leaves", func() bool { return r.busy(npus[0].Number) == 0 })
			if name == "one domain" { // else its experts would have to be copied first
				r.swap(s, -1, npus[1].Number)
			}
			r.deaf(false)
			for id, spec := range specs {
				for c := range spec.Choices {
					r.same(spec, c, r.gateway.Ended(id, c))
				}
			}
			r.Empty(stage.Decode)
			if name == "one domain" {
				if err := s.HBM.Part(t.Context(), npus[0].Number); err != nil {
					t.Error(err)
				}
			}
			var last wire.Request
			for _, last = range requests {
				r.Done(last.ID, -1)
			}
			r.end(last)
		})
	}
}

// A sequence that moves is in every step but those that are computed while the HMM takes note of its copy, one call, however much there is to
// copy; in one memory domain it is in every step. The gateway sees no other gaps, one message being one step, than a metric counts.
func TestMovingMissesSteps(t *testing.T) {
	for name, newRig := range map[string]func(*testing.T) *rig{"one domain": together, "apart": apart} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			r.Stage.NPUs = 2
			s, stop := r.decoder(decoder.Config{})
			defer stop()
			const seen = 150 // tokens of each: none needs another slab by then, or a confirmation
			r.deaf(true)     // so that none ends
			type place struct {
				request string
				choice  int
			}
			var mu sync.Mutex
			tokens, absent := map[place]int{}, map[place]int{}
			sub, err := r.Bus.Handle(wire.SubjectTokens(r.gateway.ID), func(data []byte, _ func(any) error) {
				var m wire.Tokens
				if err := wire.Unmarshal(data, &m); err != nil || m.Instance != s.ID {
					return
				}
				mu.Lock()
				defer mu.Unlock()
				there := map[place]bool{}
				for _, run := range m.Items {
					at := place{run.Request, run.Choice}
					there[at] = true
					tokens[at] += len(run.IDs)
				}
				for at, n := range tokens {
					if !there[at] && n < seen {
						absent[at]++
					}
				}
			})
			if err != nil {
				t.Fatal(err)
			}
			defer sub.Unsubscribe() //nolint:errcheck // it ends with the connection
			spec := r.Model.Random(slices.Repeat(prompt(t, "case02"), 24)[:276], 300, 1)
			var requests []wire.Request
			for range 6 {
				requests = append(requests, r.start(spec))
			}
			for _, req := range requests {
				r.gateway.Tokens(req.ID, 0, 5)
			}
			moved := s.Held(0).Seqs
			if err := s.Vacate(t.Context(), 0); err != nil || moved == 0 || moved == len(requests) {
				t.Fatalf("%d sequences of %d have moved: %v", moved, len(requests), err)
			}
			for _, req := range requests {
				r.gateway.Tokens(req.ID, 0, seen-5)
			}
			families, err := s.Metrics.Registry.Gather()
			if err != nil {
				t.Fatal(err)
			}
			i := slices.IndexFunc(families, func(f *dto.MetricFamily) bool { return f.GetName() == "trireme_decode_move_missed_steps" })
			h := families[i].GetMetric()[0].GetHistogram()
			mu.Lock()
			sum, most := 0, 0
			for _, n := range absent {
				sum, most = sum+n, max(most, n)
			}
			mu.Unlock()
			if int(h.GetSampleCount()) != moved || int(h.GetSampleSum()) < sum || name == "one domain" && h.GetSampleSum() > 0 {
				t.Errorf("%d sequences have moved and missed %g steps; the gateway saw %d move, and %v steps without", h.GetSampleCount(), h.GetSampleSum(), moved, absent)
			}
			t.Logf("%d sequences have moved, and missed %d steps together, one of them at most %d", moved, sum, most)
			r.deaf(false)
			for _, req := range requests {
				r.same(spec, 0, r.gateway.Ended(req.ID, 0))
			}
			r.Empty(stage.Decode)
			for _, req := range requests[1:] {
				r.Done(req.ID, -1)
			}
			r.end(requests[0])
		})
	}
}

// Sequences that move to and fro all the time have the same answers; so they have when the decoder is killed meanwhile, told to stop, or
// both, and another one goes on.
func TestSequencesMoveAllTheTime(t *testing.T) {
	for name, newRig := range map[string]func(*testing.T) *rig{"one domain": together, "apart": apart} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			r.Stage.NPUs = 2
			long := r.Model.Random(slices.Repeat(prompt(t, "case02"), 12), 300, 1)
			short := r.Model.Random(prompt(t, "case01"), 300, 2)
			a, b := r.start(long), r.start(short)
			all := func(n int) {
				r.gateway.Tokens(a.ID, 0, n)
				for c := range short.Choices {
					r.gateway.Tokens(b.ID, c, n)
				}
			}
			r.deaf(true) // nothing ends before it has moved for a while
			for i := range 3 {
				p := r.Process() // moves them: see TestMain
				all(30 * (i + 1))
				p.Kill()
			}
			moving, cancel := context.WithCancel(t.Context())
			defer cancel()
			s, stop := r.decoder(decoder.Config{})
			go shuttle(moving, s, new(atomic.Int64))
			all(150)
			stop()
			cancel()
			s, stop = r.decoder(decoder.Config{})
			defer stop()
			moving, cancel = context.WithCancel(t.Context())
			var moves atomic.Int64
			var shuttling sync.WaitGroup
			shuttling.Go(func() { shuttle(moving, s, &moves) })
			r.Until("something has moved", func() bool { return moves.Load() > 0 })
			r.deaf(false)
			r.same(long, 0, r.gateway.Ended(a.ID, 0))
			for c := range short.Choices {
				r.same(short, c, r.gateway.Ended(b.ID, c))
			}
			cancel()
			shuttling.Wait()
			r.Done(a.ID, -1)
			r.end(b)
		})
	}
}
