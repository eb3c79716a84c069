package engine

import (
	"fmt"
	"math/bits"
	"sync/atomic"

	"trireme.dev/shared/model"
)

// maxNPUs is the most slots of a Text: a set of them is a word.
const maxNPUs = 64

// placed says where the experts lie.
type placed struct {
	// tables[npu][layer] has the experts that the NPU has, and one more at the end that no NPU has: slots that are computed
	// elsewhere, or by another copy, are its (kernel.Compute.Experts leaves them alone). Of slots without NPU there is none.
	tables [][][]model.Expert
	has    [][]uint64 // [layer][expert]: the set of the NPUs that have it
}

// SetExperts has batches from the next Forward on find the experts in other memory: tables[npu][layer] has one entry for each
// expert, without data (Down.Data nil) if the NPU does not have it, none in a dense layer; that of a slot without NPU is empty. All
// NPUs change in the same batch. A Forward that runs meanwhile ends with the tables that it began with, and the memory of those must
// stay as long. It may be called from any goroutine, and returns ErrModel, changing nothing, when the shapes are not the model's or
// an expert is nowhere.
func (t *Text) SetExperts(tables [][][]model.Expert) error {
	if len(tables) != len(t.byNPU) {
		return fmt.Errorf("experts on NPUs in %d slots, there are %d: %w", len(tables), len(t.byNPU), ErrModel)
	}
	p := &placed{has: make([][]uint64, t.cfg.Layers), tables: make([][][]model.Expert, len(tables))}
	for npu, table := range tables {
		if t.byNPU[npu] == nil {
			if len(table) > 0 {
				return fmt.Errorf("experts on NPU %d, where there is none: %w", npu, ErrModel)
			}
			continue
		}
		if err := checkExperts(&t.cfg, table); err != nil {
			return fmt.Errorf("experts on NPU %d: %w", npu, err)
		}
		own := make([][]model.Expert, len(table))
		for l, experts := range table {
			own[l] = append(append(make([]model.Expert, 0, len(experts)+1), experts...), model.Expert{})
			if p.has[l] == nil {
				p.has[l] = make([]uint64, len(experts))
			}
			for e := range experts {
				if experts[e].Down.Data != nil {
					p.has[l][e] |= 1 << npu
				}
			}
		}
		p.tables[npu] = own
	}
	for l, experts := range p.has {
		for e, npus := range experts {
			if npus == 0 && !t.cfg.Dense[l] {
				return fmt.Errorf("%w: expert %d of layer %d is on no NPU", ErrModel, e, l)
			}
		}
	}
	t.next.Store(p)
	return nil
}

// exchange is what one NPU sends to the others in a layer, and where it has put what they have sent. Other parts read it only
// between the two meetings of the layer; where the rows that it has received begin, behind the second one too.
type exchange struct {
	to     []parcel // [npu]
	base   []int    // [npu]: the first row of those received from it
	given  []int32  // [npu]: slots that were given to it
	number []int32  // 0, 1, 2, …: rows one behind the other
	here   []int32  // slots where results go
	there  []int32  // and those that they come from
}

// parcel is what goes to one NPU: rows of normed, and of each the experts that it is for.
type parcel struct {
	rows []int32
	ids  []int32 // [rows, TopK]; slots that are not for that NPU have the number of no expert
}

// newExchange has room for the rows of an NPU, and of all of them for what they send to one.
func newExchange(npus []NPU, all, rows, topK int) exchange {
	x := exchange{
		to: make([]parcel, len(npus)), base: make([]int, len(npus)), given: make([]int32, len(npus)), number: make([]int32, all),
		here: make([]int32, 0, rows*topK), there: make([]int32, 0, rows*topK),
	}
	for i := range x.to {
		if npus[i].Compute == nil {
			continue
		}
		x.to[i] = parcel{rows: make([]int32, 0, rows), ids: make([]int32, 0, rows*topK)}
	}
	for i := range x.number {
		x.number[i] = int32(i)
	}
	return x
}

