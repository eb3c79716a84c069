package decoder

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"trireme.dev/shared/engine/sample"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/kv"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/model"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/wire"
)

type key struct {
	request string
	choice  int
}

// sequence is one choice in work. After it was added, the loop owns it until done is sent, but for what is said to be
// the handler's.
type sequence struct {
	request wire.Request // this and the next three never change
	choice  int
	spec    *wire.Spec
	claim   *hbm.Claim

	kv      *kv.Sequence
	sampler *sample.Sampler
	delta   int   // M-RoPE position of token i is i+delta
	answer  int   // tokens of the answer
	last    int32 // the newest of them, whose KV is not yet written
	input   [1]int32

	confirmed int  // tokens that the gateway has in order
	asking    bool // a confirmation is under way
	growing   bool // a slab is under way

	life    context.Context // until the loop lets go; set by attend
	release func()          // ends life
	errands sync.WaitGroup  // running
	done    chan error      // one value: nil when the answer is complete

	// The handler's, and its errands' while they run.
	objects []*hbm.Object // all that is mapped for the sequence
	silent  time.Time     // since when the gateway has not answered; zero: it has
}

// errand runs f beside the loop until the loop lets go of s.
func (s *sequence) errand(f func(context.Context)) { s.errands.Go(func() { f(s.life) }) }

func newSequence(m *wire.Decode, spec *wire.Spec, claim *hbm.Claim) *sequence {
	return &sequence{
		request: m.Request, choice: m.Choice, spec: spec, claim: claim, delta: m.RopeBase,
		done: make(chan error, 1),
	}
}

func (s *sequence) key() key { return key{s.request.ID, s.choice} }

// finish says whether the newest token is the last.
func (s *sequence) finish() wire.Finish {
	return stage.FinishOf(&s.spec.Sampling, s.answer-1, s.last)
}

// open attaches log and slabs and rebuilds the sampler from the log. It serves the first decoder of a sequence and,
// after a death, its successor alike. A successor goes on in the same pages: the writer before it is fenced by the
// claim, and in mode exact whatever it may still write has the same bits.
func (d *decoder) open(ctx context.Context, s *sequence, handle mem.Handle) error {
	objs, err := d.HBM.Attach(ctx, mem.ReadWrite, d.NPU, handle)
	if err != nil {
		return err
	}
	s.objects = append(s.objects, objs...)
	log, err := kv.OpenLog(objs[0].Bytes())
	if err != nil {
		return err
	}
	shape := log.Shape()
	if shape.Request != s.request.ID || shape.Choice != s.choice || shape.Attempt != s.request.Attempt ||
		shape.Prompt != len(s.spec.Prompt) || shape.MaxTokens != s.spec.Sampling.MaxTokens || log.Committed() == 0 {
		return fmt.Errorf("the log is of another sequence: %w", mem.ErrCorrupt)
	}
	slabs, err := d.slabs(ctx, s, log, handle.Node)
	if err != nil {
		return err
	}
	if s.kv, err = kv.OpenSequence(&d.Model.Text, log, slabs); err != nil {
		return err
	}
	answer := make([]int32, log.Committed())
	for i := range answer {
		rec, err := log.Record(i)
		if err != nil {
			return err
		}
		if rec.Token < 0 || int(rec.Token) >= d.Model.Text.Vocab {
			return fmt.Errorf("token %d of a vocabulary of %d: %w", rec.Token, d.Model.Text.Vocab, mem.ErrCorrupt)
		}
		answer[i] = rec.Token
	}
	s.answer, s.last = len(answer), answer[len(answer)-1]
	s.sampler = sample.New(stage.SampleParams(&s.spec.Sampling, s.choice), d.space, s.spec.Prompt, answer)
	if !s.claim.Held() {
		return mem.ErrFenced
	}
	log.SetGeneration(s.claim.Generation())
	return nil
}

// slabs maps the slabs of a log: its own for writing, those that hold blocks of others for reading.
func (d *decoder) slabs(ctx context.Context, s *sequence, log *kv.Log, node string) ([]kv.Slab, error) {
	slabs := make([]kv.Slab, log.SlabCount())
	for _, access := range []mem.Access{mem.ReadWrite, mem.ReadOnly} {
		var handles []mem.Handle
		var at []int
		for i := range slabs {
			h, own, err := log.Slab(i)
			if err != nil {
				return nil, err
			}
			if own == (access == mem.ReadWrite) {
				h.Node = node
				handles, at = append(handles, h), append(at, i)
			}
		}
		objs, err := d.HBM.Attach(ctx, access, d.NPU, handles...)
		if err != nil {
			return nil, err
		}
		s.objects = append(s.objects, objs...)
		for n, o := range objs {
			slabs[at[n]] = o
		}
	}
	return slabs, nil
}

// cache enters the blocks that the answer has filled into the prefix index, for the next turn of the conversation. The
// loop has let go of s.
func (d *decoder) cache(ctx context.Context, s *sequence) {
	tokens := slices.Clone(s.spec.Prompt)
	for i := range s.kv.Log.Committed() {
		rec, err := s.kv.Log.Record(i)
		if err != nil {
			return // the next one to open the log says so
		}
		tokens = append(tokens, rec.Token)
	}
	// From the first block of a slab on, named by prefill before: a slab that is named as a whole is shared as a whole.
	from := len(s.spec.Prompt) / model.BlockTokens / kv.SlabBlocks * kv.SlabBlocks
	d.CacheBlocks(ctx, s.kv, d.BlockKeys(s.spec, tokens), from)
}
