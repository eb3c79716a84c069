package prefill

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"trireme.dev/shared/engine"
	"trireme.dev/shared/engine/sample"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/kv"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/model"
	"trireme.dev/shared/sched"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/wire"
)

// job is one request in work. After it was added, the loop owns it until done is sent.
type job struct {
	request wire.Request
	ctx     context.Context // of the work
	place   wire.Place      // Waited and Left as of the loop's epoch
	spec    *wire.Spec
	claim   *hbm.Claim
	rope    [][3]int32 // M-RoPE position of each prompt token
	delta   int        // position of token i >= len(prompt) is i+delta
	visual  []picture
	choices []choice
	seat    *stage.Seat   // on its NPU
	mm      []*hbm.Object // mapped for reading
	hits    int           // pictures that were in the MM cache
	memory  []*hbm.Object // KV and logs
	keys    []hbm.Key     // of the prompt's full KV blocks; nil: not known yet
	shared  int           // of these, from the first on, in others' slabs, which are in memory, too
	cached  int           // prompt tokens that came from the cache
	left    int           // choices whose first token is still to come
	rows    int           // computed
	owes    int           // of owed: see owe
	done    chan error    // one value
}

// picture is one picture's planes and place in the prompt.
type picture struct {
	first, tokens int
	planes        [][]float32 // device, each [tokens, hidden]
}

// choice is one of the n answers.
type choice struct {
	object  *hbm.Object // of the log
	log     *kv.Log
	slabs   []*hbm.Object // its own
	seq     *kv.Sequence
	sampler *sample.Sampler
	over    bool // it had ended when the job began: nothing is computed for it alone
}

// lane is one run of rows to compute: the prompt (and choice 0's resumed tokens), or another choice's resumed tokens.
type lane struct {
	job    *job
	choice int
	pos    int // tokens computed
	tokens []int32
	item   sched.Item // its place in line
}

// resume is the tokens that choice c already has and goes on from.
func (j *job) resume(c int) []int32 {
	if j.spec.Resume == nil || j.choices[c].over {
		return nil
	}
	return j.spec.Resume[c]
}

// prepare maps what is cached of the prompt and the MM objects of the rest, and allocates KV slabs and token logs. They
// are this process' own until publish: what an instance that dies before has computed is of no use to anybody.
func (p *prefill) prepare(ctx context.Context, j *job, mm []mem.Handle) error {
	leave, err := p.Enter(ctx, j.claim)
	if err != nil {
		return err
	}
	defer leave()
	prompt := j.spec.Prompt
	var grids []engine.Grid
	for _, pic := range j.spec.Pictures {
		grids = append(grids, engine.Grid{T: pic.Grid[0], H: pic.Grid[1], W: pic.Grid[2]})
	}
	spans, err := engine.Spans(prompt, grids, p.Model.Vision)
	if err != nil {
		return &stage.Fault{Status: 500, Err: err}
	}
	j.rope, j.delta = engine.Positions(prompt, grids, p.Model.Vision)

	if j.keys == nil {
		j.keys = p.BlockKeys(j.spec, prompt)
	}
	err = p.Seat(p.near(ctx, j.spec, mm, j.keys), kv.Slabs(len(prompt))+j.spec.Choices-1, func(seat *stage.Seat) error {
		p.Free(ctx, append(j.mm, j.memory...)...) // there was no room on the NPU before
		j.mm, j.memory, j.visual, j.seat = nil, nil, nil, seat
		return p.room(ctx, j, mm, spans)
	})
	if err != nil {
		j.seat = nil // it is given up
	}
	return err
}

