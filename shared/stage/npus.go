package stage

import (
	"cmp"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"trireme.dev/shared/engine"
	"trireme.dev/shared/kernel"
	"trireme.dev/shared/kv"
	"trireme.dev/shared/model"
	"trireme.dev/shared/npu"
	"trireme.dev/shared/npu/pace"
	"trireme.dev/shared/sched"
	"trireme.dev/shared/sched/placement"
	"trireme.dev/shared/stage/runner"
)

// NPU is one of the NPUs of a stage process. Attention of a sequence is computed where its KV lies; experts are spread over
// all (engine.Text). Each stands in a slot, 0 to placement.MaxNPUs-1, which it keeps as long as it belongs to the instance: when others
// leave, theirs stay empty until an NPU that joins gets the lowest one. One without Compute stands for an empty slot.
type NPU struct {
	Number int // on the node, as the HMM has granted it
	engine.NPU
}

// slots are the NPUs of a stage. Who reads gets a list that does not change any more.
type slots struct {
	mu  sync.Mutex // of who changes them
	all atomic.Pointer[[]NPU]
}

// NPUs are the instance's NPUs by slot; some slots may be empty. Their arithmetic is the Runner's, once that runs. Nobody changes the
// list but, before the stage serves, tests.
func (s *Stage) NPUs() []NPU {
	if all := s.slots.all.Load(); all != nil {
		return *all
	}
	return nil
}

// changeNPUs has f change a copy of the list, which then is the list.
func (s *Stage) changeNPUs(f func([]NPU) []NPU) {
	s.slots.mu.Lock()
	defer s.slots.mu.Unlock()
	npus := f(slices.Clone(s.NPUs()))
	s.slots.all.Store(&npus)
}

// engines is the list as the engine wants it.
func engines(npus []NPU) []engine.NPU {
	list := make([]engine.NPU, len(npus))
	for slot, n := range npus {
		list[slot] = n.NPU
	}
	return list
}

// setOf are the slots with an NPU.
func setOf(npus []NPU) placement.Set { return runner.Slots(engines(npus)) }

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
func (s *Stage) Kernels() string { return s.kernels }

// Layout says which of an instance's NPUs have which experts of a language model, before any load is known: all have as many.
func Layout(t *model.Text, npus placement.Set) placement.Layout {
	experts := make([]int, t.Layers)
	for l := range experts {
		if !t.Dense[l] {
			experts[l] = t.Experts
		}
	}
	return placement.Even(experts, npus)
}

// seats is what the work of the instance holds on each NPU.
type seats struct {
	mu   sync.Mutex
	held []sched.Held  // by slot
	open placement.Set // those that take new work
}

// Leave has no new work come to the NPU in a slot, which is about to leave; what is there stays. Stay takes that back.
func (s *Stage) Leave(slot int) {
	s.seats.mu.Lock()
	defer s.seats.mu.Unlock()
	s.seats.open = s.seats.open.Without(slot)
}

// Stay has new work come to the NPU in a slot, which must be there.
func (s *Stage) Stay(slot int) {
	s.seats.mu.Lock()
	defer s.seats.mu.Unlock()
	for len(s.seats.held) <= slot {
		s.seats.held = append(s.seats.held, sched.Held{})
	}
	s.seats.open = s.seats.open.With(slot)
}

// Held is what the work of the instance holds on the NPU in a slot.
func (s *Stage) Held(slot int) sched.Held {
	s.seats.mu.Lock()
	defer s.seats.mu.Unlock()
	return s.seats.held[slot]
}

// Seat is a sequence's, or a picture's, place on one of the NPUs.
type Seat struct {
	NPU    int // its slot
	number int
	stage  *Stage
	slabs  int
}

// Seats are the slots of the NPUs in the order in which new work tries to find room there. One that has something of it already, the
// number on the node, goes first; -1: none has. NPUs that are about to leave are not among them, unless all are.
func (s *Stage) Seats(has int) []int {
	s.seats.mu.Lock()
	defer s.seats.mu.Unlock()
	npus := s.NPUs()
	order := sched.Seats(s.seats.held, cmp.Or(s.seats.open, setOf(npus)), nil)
	for i, npu := range order {
		if npus[npu].Number == has {
			copy(order[1:i+1], order[:i])
			order[0] = npu
		}
	}
	return order
}

// Sit takes a place on an NPU for what needs so much memory, in slabs of KV.
func (s *Stage) Sit(npu, slabs int) *Seat {
	t := &Seat{NPU: npu, number: s.NPUs()[npu].Number, stage: s}
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
func (t *Seat) Number() int { return t.number }

// Compute is the NPU's arithmetic.
func (t *Seat) Compute() kernel.Compute { return t.stage.NPUs()[t.NPU].Compute }

// SlabsOf is what memory of so many bytes counts as.
func (s *Stage) SlabsOf(bytes int64) int {
	slab := kv.SlabBytes(&s.Model.Text)
	return int((bytes + slab - 1) / slab)
}
