package prefill_test

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/services/decoder"
	"trireme.dev/services/hmm"
	"trireme.dev/services/prefill"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/kv"
	"trireme.dev/shared/leaktest"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/model"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/stagetest"
	"trireme.dev/shared/wire"
)

// childRows is the environment's name for the rows of a batch of a process (see stagetest.Child); 1 by default.
const childRows = "PREFILL_TEST_ROWS"

func TestMain(m *testing.M) {
	stagetest.Child(stage.Prefill, func(ctx context.Context, s *stage.Stage) error {
		rows, err := strconv.Atoi(cmp.Or(os.Getenv(childRows), "1"))
		if err != nil {
			return err
		}
		return prefill.Serve(ctx, s, prefill.Config{Rows: rows})
	})
	leaktest.VerifyTestMain(m)
}

func serveHMM(ctx context.Context, socket string, conn *nats.Conn, log *slog.Logger) error {
	return hmm.Run(ctx, hmm.Config{Socket: socket, Node: "n", NPUs: 4, NPUBytes: 64 << 20, HostBytes: 16 << 20, NATS: conn, KVCache: -1}, log)
}

// rig is a test's surroundings with a gateway.
type rig struct {
	*stagetest.Rig
	*testing.T
	gateway *stagetest.Gateway
}

func newRig(t *testing.T, ackWait time.Duration) *rig {
	t.Helper()
	r := &rig{Rig: stagetest.New(t, serveHMM, ackWait), T: t}
	r.gateway = r.Gateway()
	return r
}

// prefill starts a prefill instance.
func (r *rig) prefill(cfg prefill.Config) (*stage.Stage, func()) {
	r.Helper()
	return r.Open(stage.Prefill, func(ctx context.Context, s *stage.Stage) error { return prefill.Serve(ctx, s, cfg) })
}

// start publishes the prefill message of a request, as a gateway or an encoder does.
func (r *rig) start(spec *wire.Spec, mm ...[]float32) *wire.Prefill {
	r.Helper()
	m := &wire.Prefill{Request: r.Request(r.gateway.ID)}
	m.Inline, m.Spec = r.Spec(m.Request, spec)
	for _, one := range mm {
		m.MM = append(m.MM, r.Put(m.Request, mem.KindMM, stagetest.Bytes(one)))
	}
	r.publish(m)
	return m
}

func (r *rig) publish(m *wire.Prefill) {
	r.Helper()
	r.Publish(stage.Prefill, m.Request.ID, m)
}

// decodes takes the n decode messages of requests, by request and choice.
func (r *rig) decodes(n int) map[string]*wire.Decode {
	r.Helper()
	out := map[string]*wire.Decode{}
	for _, d := range r.Pull(stage.Decode, n) {
		m := new(wire.Decode)
		if err := wire.Unmarshal(d.Data, m); err != nil {
			r.Fatal(err)
		}
		key := fmt.Sprintf("%s/%d", m.Request.ID, m.Choice)
		if out[key] != nil {
			r.Errorf("two decode messages of %s", key)
		}
		out[key] = m
	}
	return out
}

// sequence is what a decoder finds.
type sequence struct {
	log    *kv.Log
	blocks [][]float32
	refs   []kv.BlockRef
	slabs  []mem.Handle // by number in the log
}

// open attaches what a decode message names, for the rest of the test, and checks what a decoder checks.
func (r *rig) open(m *wire.Decode) sequence {
	r.Helper()
	log, err := kv.OpenLog(r.Attach(mem.ReadOnly, m.Log).Bytes())
	if err != nil {
		r.Fatal(err)
	}
	s := sequence{log: log}
	var slabs []kv.Slab
	for i := range log.SlabCount() {
		h, _, err := log.Slab(i)
		if err != nil {
			r.Fatal(err)
		}
		h.Node = m.Log.Node
		s.slabs = append(s.slabs, h)
		slabs = append(slabs, r.Attach(mem.ReadOnly, h))
	}
	seq, err := kv.OpenSequence(&r.Model.Config.Text, log, slabs)
	if err != nil {
		r.Fatal(err)
	}
	s.blocks = seq.Blocks
	for i := range log.BlockCount() {
		ref, err := log.Block(i)
		if err != nil {
			r.Fatal(err)
		}
		s.refs = append(s.refs, ref)
	}
	return s
}

