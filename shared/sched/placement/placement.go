// Package placement decides which NPUs of an instance have which experts: a placement that balances the measured load and is
// reached from the present one by copying as little as possible. It is arithmetic, without clock, device or randomness: from
// the same arguments comes the same plan, on any machine.
//
// The idea of the target is that of EPLB (github.com/deepseek-ai/EPLB, eplb.py): experts with much load have several copies,
// which share it, and copies are packed to NPUs by falling load. EPLB starts anew each time and moves nearly everything;
// here the present placement is repaired until its balance is within Options.Slack of what starting anew would give.
//
// Each layer is a problem of its own, as all NPUs compute a layer together and wait for the one with the most to do. All
// experts of a layer are of one size, so bytes are counted in copies.
package placement

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
)

// Layout says who has a copy of each expert: [layers][experts]. A dense layer has no entries.
type Layout [][]Set

// Load is how many tokens went to each expert in some time: [layers][experts]. Nil, or a layer without any tokens: all alike.
type Load [][]uint64

// Options bound a placement.
type Options struct {
	// Slots is the most experts of one layer that an NPU has room for; an NPU's memory divided by layers and size of an expert.
	// The NPUs together need a slot for each expert; what they have beyond that is room for second copies.
	Slots int
	// Slack is how much worse than a placement made anew the busiest NPU of a layer may be, in order to copy less: 0.05 is
	// five percent. 0: nothing is left undone that makes a layer faster.
	Slack float64
}

// ErrNoRoom is returned by Plan when the NPUs have fewer slots together than a layer has experts.
var ErrNoRoom = errors.New("the NPUs have no room for all experts")

// Nowhere is the source of an expert that no NPU has: it is loaded from where the weights come from.
const Nowhere = -1

// Copy is a copy of an expert that is to be made on NPU To, from NPU From or Nowhere.
type Copy struct{ Layer, Expert, From, To int }

// Drop is a copy of an expert on an NPU that is not needed any more once the layout is in force.
type Drop struct{ Layer, Expert, NPU int }

// Change is how to get from one layout to another. Copies can be made while the old layout is used, drops wait until no step
// uses it any more.
type Change struct {
	Layout Layout // the new one
	Copies []Copy // by layer, expert, To
	Drops  []Drop // by layer, expert, NPU
}

// Even is a layout without second copies in which each NPU has as many experts of each layer as any other, or one more.
// experts is the number of each layer, 0 for a dense one. Who has one more differs from layer to layer. On no NPU every expert is
// nowhere.
func Even(experts []int, npus Set) Layout {
	var order []int
	for n := range npus.All() {
		order = append(order, n)
	}
	layout := make(Layout, len(experts))
	extra := 0 // NPUs before this one have had one more
	for l, count := range experts {
		layout[l] = make([]Set, count)
		if npus == 0 {
			continue
		}
		for e := range count {
			layout[l][e] = Of(order[(extra+e)%len(order)])
		}
		extra = (extra + count) % len(order)
	}
	return layout
}

// On reports which experts of a layer NPU n has.
func (p Layout) On(layer, n int) []int {
	var experts []int
	for e, s := range p[layer] {
		if s.Has(n) {
			experts = append(experts, e)
		}
	}
	return experts
}

// Check returns an error unless every expert is on at least one NPU, if there are any, and all copies are on NPUs of the set.
func (p Layout) Check(npus Set) error {
	for l, layer := range p {
		for e, s := range layer {
			if s == 0 && npus != 0 || s&^npus != 0 {
				return fmt.Errorf("expert %d of layer %d is on NPUs {%s}, the instance has {%s}", e, l, s, npus)
			}
		}
	}
	return nil
}

// Balance is the share of the NPUs' time that is work, when they wait for the busiest one in each layer: 1 is perfect. An
// expert's load is shared by its copies alike.
func (p Layout) Balance(load Load, npus Set) float64 {
	var work, time uint64
	for l := range p {
		w := newLayer(p[l], load.of(l), npus, len(p[l]))
		work += w.mean
		time += w.busiest()
	}
	if time == 0 {
		return 1
	}
	return float64(work) / float64(time)
}

func (d Load) of(layer int) []uint64 {
	if d == nil {
		return nil
	}
	return d[layer]
}

