package decoder_test

import (
	"context"
	"slices"
	"testing"

	"trireme.dev/services/decoder"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/wire"
)

// shuttle has the sequences of a stage move between its two NPUs until ctx ends. It returns how often an NPU that had some had none then.
func shuttle(ctx context.Context, s *stage.Stage) (moves int) {
	for slot := 0; ctx.Err() == nil; slot = 1 - slot {
		if !s.Ready() {
			continue
		}
		had := s.Held(slot).Seqs
		if s.Vacate(ctx, slot) == nil {
			if s.Stay(slot); had > 0 {
				moves++
			}
		}
	}
	return moves
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
			go shuttle(moving, s)
			all(150)
			stop()
			cancel()
			s, stop = r.decoder(decoder.Config{})
			defer stop()
			moving, cancel = context.WithCancel(t.Context())
			moves := make(chan int)
			go func() { moves <- shuttle(moving, s) }()
			r.deaf(false)
			r.same(long, 0, r.gateway.Ended(a.ID, 0))
			for c := range short.Choices {
				r.same(short, c, r.gateway.Ended(b.ID, c))
			}
			cancel()
			if n := <-moves; n == 0 {
				t.Error("nothing has moved")
			}
			r.Done(a.ID, -1)
			r.end(b)
		})
	}
}
