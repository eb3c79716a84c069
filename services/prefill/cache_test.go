package prefill_test

import (
	"context"
	"log/slog"
	"slices"
	"testing"

	"github.com/nats-io/nats.go"

	"trireme.dev/services/hmm"
	"trireme.dev/services/prefill"
	"trireme.dev/shared/kv"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/model"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/stagetest"
	"trireme.dev/shared/wire"
)

func cachingHMM(ctx context.Context, socket string, conn *nats.Conn, log *slog.Logger) error {
	return hmm.Run(ctx, hmm.Config{Socket: socket, Node: "n", NPUs: 4, NPUBytes: 64 << 20, HostBytes: 16 << 20, NATS: conn, KVCache: 32 << 20}, log)
}

// The second request with a prompt computes its last block only, from the same bytes: those of a whole slab in the same
// place, the others copied; a picture wholly in the cached part is not even looked at. A cached block that was damaged
// costs an attempt if it is to be shared, and is computed if it is to be copied; either way it is not used again.
func TestPromptsBeginInTheCache(t *testing.T) {
	r := &rig{Rig: stagetest.New(t, cachingHMM, stagetest.Long), T: t}
	r.gateway = r.Gateway()
	r.prefill(prefill.Config{})
	cases := stagetest.Cases(t)
	c := &cases[12] // three pictures
	spec, mm := r.Model.Spec(c)
	spec.Prompt = slices.Concat(spec.Prompt, slices.Repeat(cases[1].Input, 8)) // more than a slab
	want := r.Model.Answer(spec, 0, mm...)
	prompt := len(spec.Prompt)
	most := (prompt - 1) / model.BlockTokens * model.BlockTokens
	run := func(m *wire.Prefill) (wire.Run, sequence) {
		t.Helper()
		s := r.open(r.decodes(1)[m.Request.ID+"/0"])
		if got := r.token(s.log, 0); got != want.IDs[0] {
			t.Errorf("first token %d, want %d", got, want.IDs[0])
		}
		return r.gateway.Tokens(m.Request.ID, 0, 1).Runs[0], s
	}
	m := r.start(spec, mm...)
	first, cold := run(m)
	if first.Cached != 0 || first.Computed != prompt || first.Pictures != 3 {
		t.Errorf("the first request: %+v", first)
	}
	r.Done(m.Request.ID, -1)

	m = &wire.Prefill{Request: r.Request(r.gateway.ID), Hits: 3}
	m.Inline, m.Spec = r.Spec(m.Request, spec)
	for i, p := range spec.Pictures {
		if tokens := len(mm[i]) / (r.Model.Config.Vision.Levels() * r.Model.Config.Text.Hidden); p.Offset+tokens <= most {
			m.MM = append(m.MM, mem.Handle{Node: "nowhere"})
			continue
		}
		m.MM = append(m.MM, r.Put(m.Request, mem.KindMM, stagetest.Bytes(mm[i])))
	}
	r.publish(m)
	again, warm := run(m)
	if again.Cached != most || again.Computed != prompt-most || again.Hits != 3 {
		t.Errorf("the second request: %+v, want %d of %d tokens cached", again, most, prompt)
	}
	r.sameKV("warm", warm.blocks, cold.blocks)
	if full := prompt / model.BlockTokens; full <= kv.SlabBlocks || full >= 2*kv.SlabBlocks || len(warm.slabs) != 2 {
		t.Fatalf("%d full blocks in %d slabs, want a whole slab and a part of another", full, len(warm.slabs))
	}
	for i := range most / model.BlockTokens {
		a, b := cold.slabs[cold.refs[i].Slab], warm.slabs[warm.refs[i].Slab]
		same := a.Object == b.Object && a.Generation == b.Generation && cold.refs[i].Block == warm.refs[i].Block
		if whole := i < kv.SlabBlocks; same != whole || !warm.refs[i].Sealed {
			t.Errorf("block %d is shared: %v, sealed: %v", i, same, warm.refs[i].Sealed)
		}
	}
	r.Done(m.Request.ID, -1)

	// Another picture under the same text.
	other := *spec
	other.Pictures = append([]wire.Picture(nil), spec.Pictures...)
	other.Pictures[0].Content[0] ^= 1
	m = r.start(&other, mm...)
	if got, _ := run(m); got.Cached > spec.Pictures[0].Offset {
		t.Errorf("with another picture at %d: %+v", spec.Pictures[0].Offset, got)
	}
	r.Done(m.Request.ID, -1)

	for n, left := range []int{0, kv.SlabBlocks * model.BlockTokens} { // of the cache, when slab n is damaged
		r.Attach(mem.ReadWrite, cold.slabs[n]).Bytes()[5] ^= 1
		if n == 0 {
			m = r.start(spec, mm...)
			if lost := r.gateway.Lost(1)[0]; lost.Request != m.Request.ID || lost.Final {
				t.Errorf("with a damaged block to be shared: %+v", lost)
			}
			r.Done(m.Request.ID, -1)
		}
		m = r.start(spec, mm...)
		if got, _ := run(m); got.Cached != left || got.Computed != prompt-left {
			t.Errorf("after the damage in slab %d: %+v", n, got)
		}
		r.Done(m.Request.ID, -1)
	}
	r.Empty(stage.Prefill)
}