// room has on the job's NPU what prepare says; spans are where the pictures are in the prompt.
func (p *prefill) room(ctx context.Context, j *job, mm []mem.Handle, spans []engine.Span) error {
	if err := p.allocate(ctx, j); err != nil {
		return err
	}
	var wanted []mem.Handle
	var of []int // picture of each wanted object; those wholly in the cached prefix are not needed
	for i, s := range spans {
		if s.Start+s.Len > j.cached {
			if mm[i].Kind == 0 { // the encoder found its KV in the cache, but that was evicted since: the next attempt has it encoded
				return fmt.Errorf("picture %d is neither encoded nor in the cached prefix: %w", i+1, mem.ErrGone)
			}
			wanted, of = append(wanted, mm[i]), append(of, i)
		}
	}
	began := time.Now()
	objs, err := p.HBM.Attach(ctx, mem.ReadOnly, j.seat.Number(), wanted...)
	if err != nil {
		return fmt.Errorf("attaching MM objects: %w", err)
	}
	j.mm = objs
	fetched := stage.Copy{Role: stage.Prefill}
	for n, o := range objs {
		if o.Fetched() {
			fetched.Bytes += o.Handle().Bytes
			fetched.Visual += spans[of[n]].Len
		}
	}
	p.Copied(ctx, fetched, began)
	for n, o := range objs {
		i := of[n]
		if err := o.Verify(); err != nil {
			if ferr := p.HBM.Forget(ctx, o); ferr != nil { // or the next attempt would be given it again
				err = errors.Join(err, ferr)
			}
			return fmt.Errorf("picture %d: %w", i+1, err)
		}
		all, tokens := o.Floats(), spans[i].Len
		plane := tokens * p.Model.Text.Hidden
		if len(all) != plane*p.Model.Vision.Levels() {
			return fmt.Errorf("picture %d: MM object of %d floats for %d tokens: %w", i+1, len(all), tokens, mem.ErrCorrupt)
		}
		pic := picture{first: spans[i].Start, tokens: tokens}
		for l := range p.Model.Vision.Levels() {
			pic.planes = append(pic.planes, all[l*plane:(l+1)*plane])
		}
		j.visual = append(j.visual, pic)
	}
	return nil
}

// allocate takes, for each choice, a token log and the slabs for what is not shared and a first piece of the answer; the
// decoder adds more as the answer grows. Of what is cached of the prompt, whole slabs are shared, and the rest is copied,
// like all that lies in another memory domain: a sequence never holds more slabs than its length needs, which is what
// admission counts (RATIONALE.md).
func (p *prefill) allocate(ctx context.Context, j *job) error {
	s := j.spec
	prefix, err := p.Prefix(ctx, j.seat.Number(), s, j.keys)
	if err != nil {
		return fmt.Errorf("looking for the prompt in the cache: %w", err)
	}
	j.shared = prefix.Shared
	whole := j.shared / kv.SlabBlocks // slabs
	j.memory = append(j.memory, prefix.Slabs[:whole]...)
	copied := prefix.Slabs[whole:] // from these; held until then
	defer func() { p.Free(ctx, copied...) }()
	shape := kv.LogShape{
		Request: j.request.ID, Attempt: j.request.Attempt, Prompt: len(s.Prompt), MaxTokens: s.Sampling.MaxTokens,
		MaxSlabs: kv.Slabs(len(s.Prompt)+s.Sampling.MaxTokens) + 2,
		Top:      max(s.Sampling.Logprobs, 0),
	}
	j.choices = make([]choice, s.Choices)
	for c := range j.choices {
		j.choices[c].over = p.Ended(j.request, c)
	}
	var specs []hbm.Spec
	slabs := make([]int, s.Choices)
	for c := range s.Choices {
		specs = append(specs, hbm.Spec{Kind: mem.KindLog, NPU: j.seat.Number(), Bytes: shape.Bytes()})
		// A fork needs room for its open block and its resumed tokens only; its prompt blocks are choice 0's.
		positions := len(s.Prompt)%model.BlockTokens + len(j.resume(c)) + 1
		if c == 0 {
			positions = len(s.Prompt) + len(j.resume(0)) + 1 - j.shared*model.BlockTokens
		}
		slabs[c] = kv.Slabs(positions)
		for range slabs[c] {
			specs = append(specs, hbm.Spec{Kind: mem.KindKV, NPU: j.seat.Number(), Bytes: kv.SlabBytes(&p.Model.Text)})
		}
	}
	objs, err := p.HBM.Alloc(ctx, specs...)
	if errors.Is(err, mem.ErrExhausted) && len(copied) > 0 { // perhaps for the sake of these: their part is computed
		p.Free(ctx, copied...)
		copied, prefix.Blocks = nil, prefix.Blocks[:j.shared]
		objs, err = p.HBM.Alloc(ctx, specs...)
	}
	if err != nil {
		return fmt.Errorf("allocating KV of %d tokens and %d choices: %w", len(s.Prompt), s.Choices, err)
	}
	j.memory = append(j.memory, objs...)
	hbm.Prefault(objs...)
	for c := range j.choices {
		shape.Choice = c
		ch := &j.choices[c]
		ch.object, ch.slabs, objs = objs[0], objs[1:1+slabs[c]], objs[1+slabs[c]:]
		if ch.log, err = kv.CreateLog(ch.object.Bytes(), shape, j.claim.Generation()); err != nil {
			return err
		}
		for i, id := range j.resume(c) {
			if err := ch.log.Append(kv.Record{Index: i, Token: id, Logprob: float32(math.NaN())}); err != nil {
				return err
			}
		}
		ch.sampler = sample.New(stage.SampleParams(&s.Sampling, c), p.space, s.Prompt, j.resume(c))
		if c > 0 {
			continue // forked when the prompt is computed
		}
		ch.seq = kv.NewSequence(&p.Model.Text, ch.log)
		if err := p.reuse(ctx, j, ch, &prefix); err != nil {
			return err
		}
	}
	return nil
}

