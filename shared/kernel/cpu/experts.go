package cpu

import (
	"trireme.dev/shared/kernel/check"
	"trireme.dev/shared/model"
)

// routing is the scratch of Route and Experts.
type routing struct {
	probs []float32 // [experts]
	count []int32   // [experts+1], slots before each expert
	order []int32   // [rows*topK], slots by expert, in rising order inside one
}

// Route ranks by logit, which is the order of the exact probabilities, and sums the softmax in 16 lanes.
func (c *compute) Route(logits []float32, rows, experts, topK int, norm bool, ids []int32, weights []float32) {
	check.Route(logits, rows, experts, topK, ids, weights)
	c.scratch.probs = grow(c.scratch.probs, experts)
	probs := c.scratch.probs
	for r := range rows {
		row := logits[r*experts:][:experts]
		chosen, to := ids[r*topK:][:topK], weights[r*topK:][:topK]
		choose := 0
		for e, v := range row {
			// Insert e behind all chosen ones that are not smaller: the earlier id goes first among equals.
			k := choose
			for k > 0 && v > row[chosen[k-1]] {
				k--
			}
			if k >= topK {
				continue
			}
			if choose < topK {
				choose++
			}
			copy(chosen[k+1:choose], chosen[k:choose-1])
			chosen[k] = int32(e)
		}
		if topK == 0 {
			continue
		}
		c.vec.exp(probs, row, row[chosen[0]])
		var total float32
		if norm {
			for _, e := range chosen {
				total += probs[e]
			}
		} else {
			total = c.vec.sum(probs)
		}
		for k, e := range chosen {
			to[k] = probs[e] / total
		}
	}
}

// Experts sorts the slots by expert, so that each expert's weights are read once for all rows sent to it, then
// computes Gate and Up with SiLUMul, then Down, each spread over experts and outputs. A slot's result does not depend
// on the slots beside it.
func (c *compute) Experts(out, x []float32, rows, topK int, ids []int32, experts []model.Expert) {
	hidden := check.Experts(out, x, rows, topK, ids, experts)
	slots := rows * topK
	order, count := c.sortSlots(ids, experts)
	t := &c.experts
	items, gate, up := t.items[:0], t.gate, t.up
	inner, flops := 0, 0
	for e := range experts {
		if n := int(count[e+1] - count[e]); n > 0 {
			inner = max(inner, experts[e].Gate.Rows)
			flops += n * 2 * hidden * experts[e].Gate.Rows
		}
	}
	gate, up = grow(gate, slots*inner), grow(up, slots*inner)
	*t = expertsTask{
		c: c, x: x, out: out, topK: topK, hidden: hidden, inner: inner, gate: gate, up: up,
		experts: experts, order: order,
	}
	items = t.step(items, count, 2*flops)
	t.down = true
	items = t.step(items, count, flops)
	*t = expertsTask{gate: gate, up: up, items: items}
}

// sortSlots orders the slots that have an expert here: those of expert e are order[count[e]:count[e+1]].
func (c *compute) sortSlots(ids []int32, experts []model.Expert) (order, count []int32) {
	s := &c.scratch
	s.order, s.count = grow(s.order, len(ids)), grow(s.count, len(experts)+2)
	order, count = s.order, s.count
	clear(count)
	for _, e := range ids {
		if experts[e].Down.Data != nil {
			count[e+2]++
		}
	}
	for e := 2; e < len(count); e++ {
		count[e] += count[e-1]
	}
	for slot, e := range ids {
		if experts[e].Down.Data != nil {
			order[count[e+1]] = int32(slot)
			count[e+1]++
		}
	}
	return order, count[:len(experts)+1]
}

// expertsTask is one of the two steps of Experts.
type expertsTask struct {
	c        *compute
	down     bool
	x, out   []float32
	topK     int
	hidden   int
	inner    int       // width of gate and up: the largest ExpertHidden
	gate, up []float32 // [slots, inner]
	experts  []model.Expert
	order    []int32
	items    []expertItem
}

// expertItem is outputs [from, to) of one expert, for the slots order[first:end].
type expertItem struct {
	expert, first, end, from, to int
}

// step cuts the step into items of like size and runs them. It returns items to be used again.
func (t *expertsTask) step(items []expertItem, count []int32, flops int) []expertItem {
	total := 0
	for e := range t.experts {
		total += int(count[e+1]-count[e]) * t.outputs(e)
	}
	n := t.c.pool.pieces(flops, max(1, total/lanes))
	items = items[:0]
	for e := range t.experts {
		slots, outputs := int(count[e+1]-count[e]), t.outputs(e)
		if slots == 0 {
			continue
		}
		parts := 1
		if n > 1 {
			parts = max(1, min((slots*outputs*n+total-1)/total, outputs/lanes))
		}
		for i := range parts {
			from, to := share(outputs, lanes, i, parts)
			items = append(items, expertItem{expert: e, first: int(count[e]), end: int(count[e+1]), from: from, to: to})
		}
	}
	t.items = items
	if n == 1 {
		t.c.pool.alone(t, len(items))
	} else {
		t.c.pool.do(t, len(items))
	}
	return items
}

func (t *expertsTask) outputs(e int) int {
	if t.down {
		return t.experts[e].Down.Rows
	}
	return t.experts[e].Gate.Rows
}

func (t *expertsTask) run(worker, i int) {
	item := &t.items[i]
	e, w, vec := &t.experts[item.expert], &t.c.workers[worker], t.c.vec
	slots := t.order[item.first:item.end]
	if t.down {
		p := product{
			x: t.gate, out: t.out, w: e.Down, rows: len(slots),
			xStride: t.inner, outStride: t.hidden, index: slots,
		}
		p.run(vec, w, 0, len(slots), item.from, item.to)
		return
	}
	p := product{x: t.x, out: t.gate, w: e.Gate, rows: len(slots), outStride: t.inner, index: slots, share: t.topK}
	p.run(vec, w, 0, len(slots), item.from, item.to)
	p.w, p.out = e.Up, t.up
	p.run(vec, w, 0, len(slots), item.from, item.to)
	for _, slot := range slots {
		at := int(slot) * t.inner
		vec.siluMul(t.gate[at+item.from:at+item.to], t.up[at+item.from:at+item.to])
	}
}

func (c *compute) Combine(dst, slots []float32, rows, topK int, weights []float32) {
	hidden := check.Combine(dst, slots, rows, topK, weights)
	w := &c.workers[0]
	w.sum = grow(w.sum, hidden)
	for r := range rows {
		clear(w.sum)
		c.vec.accumulate(w.sum, slots[r*topK*hidden:][:topK*hidden], hidden, weights[r*topK:][:topK], 1)
		c.vec.accumulate(dst[r*hidden:][:hidden], w.sum, hidden, one, 1)
	}
}

// grow returns s with n elements, allocating only if it must. Old elements may be lost.
func grow[T any](s []T, n int) []T {
	if cap(s) < n {
		return make([]T, n)
	}
	return s[:n]
}
