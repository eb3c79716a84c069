package encoder

import (
	"trireme.dev/shared/engine"
	"trireme.dev/shared/stage"
)

// epoch is the benches of other NPUs than the present ones; behind the switch, of those that have left.
type epoch struct {
	e     *encoder
	npus  []bench // by slot
	stay  []bool  // by slot: it has its bench already
	made  []*engine.Encoder
	count int
}

// Prepare implements stage.EpochWorker.
func (e *encoder) Prepare(npus []stage.NPU) (stage.WorkerEpoch, error) {
	c := &epoch{e: e, npus: make([]bench, len(npus)), stay: make([]bool, len(npus))}
	present := e.NPUs()
	for slot, n := range npus {
		if n.Compute == nil {
			continue
		}
		c.count++
		if slot < len(e.line.npus) && present[slot].Compute == n.Compute {
			c.stay[slot] = true
			continue
		}
		v := e.Model.Vision
		engine, err := engine.NewEncoder(e.Model, n.Weights, n.Compute, e.prep.MaxPixels/(v.Patch*v.Patch))
		if err != nil {
			c.Close()
			return nil, err
		}
		c.npus[slot].engine, c.made = engine, append(c.made, engine)
	}
	return c, nil
}

// Switch implements stage.WorkerEpoch.
func (c *epoch) Switch() {
	c.made = nil
	l := &c.e.line
	present := l.npus
	for slot := range c.npus {
		if c.stay[slot] {
			c.npus[slot], present[slot].engine = present[slot], nil
		}
	}
	for _, b := range present {
		if b.engine != nil {
			c.made = append(c.made, b.engine)
		}
	}
	l.npus = c.npus
	c.e.ahead.widen(c.count)
}

// Close implements stage.WorkerEpoch.
func (c *epoch) Close() {
	for _, engine := range c.made {
		engine.Close()
	}
}

// anyNPU is the number on the node of one of the instance's NPUs.
func (e *encoder) anyNPU() int {
	for _, n := range e.NPUs() {
		if n.Compute != nil {
			return n.Number
		}
	}
	panic("BUG: an instance without NPUs has work")
}