// sameKV compares KV with the reference's, block by block.
func (r *rig) sameKV(name string, got, want [][]float32) {
	r.Helper()
	if len(got) != len(want) {
		r.Errorf("%s: %d blocks of KV, want %d", name, len(got), len(want))
		return
	}
	for i := range want {
		if !slices.Equal(got[i], want[i]) {
			r.Errorf("%s: KV block %d differs", name, i)
		}
	}
}

// token is the token at an index of a log.
func (r *rig) token(log *kv.Log, i int) int32 {
	r.Helper()
	rec, err := log.Record(i)
	if err != nil {
		r.Fatal(err)
	}
	return rec.Token
}

// Whatever the chunks and whoever shares a batch, a prompt gives the same first token and the same bytes of KV.
func TestChunksChangeNothing(t *testing.T) {
	cases := stagetest.Cases(t)
	for _, rows := range []int{512, 64, 7} {
		t.Run(fmt.Sprintf("%d rows", rows), func(t *testing.T) {
			r := newRig(t, stagetest.Long)
			r.prefill(prefill.Config{Rows: rows})
			picked := []int{1, 3, 12, 14, 23} // text, one picture, three, one of odd size, ten
			if rows == 7 {
				picked = picked[:3]
			}
			prefills := map[int]*wire.Prefill{}
			specs := map[int]*wire.Spec{}
			embeddings := map[int][][]float32{}
			for _, i := range picked {
				specs[i], embeddings[i] = r.Model.Spec(&cases[i])
			}
			for _, i := range picked { // close together, so that batches are shared
				prefills[i] = r.start(specs[i], embeddings[i]...)
			}
			decodes := r.decodes(len(picked))
			for _, i := range picked {
				c := cases[i]
				m := decodes[prefills[i].Request.ID+"/0"]
				s := r.open(m)
				if s.log.Committed() != 1 || r.token(s.log, 0) != c.Output[0] {
					t.Errorf("%s: %d tokens, the first is %d, want %d", c.Name, s.log.Committed(), r.token(s.log, 0), c.Output[0])
				}
				r.sameKV(c.Name, s.blocks, r.Model.Prompt(specs[i], embeddings[i]...))
				a := r.gateway.Tokens(m.Request.ID, 0, 1)
				if run := a.Runs[0]; run.Generation != 0 || run.Computed != len(c.Input) || run.Index != 0 || run.IDs[0] != c.Output[0] {
					t.Errorf("%s: first run %+v", c.Name, run)
				}
				r.Done(m.Request.ID, -1)
			}
			r.gateway.NothingLost()
			r.Empty(stage.Prefill)
		})
	}
}

// Choices share the blocks of the prompt that are full, and have copies of the open one.
func TestChoicesShareTheirPrompt(t *testing.T) {
	r := newRig(t, stagetest.Long)
	r.prefill(prefill.Config{Rows: 20})
	cases := stagetest.Cases(t)
	for _, length := range []int{7, 16, 28, 300} { // no full block, no open one, both, two slabs
		prompt := slices.Repeat(cases[1].Input, 300/28+1)[:length]
		spec := r.Model.Random(prompt, 30, 3)
		m := r.start(spec)
		decodes := r.decodes(3)
		want := r.Model.Prompt(spec)
		first := r.open(decodes[m.Request.ID+"/0"])
		full := length / model.BlockTokens
		used := map[string]bool{}
		for c := range 3 {
			name := fmt.Sprintf("%d tokens, choice %d", length, c)
			s := first
			if c > 0 {
				s = r.open(decodes[fmt.Sprintf("%s/%d", m.Request.ID, c)])
			}
			r.sameKV(name, s.blocks, want)
			if got, want := r.token(s.log, 0), r.Model.Answer(spec, c).IDs[0]; got != want {
				t.Errorf("%s: first token %d, alone %d", name, got, want)
			}
			for i, ref := range s.refs {
				place := fmt.Sprint(s.slabs[ref.Slab].Object, "/", ref.Block)
				switch {
				case i < full && (s.slabs[ref.Slab].Object != first.slabs[first.refs[i].Slab].Object || ref.Block != first.refs[i].Block):
					t.Errorf("%s: full block %d is not shared", name, i)
				case i < full && !ref.Sealed, i >= full && ref.Sealed:
					t.Errorf("%s: block %d is sealed: %v", name, i, ref.Sealed)
				case i >= full && used[place]:
					t.Errorf("%s: open block %d is another's too", name, i)
				}
				used[place] = true
			}
		}
		r.Done(m.Request.ID, -1)
	}
	r.gateway.NothingLost()
}

