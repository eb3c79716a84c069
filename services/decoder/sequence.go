package decoder

import (
	"context"
	"fmt"
	"math"
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
	short     bool // and without it there is no next step
	moving    bool // to another NPU
	parked    bool // while it does, until the HMM has taken note
	missed    int  // steps, while it was parked

	// settling is for errands: held while the HMM takes note of another log, until s is where that is. A slab that comes meanwhile is for
	// neither place yet, and nobody may name the log before again.
	settling sync.Mutex

	life    context.Context // until the loop lets go; set by attend
	release func()          // ends life
	errands sync.WaitGroup  // running
	done    chan error      // one value: nil when the answer is complete

	seat    *stage.Seat   // on its NPU; set before the loop has it
	objects []*hbm.Object // all that is mapped for the sequence; the handler's before and after
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

// open makes this instance the writer of s on one of its NPUs, one with room, and rebuilds the sampler from the log. The first
// decoder of a sequence goes on in the pages that prefill has left with the message, if they are of its memory domain; all others
// go on in fresh ones (see succeed): a successor, whom the claim tells the log of the decoder before it, and one who takes a
// sequence from another domain or node.
func (d *decoder) open(ctx context.Context, s *sequence, handle mem.Handle) error {
	leave, err := d.Enter(ctx, s.claim)
	if err != nil {
		return err
	}
	defer leave()
	last, succeeds := s.claim.Log()
	if !succeeds {
		last = handle
	}
	has := -1 // where it is
	if last.Node == d.HBM.Node() {
		has = int(last.NPU)
	}
	err = d.Seat(has, kv.Slabs(len(s.spec.Prompt)), func(seat *stage.Seat) error {
		d.Free(ctx, s.objects...) // there was no room on the NPU before
		s.objects, s.seat = nil, seat
		if succeeds || d.far(s, handle) {
			return d.succeed(ctx, s, last)
		}
		return d.begin(ctx, s, handle)
	})
	if err != nil {
		s.seat = nil // it is given up
		return err
	}
	log := s.kv.Log
	answer := make([]int32, log.Committed())
	for i := range answer {
		rec, err := log.Record(i)
		if err != nil {
			return err
		}
		answer[i] = rec.Token
	}
	s.answer, s.last = len(answer), answer[len(answer)-1]
	s.seat.Grow(kv.Slabs(len(s.spec.Prompt)+s.answer) - kv.Slabs(len(s.spec.Prompt)))
	s.sampler = sample.New(stage.SampleParams(&s.spec.Sampling, s.choice), d.space, s.spec.Prompt, answer)
	return nil
}

// begin attaches what prefill has left. Nothing of it is written to before the HMM has taken note of the log.
func (d *decoder) begin(ctx context.Context, s *sequence, handle mem.Handle) error {
	objs, err := d.HBM.Attach(ctx, mem.ReadWrite, s.seat.Number(), handle)
	if err != nil {
		return err
	}
	s.objects = append(s.objects, objs...)
	log, err := kv.OpenLog(objs[0].Bytes())
	if err != nil {
		return err
	}
	if err := d.check(s, log); err != nil {
		return err
	}
	slabs, err := d.slabs(ctx, log, handle.Node, func(_ int, own bool) (mem.Access, int) {
		if own {
			return mem.ReadWrite, s.seat.Number()
		}
		return mem.ReadOnly, s.seat.Number()
	})
	s.objects = append(s.objects, slabs...)
	if err != nil {
		return err
	}
	if s.kv, err = kv.OpenSequence(&d.Model.Text, log, asSlabs(slabs)); err != nil {
		return err
	}
	if err := d.HBM.Inherit(ctx, s.claim, objs[0], nil, nil); err != nil {
		return err
	}
	log.SetGeneration(s.claim.Generation())
	return nil
}

// far reports whether the NPU of s has to copy what a handle names before it can compute with it.
func (d *decoder) far(s *sequence, h mem.Handle) bool {
	return h.Node != d.HBM.Node() || d.HBM.Far(int(h.NPU), s.seat.Number())
}

// succeed goes on where another one has left off, whose log last is: the decoder before, or prefill in another memory
// domain or on another node. That decoder may only have been taken for dead and write again at any time, so nothing that
// it can write to is read after this. What is copied is copied here, beside the step loop.
func (d *decoder) succeed(ctx context.Context, s *sequence, last mem.Handle) error {
	place := -1 // where it is
	if last.Node != d.HBM.Node() {
		place = s.seat.Number() // the HMM brings it here
	}
	objs, err := d.HBM.Attach(ctx, mem.ReadOnly, place, last)
	if err != nil {
		return err
	}
	s.objects = append(s.objects, objs...)
	before, err := kv.OpenLog(kv.Snapshot(objs[0].Bytes()))
	if err != nil {
		return err
	}
	if err := d.check(s, before); err != nil {
		return err
	}
	var known stage.Prefix
	var keys []hbm.Key
	far := d.far(s, last)
	if far {
		keys = d.BlockKeys(s.spec, s.spec.Prompt)
		if known, err = d.Known(ctx, s.seat.Number(), s.spec, keys); err != nil {
			return err
		}
		s.objects = append(s.objects, known.Slabs...)
	}
	c, err := before.Continuation(kv.Known{Slabs: asSlabs(known.Slabs), Blocks: known.Blocks}, func(slab mem.Handle) bool {
		return place < 0 && d.HBM.Far(int(slab.NPU), s.seat.Number())
	})
	if err != nil {
		return err
	}
	slabs, err := d.slabs(ctx, before, last.Node, func(i int, _ bool) (mem.Access, int) {
		switch {
		case slices.Contains(c.Share, i):
			return mem.ReadOnly, s.seat.Number()
		case slices.Contains(c.Skip, i):
			return mem.ReadOnly, absent
		}
		return mem.ReadOnly, place
	})
	for _, o := range slabs {
		if o != nil {
			s.objects = append(s.objects, o)
		}
	}
	if err != nil {
		return err
	}
	from, err := kv.OpenSequence(&d.Model.Text, before, asSlabs(slabs))
	if err != nil {
		return err
	}
	specs := []hbm.Spec{{Kind: mem.KindLog, NPU: s.seat.Number(), Bytes: c.Shape.Bytes()}}
	for range c.Fresh {
		specs = append(specs, hbm.Spec{Kind: mem.KindKV, NPU: s.seat.Number(), Bytes: kv.SlabBytes(&d.Model.Text)})
	}
	fresh, err := d.HBM.Alloc(ctx, specs...)
	if err != nil {
		return fmt.Errorf("taking memory to go on in: %w", err)
	}
	s.objects = append(s.objects, fresh...)
	hbm.Prefault(fresh...)
	log, err := kv.CreateLog(fresh[0].Bytes(), c.Shape, s.claim.Generation())
	if err != nil {
		return err
	}
	began := time.Now()
	if s.kv, err = from.Continue(&d.Model.Text, c, log, asSlabs(fresh[1:]), hbm.Copier(ctx)); err != nil {
		return err
	}
	if n := before.BlockCount() - len(known.Blocks); far && place < 0 {
		d.Copied(ctx, stage.Copy{Role: stage.Decode, Bytes: int64(n) * d.BlockBytes(), Tokens: n * model.BlockTokens}, began)
	}
	old, drop := slices.Clone(objs), []mem.Handle{last}
	keep := append(slices.Clone(fresh[1:]), known.Slabs...)
	for i, o := range slabs {
		if slices.Contains(c.Share, i) {
			keep = append(keep, o)
			continue
		}
		old = append(old, o)
		if s.spec.Choices == 1 { // other choices may have blocks in it
			h, _, err := before.Slab(i)
			if err != nil {
				return err
			}
			h.Node = last.Node
			drop = append(drop, h)
		}
	}
	if err := d.HBM.Inherit(ctx, s.claim, fresh[0], keep, drop); err != nil {
		return err
	}
	d.Free(ctx, old...)
	if far { // who takes another one that begins alike need not copy it again
		d.CacheBlocks(ctx, s.kv, keys, len(known.Blocks))
	}
	return nil
}

// check compares a log with the request.
func (d *decoder) check(s *sequence, log *kv.Log) error {
	shape := log.Shape()
	if shape.Request != s.request.ID || shape.Choice != s.choice || shape.Attempt != s.request.Attempt ||
		shape.Prompt != len(s.spec.Prompt) || shape.MaxTokens != s.spec.Sampling.MaxTokens || log.Committed() == 0 {
		return fmt.Errorf("the log is of another sequence: %w", mem.ErrCorrupt)
	}
	for i := range log.Committed() {
		rec, err := log.Record(i)
		if err != nil {
			return err
		}
		if rec.Token < 0 || int(rec.Token) >= d.Model.Text.Vocab {
			return fmt.Errorf("token %d of a vocabulary of %d: %w", rec.Token, d.Model.Text.Vocab, mem.ErrCorrupt)
		}
	}
	return nil
}

// absent stands for the NPU of a slab that is not to be attached.
const absent = math.MinInt

// slabs attaches the slabs of a log, in its order; how says in which way, by number and whether they are the log's own;
// absent leaves nil in the slab's place. With an error it returns those that it has attached, in any order.
func (d *decoder) slabs(ctx context.Context, log *kv.Log, node string, how func(i int, own bool) (mem.Access, int)) ([]*hbm.Object, error) {
	type way struct {
		access mem.Access
		npu    int
	}
	slabs := make([]*hbm.Object, log.SlabCount())
	at := map[way][]int{}
	handles := map[way][]mem.Handle{}
	for i := range slabs {
		h, own, err := log.Slab(i)
		if err != nil {
			return nil, err
		}
		h.Node = node
		var w way
		if w.access, w.npu = how(i, own); w.npu == absent {
			continue
		}
		at[w], handles[w] = append(at[w], i), append(handles[w], h)
	}
	for w, numbers := range at {
		objs, err := d.HBM.Attach(ctx, w.access, w.npu, handles[w]...)
		if err != nil {
			return slices.DeleteFunc(slabs, func(o *hbm.Object) bool { return o == nil }), err
		}
		for n, o := range objs {
			slabs[numbers[n]] = o
		}
	}
	return slabs, nil
}

func asSlabs(objs []*hbm.Object) []kv.Slab {
	slabs := make([]kv.Slab, len(objs))
	for i, o := range objs {
		if o != nil {
			slabs[i] = o
		}
	}
	return slabs
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