// reuse begins choice 0 with what is cached of the prompt, and gives it its own slabs.
func (p *prefill) reuse(ctx context.Context, j *job, ch *choice, prefix *stage.Prefix) error {
	slabs := make([]kv.Slab, len(prefix.Slabs))
	for i, o := range prefix.Slabs {
		slabs[i] = o
	}
	n, err := ch.seq.Share(slabs, prefix.Blocks[:j.shared])
	if errors.Is(err, mem.ErrCorrupt) { // the attempt ends: it has no room for what it would have to compute now
		return errors.Join(err, p.forget(ctx, prefix, n))
	}
	if err != nil {
		return err
	}
	for _, slab := range ch.slabs {
		if err := ch.seq.AddSlab(slab); err != nil {
			return err
		}
	}
	began := time.Now()
	n, err = ch.seq.Copy(slabs, prefix.Blocks[j.shared:], hbm.Copier(ctx))
	n += j.shared
	far := 0
	for _, b := range prefix.Blocks[j.shared:n] {
		if prefix.Slabs[b.Slab].Far(j.seat.Number()) {
			far++
		}
	}
	p.Copied(ctx, stage.Copy{Role: stage.Prefill, Bytes: int64(far) * p.BlockBytes(), Tokens: far * model.BlockTokens}, began)
	j.cached = n * model.BlockTokens
	if errors.Is(err, mem.ErrCorrupt) { // the rest is computed
		p.Log.Warn("a cached prompt is damaged", "request", j.request.ID, "error", err)
		return p.forget(ctx, prefix, n)
	}
	return err
}

// forget takes the slab of a wrong block out of the cache, lest the next one is given it again.
func (p *prefill) forget(ctx context.Context, prefix *stage.Prefix, block int) error {
	return p.HBM.Forget(ctx, prefix.Slabs[prefix.Blocks[block].Slab])
}

// fork starts choice c behind the computed prompt of choice 0.
func (p *prefill) fork(j *job, c int) error {
	ch := &j.choices[c]
	var err error
	ch.seq, err = j.choices[0].seq.Fork(&p.Model.Text, ch.log, len(j.spec.Prompt), ch.slabs[0], j.seat.Compute().Copy)
	if err != nil {
		return fmt.Errorf("forking choice %d: %w", c, err)
	}
	for _, sl := range ch.slabs[1:] {
		if err := ch.seq.AddSlab(sl); err != nil {
			return err
		}
	}
	return nil
}
