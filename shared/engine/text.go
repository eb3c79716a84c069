package engine

import (
	"fmt"
	"sync"
	"sync/atomic"

	"trireme.dev/shared/kernel"
	"trireme.dev/shared/model"
)

// NPU is one of the NPUs that a Text computes on. One without Compute stands for a slot that has none.
type NPU struct {
	Compute kernel.Compute
	// Weights lie in the NPU's memory. Of the experts only those in Experts are used.
	Weights *model.Weights
	// Experts says where the experts lie that this NPU has: [Layers][Experts]. Experts without data (Down.Data nil) are on
	// other NPUs; each is on one at least. Nil: those of Weights.
	Experts [][]model.Expert
}

// Text is the language model: a decoder with grouped-query attention over paged KV and mixture-of-experts layers
// (Qwen3VLMoeTextModel, Qwen3MoeModel). It is used by one goroutine at a time.
//
// With several NPUs attention is data-parallel: each sequence is computed by the NPU that has its KV blocks. Experts are spread
// over all NPUs, some may be on several: in each layer an expert's rows go to an NPU that has it, and their results come back
// (dispatch.go). Results of a row are summed where the row is, in the order of the router's ranking, so that answers are the
// same bits on any number of NPUs, wherever experts lie.
type Text struct {
	name   string // of the model
	cfg    model.Text
	lim    Limits
	shape  kernel.AttnShape
	rotary rotary
	byNPU  []*part // by slot; nil: there is no NPU
	parts  []*part // those there are, in this order

	next   atomic.Pointer[placed] // where the experts lie
	placed *placed                // in the batch being computed
	batch  []Seq                  // being computed
	out    [][]float32
	meet   *barrier
	ended  sync.WaitGroup // goroutines of parts

	observe     func(layer int, routerLogits []float32)
	routerLogit []float32 // host, for observe
}

