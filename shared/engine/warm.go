package engine

import (
	"fmt"
	"time"
)

// Warm has the NPUs in some slots compute a row each, with every expert that they have, so that the first batch does not wait for
// what touches memory for the first time. They compute alone, one after the other, on the caller's goroutine, and nothing else
// meanwhile; the Text's other NPUs are left alone. Like Forward it is called by who uses the Text. The error is that of a Compute
// which has no room for a KV block. It returns how long it took.
func (t *Text) Warm(npus ...int) (took time.Duration, err error) {
	start := time.Now()
	for _, npu := range npus {
		if err := t.byNPU[npu].warm(); err != nil {
			return time.Since(start), fmt.Errorf("warming NPU %d up: %w", npu, err)
		}
	}
	return time.Since(start), nil
}

// warm computes the first token of a sequence as forward does, but for the experts: all of them that are here, instead of those that the
// router chooses.
func (p *part) warm() error {
	t, cfg, c := p.t, &p.t.cfg, p.c
	block, err := c.Alloc(cfg.BlockFloats())
	if err != nil {
		return err
	}
	defer c.Free(block)
	p.begin()
	t.batch = []Seq{{NPU: p.npu, Tokens: []int32{0}, Blocks: [][]float32{block}, Want: true}}
	t.placed, t.out = t.next.Load(), t.out[:1]
	p.take(0, &t.batch[0])
	if p.meter != nil {
		p.meter.Begin(p.work())
	}
	p.angles()
	p.embed()
	for l := range cfg.Layers {
		p.keys(l)
		p.attend(l)
		if cfg.Dense[l] {
			p.feed(l)
			continue
		}
		k, w := cfg.TopK, &p.w.Layers[l]
		hidden, normed, router := p.hidden[:cfg.Hidden], p.normed[:cfg.Hidden], p.router[:cfg.Experts]
		c.RMSNorm(normed, hidden, 1, w.PostNorm, cfg.RMSEps)
		c.Linear(router, normed, 1, w.Router, nil)
		c.Route(router, 1, cfg.Experts, k, cfg.NormTopK, p.experts[:k], p.weights[:k])
		for e := 0; e < cfg.Experts; e += k { // those that are elsewhere, or no experts at all, have no data
			for i := range k {
				p.experts[i] = int32(min(e+i, cfg.Experts))
			}
			p.compute(l, 1)
		}
		c.Combine(hidden, p.slots[:k*cfg.Hidden], 1, k, p.weights[:k])
	}
	p.head()
	if p.meter != nil {
		p.meter.End()
	}
	c.Sync()
	t.batch, t.placed = nil, nil
	p.forget()
	return nil
}