// dispatch has the experts that a layer's router has chosen for the rows of normed computed, here or elsewhere, and puts the
// results into slots; and computes those of other NPUs' rows that are here.
//
// NPUs meet when all have routed their rows, and when all have computed what was sent to them. Each fetches what it needs: rows
// before it computes, results behind. What it fetches from stays as it is until the other one has been at the next meeting.
func (p *part) dispatch(layer int) {
	t, cfg, k := p.t, &p.t.cfg, p.t.cfg.TopK
	if len(t.parts) == 1 {
		p.compute(layer, p.rows)
		return
	}
	p.address(layer)
	p.c.Sync()
	t.meet.wait(p.place)
	rows := p.rows
	for _, from := range t.parts {
		parcel := &from.to[p.npu]
		n := len(parcel.rows)
		if from == p || n == 0 {
			continue
		}
		p.base[from.npu] = rows
		p.c.Fetch(p.normed, p.number[rows:rows+n], from.normed, parcel.rows, cfg.Hidden)
		copy(p.experts[rows*k:], parcel.ids)
		rows += n
	}
	p.compute(layer, rows)
	p.c.Sync()
	t.meet.wait(p.place)
	for _, by := range t.parts {
		parcel, base := &p.to[by.npu], by.base[p.npu]
		if by == p || len(parcel.rows) == 0 {
			continue
		}
		p.here, p.there = p.here[:0], p.there[:0]
		for i, id := range parcel.ids {
			if int(id) < cfg.Experts {
				p.here = append(p.here, parcel.rows[i/k]*int32(k)+int32(i%k))
				p.there = append(p.there, int32(base*k+i))
			}
		}
		p.c.Fetch(p.slots, p.here, by.slots, p.there, cfg.Hidden)
	}
}

// compute computes the slots of the first rows of normed whose experts are here.
func (p *part) compute(layer, rows int) {
	if rows > 0 {
		hidden, k := p.t.cfg.Hidden, p.t.cfg.TopK
		p.c.Experts(p.slots[:rows*k*hidden], p.normed[:rows*hidden], rows, k, p.experts[:rows*k], p.t.placed.tables[p.npu][layer])
	}
}

// address decides which NPU computes each slot, and fills the parcels. Where several have the expert it is the one that has
// been given the fewest slots from here, those that only it can have included; among equals this NPU, then those behind it.
func (p *part) address(layer int) {
	k, none := p.t.cfg.TopK, int32(p.t.cfg.Experts)
	ids, has := p.experts[:p.rows*k], p.t.placed.has[layer]
	clear(p.given)
	for i := range p.to {
		p.to[i].rows, p.to[i].ids = p.to[i].rows[:0], p.to[i].ids[:0]
	}
	for _, id := range ids {
		if npus := has[id]; npus&(npus-1) == 0 {
			p.given[bits.TrailingZeros64(npus)]++
		}
	}
	for slot, id := range ids {
		npu := p.choose(has[id])
		if npu == p.npu {
			continue
		}
		parcel, row := &p.to[npu], int32(slot/k)
		if n := len(parcel.rows); n == 0 || parcel.rows[n-1] != row {
			parcel.rows = append(parcel.rows, row)
			for range k {
				parcel.ids = append(parcel.ids, none)
			}
		}
		parcel.ids[len(parcel.ids)-k+slot%k] = id
		ids[slot] = none
	}
}

// choose picks one of a set of NPUs.
func (p *part) choose(npus uint64) int {
	if npus&(npus-1) == 0 {
		return bits.TrailingZeros64(npus)
	}
	best, behind := -1, 0
	for ; npus != 0; npus &= npus - 1 {
		n := bits.TrailingZeros64(npus)
		d := n - p.npu // how far behind this NPU, round and round
		if d < 0 {
			d += len(p.given)
		}
		if best < 0 || p.given[n] < p.given[best] || p.given[n] == p.given[best] && d < behind {
			best, behind = n, d
		}
	}
	p.given[best]++
	return best
}

// count adds to the load of a layer's experts.
func (p *part) count(layer int, ids []int32) {
	load := p.load[layer*p.t.cfg.Experts:]
	for _, id := range ids {
		load[id].Add(1)
	}
}

// Load adds to each element of load[layer][expert] the number of rows that the router has sent to the expert since the Text was
// made; load has a length of Layers and of Experts, or 0 in dense layers. It may be called at any time by any goroutine.
func (t *Text) Load(load [][]uint64) {
	for _, p := range t.parts {
		for l := range load {
			for e := range load[l] {
				load[l][e] += p.load[l*t.cfg.Experts+e].Load()
			}
		}
	}
}

// barrier is where n goroutines, numbered from 0, wait until all have come. It is used again and again and allocates nothing.
type barrier struct {
	arrived atomic.Int32
	gates   []chan struct{} // one for each, with a token when all have come
}

func newBarrier(n int) *barrier {
	b := &barrier{gates: make([]chan struct{}, n)}
	for i := range b.gates {
		b.gates[i] = make(chan struct{}, 1)
	}
	return b
}

func (b *barrier) wait(i int) {
	if int(b.arrived.Add(1)) < len(b.gates) {
		<-b.gates[i]
		return
	}
	b.arrived.Store(0)
	for j, gate := range b.gates {
		if j != i {
			gate <- struct{}{}
		}
	}
}
