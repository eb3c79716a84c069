package decoder_test

import (
	"context"
	"log/slog"
	"slices"
	"testing"

	"github.com/nats-io/nats.go"

	"trireme.dev/services/decoder"
	"trireme.dev/services/hmm"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/kv"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/stage/stagetest"
)

// apart is a rig whose NPUs are memory domains of their own. The test, which plays prefill, has NPU 0.
func apart(t *testing.T) *rig {
	t.Helper()
	serve := func(ctx context.Context, socket string, conn *nats.Conn, log *slog.Logger) error {
		return hmm.Run(ctx, hmm.Config{Socket: socket, Node: "n", NPUs: 4, NPUBytes: npuBytes, HostBytes: 16 << 20, NATS: conn, PerNPU: true}, log)
	}
	r := &rig{Rig: stagetest.New(t, serve, stagetest.Long), T: t}
	r.gateway = r.Gateway()
	return r
}

// held is the bytes of KV and logs of an NPU that somebody holds.
func (r *rig) held(npu int) (n int64) {
	for _, kind := range []mem.Kind{mem.KindKV, mem.KindLog} {
		u := r.Stats().Memory[npu+1].Kinds[kind.String()]
		n += u.Used + u.Padded - u.Cached
	}
	return n
}

// A decoder that is a memory domain of its own copies the sequence; then prefill's domain is free, however many choices
// there are, and successors in third domains go on alike.
func TestSequencesBetweenDomains(t *testing.T) {
	r := apart(t)
	for _, choices := range []int{1, 3} {
		spec := r.Model.Random(slices.Repeat(prompt(t, "case02"), 20), 400, choices)
		r.deaf(true) // they park in the middle
		_, stop := r.decoder(decoder.Config{})
		req := r.start(spec)
		for c := range choices {
			r.gateway.Tokens(req.ID, c, 100)
		}
		r.Until("prefill's domain is free", func() bool { return r.held(0) == 0 })
		if r.held(1) == 0 || r.held(2) != 0 {
			t.Errorf("%d and %d bytes are held in the other domains, want all in the first", r.held(1), r.held(2))
		}
		stop()
		r.deaf(false)
		busy, err := hbm.Dial(t.Context(), r.Stage.HMM, hbm.Hello{Instance: "busy", Role: "encode", NPUs: 1})
		if err != nil || busy.NPUs()[0] != 1 {
			t.Fatalf("the test does not get the first decoder's NPU: %v", err)
		}
		s, stop := r.decoder(decoder.Config{})
		if s.NPUs()[0].Number != 2 {
			t.Fatalf("the successor has NPU %d", s.NPUs()[0].Number)
		}
		for c := range choices {
			r.same(spec, c, r.gateway.Ended(req.ID, c))
		}
		r.Until("the domain of the decoder before is free", func() bool { return r.held(0)+r.held(1) == 0 })
		r.end(req)
		stop()
		if err := busy.Close(); err != nil {
			t.Error(err)
		}
	}
	r.gateway.NothingLost()
}

// Sequences that begin alike are copied once into a domain, as far as whole slabs go.
func TestKnownBlocksAreNotCopiedAgain(t *testing.T) {
	r := apart(t)
	r.decoder(decoder.Config{})
	r.deaf(true)
	tokens := slices.Repeat(prompt(t, "case02"), 45)
	if n := kv.Blocks(len(tokens)); n <= 2*kv.SlabBlocks || n >= 3*kv.SlabBlocks {
		t.Fatalf("a prompt of %d blocks does not fill two slabs and a part", n)
	}
	slab := mem.Padded(kv.SlabBytes(&r.Model.Config.Text), mem.HostPage)
	slabs := func() int64 {
		u := r.Stats().Memory[2].Kinds[mem.KindKV.String()]
		return (u.Used + u.Padded - u.Cached) / slab
	}
	spec := r.Model.Greedy(tokens, 16)
	first := r.start(spec)
	r.gateway.Tokens(first.ID, 0, 16)
	alone := slabs()
	other := r.Model.Random(append(slices.Clone(tokens[:len(tokens)-40]), tokens[:40]...), 16, 2) // the same first slabs
	second := r.start(other)
	for c := range 2 {
		r.gateway.Tokens(second.ID, c, 16)
	}
	if n := slabs(); alone != 3 || n != alone+2 {
		t.Errorf("%d slabs are held for one sequence, %d for three that begin alike; want 3 and 5", alone, n)
	}
	r.deaf(false)
	r.same(spec, 0, r.gateway.Ended(first.ID, 0))
	r.Done(first.ID, -1)
	for c := range 2 {
		r.same(other, c, r.gateway.Ended(second.ID, c))
	}
	r.end(second)
	r.gateway.NothingLost()
}
