package stage

import (
	"runtime"
	"sync"

	"trireme.dev/shared/engine"
	"trireme.dev/shared/kernel"
	"trireme.dev/shared/kv"
	"trireme.dev/shared/model"
	"trireme.dev/shared/npu"
	"trireme.dev/shared/npu/pace"
	"trireme.dev/shared/sched"
	"trireme.dev/shared/sched/placement"
)

// NPU is one of the NPUs of a stage process. Attention of a sequence is computed where its KV lies; experts are spread over
// all (engine.Text).
type NPU struct {
	Number int // on the node, as the HMM has granted it
	engine.NPU
}

// openNPUs opens the arithmetic of so many NPUs, which share the threads.
func openNPUs(o npu.Options, count int) ([]NPU, error) {
	if count > 1 {
		if o.Threads == 0 {
			o.Threads = runtime.GOMAXPROCS(0)
		}
		o.Threads = max(1, o.Threads/count)
	}
	var npus []NPU
	for range count {
		c, err := npu.Open(o)
		if err != nil {
			return npus, err
		}
		npus = append(npus, NPU{NPU: engine.NPU{Compute: c}})
	}
	return npus, nil
}

// paced are the NPUs that are slowed down: all or none.
func paced(npus []NPU) []*pace.Compute {
	var all []*pace.Compute
	for _, n := range npus {
		if c, ok := n.Compute.(*pace.Compute); ok {
			all = append(all, c)
		}
	}
	return all
}

// Kernels is the digest of the NPUs' kernels.
func (s *Stage) Kernels() string { return s.NPUs[0].Compute.Digest() }

// Layout says which of an instance's NPUs have which experts of a language model, before any load is known: all have as many.
func Layout(t *model.Text, npus int) placement.Layout {
	experts := make([]int, t.Layers)
	for l := range experts {
		if !t.Dense[l] {
			experts[l] = t.Experts
		}
	}
	return placement.Even(experts, placement.First(npus))
}

// seats is what the sequences in work hold on each NPU.
type seats struct {
	mu   sync.Mutex
	held []sched.Held
}

// Seat is a sequence's, or a picture's, place on one of the NPUs.
type Seat struct {
	NPU   int // in Stage.NPUs
	stage *Stage
	slabs int
}

// Seats are the NPUs in the order in which new work tries to find room there. One that has something of it already, the number
// on the node, goes first; -1: none has.
func (s *Stage) Seats(has int) []int {
	s.seats.mu.Lock()
	defer s.seats.mu.Unlock()
	order := sched.Seats(s.seats.held, nil)
	for i, npu := range order {
		if s.NPUs[npu].Number == has {
			copy(order[1:i+1], order[:i])
			order[0] = npu
		}
	}
	return order
}

// Sit takes a place on an NPU for what needs so much memory, in slabs of KV.
func (s *Stage) Sit(npu, slabs int) *Seat {
	t := &Seat{NPU: npu, stage: s}
	s.seats.mu.Lock()
	s.seats.held[npu].Seqs++
	s.seats.mu.Unlock()
	t.Grow(slabs)
	return t
}

// Grow notes that it needs more.
func (t *Seat) Grow(slabs int) {
	t.stage.seats.mu.Lock()
	defer t.stage.seats.mu.Unlock()
	t.slabs += slabs
	t.stage.seats.held[t.NPU].Slabs += slabs
}

// Leave gives the place up. A nil Seat has none.
func (t *Seat) Leave() {
	if t == nil {
		return
	}
	t.Grow(-t.slabs)
	t.stage.seats.mu.Lock()
	defer t.stage.seats.mu.Unlock()
	t.stage.seats.held[t.NPU].Seqs--
}

// Number is the NPU's number on the node.
func (t *Seat) Number() int { return t.stage.NPUs[t.NPU].Number }

// Compute is the NPU's arithmetic.
func (t *Seat) Compute() kernel.Compute { return t.stage.NPUs[t.NPU].Compute }

// SlabsOf is what memory of so many bytes counts as.
func (s *Stage) SlabsOf(bytes int64) int {
	slab := kv.SlabBytes(&s.Model.Text)
	return int((bytes + slab - 1) / slab)
}