// A request that goes on from tokens that its client has ends as it would have undisturbed: choices of all lengths,
// some with nothing yet, some complete.
func TestResumeGoesOn(t *testing.T) {
	r := newRig(t, stagetest.Long)
	s, _ := r.prefill(prefill.Config{Rows: 24})
	cases := stagetest.Cases(t)
	spec, mm := r.Model.Spec(&cases[6])
	spec.Choices = 5
	spec.Sampling.Temperature, spec.Sampling.Seed, spec.Sampling.MaxTokens, spec.Sampling.Frequency = 1.2, 3, 40, 0.2
	var whole []stagetest.Sequence
	for c := range spec.Choices {
		whole = append(whole, r.Model.Answer(spec, c, mm...))
	}
	has := []int{7, 0, len(whole[2].IDs), 1, len(whole[4].IDs) - 1}
	for c, n := range has {
		spec.Resume = append(spec.Resume, whole[c].IDs[:n])
	}
	m := r.start(spec, mm...)
	r.Until("it is computed", func() bool { return r.Outcomes(s, "done") == 1 })
	decodes := r.decodes(spec.Choices)
	for c, n := range has {
		d := decodes[fmt.Sprintf("%s/%d", m.Request.ID, c)]
		got := r.open(d)
		next := min(n+1, len(whole[c].IDs))
		if got.log.Committed() != next {
			t.Errorf("choice %d, which had %d tokens, has %d now, want %d", c, n, got.log.Committed(), next)
		}
		for i := range next {
			if id := r.token(got.log, i); id != whole[c].IDs[i] {
				t.Errorf("choice %d: token %d is %d, undisturbed %d", c, i, id, whole[c].IDs[i])
			}
		}
		resumed := *spec
		resumed.Prompt = slices.Concat(spec.Prompt, whole[c].IDs[:n])
		r.sameKV(fmt.Sprint("choice ", c), got.blocks, r.Model.Prompt(&resumed, mm...))
		r.Publish(stage.Decode, d.Request.ID, d) // back to the queue, for a decoder
	}
	// To the end by a real decoder; the gateway has what the client had.
	for c, n := range has {
		r.gateway.Have(m.Request.ID, c, whole[c].IDs[:n])
	}
	r.Open(stage.Decode, func(ctx context.Context, s *stage.Stage) error { return decoder.Serve(ctx, s, decoder.Config{}) })
	for c := range has {
		a := r.gateway.Ended(m.Request.ID, c)
		if !slices.Equal(a.IDs, whole[c].IDs) || a.Finish != whole[c].Finish {
			t.Errorf("choice %d: %v (%d), undisturbed %v (%d)", c, a.IDs, a.Finish, whole[c].IDs, whole[c].Finish)
		}
	}
	r.Empty(stage.Decode)
	r.gateway.NothingLost()
}

// part is the claim of a request.
func part(req wire.Request) hbm.Part {
	return hbm.Part{Request: req.ID, Attempt: req.Attempt, Stage: stage.Prefill, Left: req.Left}
}