// NewText prepares the language model for batches within lim on the NPUs in the given slots, at least one and at most 64, of which
// some may be empty: whatever names an NPU (Seq.NPU, SetExperts) names its slot. It allocates its scratch from each NPU's Compute, all of one
// digest, which must outlive it, and keeps the weights; the NPUs may compute something else meanwhile. It returns ErrModel when the
// weights do not fit the configuration, kernel.ErrNoMemory when an NPU has no room.
func NewText(cfg model.Config, npus []NPU, lim Limits) (*Text, error) {
	t, err := Reserve(cfg, npus, lim)
	if err != nil {
		return nil, err
	}
	if err := t.SetWeights(npus); err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

// Reserve is NewText before there are weights: it allocates the scratch, which takes a while, and looks at nothing but the NPUs' Computes.
// Until SetWeights nothing can be computed.
func Reserve(cfg model.Config, npus []NPU, lim Limits) (_ *Text, err error) {
	count := 0
	for _, n := range npus {
		if n.Compute != nil {
			count++
		}
	}
	if count == 0 || len(npus) > maxNPUs || lim.Rows <= 0 || lim.Seqs <= 0 {
		return nil, fmt.Errorf("language model of %s: %d NPUs in %d slots, batches of %d rows and %d sequences",
			cfg.Name, count, len(npus), lim.Rows, lim.Seqs)
	}
	m := cfg.Text
	t := &Text{
		name: cfg.Name, cfg: m, lim: lim,
		shape:  kernel.AttnShape{Layers: m.Layers, Heads: m.Heads, KVHeads: m.KVHeads, Dim: m.HeadDim},
		rotary: newRotary(m.Rope, m.HeadDim),
		byNPU:  make([]*part, len(npus)),
		out:    make([][]float32, 0, count*lim.Seqs),
		meet:   newBarrier(count),
	}
	defer func() {
		if err != nil {
			t.free()
		}
	}()
	var digest string
	for i, n := range npus {
		if n.Compute == nil {
			continue
		}
		if got := n.Compute.Digest(); digest == "" {
			digest = got
		} else if got != digest {
			return nil, fmt.Errorf("language model of %s: kernels %s on NPU %d, %s on those before", cfg.Name, got, i, digest)
		}
		t.byNPU[i] = newPart(t, i, npus, count)
		t.parts = append(t.parts, t.byNPU[i])
		if err := t.byNPU[i].memory.err; err != nil {
			return nil, fmt.Errorf("language model of %s on NPU %d: %w", cfg.Name, i, err)
		}
	}
	for _, p := range t.parts[1:] {
		t.ended.Go(func() {
			for range p.wake {
				p.forward()
			}
		})
	}
	return t, nil
}

// SetWeights gives a Text that Reserve has made for these NPUs their weights, once, before all else. It returns ErrModel when they do not fit
// the configuration.
func (t *Text) SetWeights(npus []NPU) error {
	tables := make([][][]model.Expert, len(npus))
	for i, n := range npus {
		if n.Compute == nil {
			continue
		}
		if err := checkText(&t.cfg, n.Weights); err != nil {
			return fmt.Errorf("language model of %s on NPU %d: %w", t.name, i, err)
		}
		if tables[i] = n.Experts; tables[i] == nil {
			for l := range n.Weights.Layers {
				tables[i] = append(tables[i], n.Weights.Layers[l].Experts)
			}
		}
		t.byNPU[i].w = n.Weights
	}
	if err := t.SetExperts(tables); err != nil {
		return fmt.Errorf("language model of %s: %w", t.name, err)
	}
	return nil
}

// Close ends the goroutines and gives the scratch back; logits of the last Forward stay. No Forward may run or follow, but the NPUs may
// compute something else, such as another Text.
func (t *Text) Close() {
	for _, p := range t.parts[1:] {
		close(p.wake)
	}
	t.ended.Wait()
	t.free()
}

func (t *Text) free() {
	for _, p := range t.parts {
		p.memory.free()
	}
}

// Limits returns the limits the Text was made for.
func (t *Text) Limits() Limits { return t.lim }

// Observe has f called with the router logits of each mixture-of-experts layer, [rows of the batch, Experts], host
// memory valid during the call. It is for tests and verification, on one NPU: with f set, Forward computes all rows of the last
// layer too. A nil f ends it.
func (t *Text) Observe(f func(layer int, routerLogits []float32)) {
	if len(t.parts) > 1 {
		panic("BUG: router logits of several NPUs are observed")
	}
	t.observe = f
	if f != nil && t.routerLogit == nil {
		t.routerLogit = make([]float32, t.lim.Rows*t.cfg.Experts)
	}
}

// Forward computes one batch: it writes keys and values of all new tokens into their blocks and returns the logits
// that are wanted. logits[i] belongs to seqs[i] and is nil, [Vocab] (Want) or [len(Tokens), Vocab] (All), host memory
// valid until the next call. It returns ErrBatch, before anything is computed, when the batch is malformed or over the
// limits. It allocates nothing. The result for a sequence does not depend on the others in the batch, nor on how its
// prompt was cut into chunks (kernel, Batch invariance), nor on which NPU has it.
func (t *Text) Forward(seqs []Seq) (logits [][]float32, err error) {
	if err := t.plan(seqs); err != nil {
		return nil, err
	}
	t.out = t.out[:len(seqs)]
	clear(t.out)
	if len(seqs) == 0 {
		return t.out, nil
	}
	t.batch, t.placed = seqs, t.next.Load()
	for _, p := range t.parts[1:] {
		p.wake <- struct{}{}
	}
	t.parts[0].forward()
	t.batch, t.placed = nil, nil
	for _, p := range t.parts {
		p.forget()
	}
	return t.out, nil
}

// plan checks a batch and gives each sequence to its NPU's part.
func (t *Text) plan(seqs []Seq) error {
	for _, p := range t.parts {
		p.begin()
	}
	for i := range seqs {
		s := &seqs[i]
		if err := t.check(s); err != nil {
			return fmt.Errorf("%w: sequence %d: %w", ErrBatch, i, err)
		}
		t.byNPU[s.NPU].take(i, s)
	}
	for _, p := range t.parts {
		if len(p.own) > t.lim.Seqs || p.rows > t.lim.Rows || p.wanted > t.lim.Seqs {
			return fmt.Errorf("%w: %d sequences, %d rows and logits of %d on NPU %d, the limits are %d, %d and %d", ErrBatch,
				len(p.own), p.rows, p.wanted, p.npu, t.lim.Seqs, t.lim.Rows, t.lim.Seqs)
		}
	}
	return nil
}