// Plan returns the change from the present layout to one on the given NPUs only. An expert that present has nowhere is
// Nowhere's; an NPU that is lost must not be in present any more. Errors are ErrNoRoom and of arguments that do not fit
// one another.
func Plan(present Layout, load Load, npus Set, o Options) (*Change, error) {
	if npus == 0 || o.Slack < 0 || load != nil && len(load) != len(present) {
		return nil, fmt.Errorf("placing experts of %d layers on NPUs {%s}: load of %d layers, slack of %g",
			len(present), npus, len(load), o.Slack)
	}
	c := &Change{Layout: make(Layout, len(present))}
	var sent [MaxNPUs]int // copies from each NPU so far
	for l, experts := range present {
		if load != nil && len(load[l]) != len(experts) {
			return nil, fmt.Errorf("placing %d experts of layer %d: load of %d", len(experts), l, len(load[l]))
		}
		if o.Slots*npus.Len() < len(experts) {
			return nil, fmt.Errorf("%w: %d of layer %d, %d on each of NPUs {%s}", ErrNoRoom, len(experts), l, o.Slots, npus)
		}
		c.Layout[l] = place(experts, load.of(l), npus, o)
		for e, to := range c.Layout[l] {
			for n := range (to &^ experts[e]).All() {
				from := Nowhere
				for s := range experts[e].All() {
					if from == Nowhere || sent[s] < sent[from] {
						from = s
					}
				}
				if from != Nowhere {
					sent[from]++
				}
				c.Copies = append(c.Copies, Copy{Layer: l, Expert: e, From: from, To: n})
			}
			for n := range (experts[e] &^ to).All() {
				c.Drops = append(c.Drops, Drop{Layer: l, Expert: e, NPU: n})
			}
		}
	}
	return c, nil
}

// place returns the new placement of one layer.
func place(present []Set, load []uint64, npus Set, o Options) []Set {
	if len(present) == 0 {
		return []Set{}
	}
	repaired := newLayer(present, load, npus, o.Slots)
	repaired.old = present
	aim := uint64(float64(repaired.least()) * (1 + o.Slack))
	bound := uint64(math.MaxUint64) // aim, or what the busiest NPU has in the best placement that is found, where nothing comes to the aim
	var anew []*layer
	untried := starts(repaired)
	try := func() {
		l := newLayer(make([]Set, len(present)), load, npus, o.Slots)
		l.fill(untried[0].spare, untried[0].single)
		l.improve(aim)
		bound = min(bound, max(aim, l.busiest()))
		anew, untried = append(anew, l), untried[1:]
	}
	for len(untried) > 0 && bound > aim {
		try()
	}
	repaired.complete()
	repaired.improve(bound)
	repaired.thin(bound)
	if repaired.busiest() <= bound {
		return repaired.has
	}
	// It is stuck. Of the others that are good enough the one takes its place that needs the fewest copies, once the NPUs have changed their parts so
	// that much is where it was.
	for len(untried) > 0 {
		try()
	}
	var best *layer
	for _, l := range anew {
		if l.busiest() > bound {
			continue
		}
		l.rename(present)
		l.thin(bound)
		if best == nil || l.copies() < best.copies() {
			best = l
		}
	}
	return best.has
}

// start is how a layer is placed without regard to where experts are.
type start struct {
	spare  int // second copies
	single int // an expert that gets none; -1: any may
}

// starts are those that are worth a try. How many second copies are best depends on how well they pack: all that there is room for come first,
// then fewer. Where they are few and large it can be best that one of the experts that nearly fill an NPU has a single one.
func starts(l *layer) (all []start) {
	most := l.npus.Len()*l.slots - len(l.load)
	for part := 4; part >= 0; part-- {
		all = append(all, start{most * part / 4, -1})
	}
	const large = 4 // most of them that are tried
	for e, load := range l.load {
		if load > l.mean/2 && load <= l.mean*5/4 && len(all) < 5+large {
			all = append(all, start{most, e})
		}
	}
	return all
}

// scale is the load of a layer as a whole: loads are scaled to it, so that sums stay exact integers.
const scale = 1 << 40

// scaled returns load as parts of scale.
func scaled(load []uint64, experts int) []uint64 {
	var total uint64
	for _, v := range load {
		total += v
	}
	to := make([]uint64, experts)
	for e := range to {
		if total == 0 {
			to[e] = scale / uint64(experts)
			continue
		}
		high, low := bits.Mul64(load[e], scale)
		to[e], _ = bits.Div64(high, low, total)
	}
	return to
}
