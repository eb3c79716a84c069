package stage

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"trireme.dev/shared/engine"
	"trireme.dev/shared/kernel"
	"trireme.dev/shared/kv"
	"trireme.dev/shared/mem"
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
	all  atomic.Pointer[[]NPU]
	mu   sync.Mutex // of who changes them
	left pacing     // of those that have left
}

// NPUs are the instance's NPUs by slot; some slots may be empty. Their arithmetic is the Runner's, once that runs. Nobody changes the
// list but, before the stage serves, tests.
func (s *Stage) NPUs() []NPU {
	if all := s.slots.all.Load(); all != nil {
		return *all
	}
	return nil
}

// setNPUs has others be the instance's, and returns those that have left.
func (s *Stage) setNPUs(npus []NPU) (left []NPU) {
	s.slots.mu.Lock()
	defer s.slots.mu.Unlock()
	for slot, n := range s.NPUs() {
		if n.Compute != nil && (slot >= len(npus) || npus[slot].Compute != n.Compute) {
			s.slots.left.add(n)
			left = append(left, n)
		}
	}
	s.slots.all.Store(&npus)
	return left
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

// share has so many NPUs share the threads.
func share(o npu.Options, count int) npu.Options {
	if count > 1 {
		if o.Threads == 0 {
			o.Threads = runtime.GOMAXPROCS(0)
		}
		o.Threads = max(1, o.Threads/count)
	}
	return o
}

// openNPUs has the NPUs of these numbers, by slot, be the instance's; -1: a hole. first is the arithmetic of one of them, if there is any.
func (s *Stage) openNPUs(first kernel.Compute, numbers []int) error {
	npus := make([]NPU, len(numbers))
	defer func() { // Close closes them
		s.setNPUs(npus)
		if first != nil {
			first.Close()
		}
	}()
	for slot, number := range numbers {
		if number < 0 {
			continue
		}
		c := first
		if first = nil; c == nil {
			var err error
			if c, err = npu.Open(s.npuOptions); err != nil {
				return err
			}
		}
		npus[slot] = NPU{Number: number, NPU: engine.NPU{Compute: c}}
		s.Stay(slot)
	}
	return nil
}

// pacing is what NPUs that are slowed down, all or none, have been busy, and how far behind, those that have left included.
type pacing struct {
	busy, behind time.Duration
}

func (p *pacing) add(n NPU) {
	if c, ok := n.Compute.(*pace.Compute); ok {
		p.busy += c.Busy()
		p.behind += c.Behind()
	}
}

// profile is the name of the profile that the NPUs are slowed down to, or "".
func (s *Stage) profile() string {
	if s.paced == nil {
		return ""
	}
	return s.paced.Name
}

// pacing may be called at any time by any goroutine.
func (s *Stage) pacing() pacing {
	s.slots.mu.Lock()
	defer s.slots.mu.Unlock()
	sum := s.slots.left
	for _, n := range s.NPUs() {
		sum.add(n)
	}
	return sum
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
	s.seats.add(slot)
}

// add has new work come to a slot. s.mu is held.
func (s *seats) add(slot int) {
	for len(s.held) <= slot {
		s.held = append(s.held, sched.Held{})
	}
	s.open = s.open.With(slot)
}

// Takes reports whether new work comes to the NPU in a slot.
func (s *Stage) Takes(slot int) bool {
	s.seats.mu.Lock()
	defer s.seats.mu.Unlock()
	return s.seats.open.Has(slot)
}

// Mover is a Worker whose work can go on on another NPU.
type Mover interface {
	Worker
	// Vacate begins to move the work that is on NPUs that are about to leave to others. It is called again and again while there is some.
	Vacate()
}

// vacateEvery is the time between two looks at an NPU that is about to leave.
const vacateEvery = 50 * time.Millisecond

// Vacate has no new work come to the NPU in a slot, has its sequences go on on other NPUs, and returns when nothing is there any
// more: prompts and pictures are finished there. When ctx ends before, what has moved stays where it is, and the NPU takes new work
// again.
func (s *Stage) Vacate(ctx context.Context, slot int) error {
	s.Leave(slot)
	tick := time.NewTicker(vacateEvery)
	defer tick.Stop()
	for {
		held := s.Held(slot)
		if held.Seqs == 0 {
			return nil
		}
		for _, w := range s.workers {
			if w, ok := w.(Mover); ok {
				w.Vacate()
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			s.Stay(slot)
			return fmt.Errorf("vacating the NPU in slot %d, which has %d sequences and pictures of %d slabs: %w", slot, held.Seqs, held.Slabs,
				context.Cause(ctx))
		}
	}
}

// Held is what the work of the instance holds on the NPU in a slot.
func (s *Stage) Held(slot int) sched.Held {
	s.seats.mu.Lock()
	defer s.seats.mu.Unlock()
	if slot >= len(s.seats.held) {
		return sched.Held{}
	}
	return s.seats.held[slot]
}

// Idlest is the slots of the NPUs that take new work and have the fewest sequences and pictures, rising.
func (s *Stage) Idlest() (slots []int) {
	s.seats.mu.Lock()
	defer s.seats.mu.Unlock()
	fewest := math.MaxInt
	for slot := range s.seats.open.All() {
		switch has := s.seats.held[slot].Seqs; {
		case has < fewest:
			fewest, slots = has, append(slots[:0], slot)
		case has == fewest:
			slots = append(slots, slot)
		}
	}
	return slots
}

// Seat is a sequence's, or a picture's, place on one of the NPUs.
type Seat struct {
	NPU    int // its slot
	number int
	stage  *Stage
	slabs  int
}

// Seat gives new work a place on the first NPU where try finds room for what it needs, so much memory in slabs of KV to begin with.
// One that has something of the work already, the number on the node, is tried first; -1: none has. The place is given up where try fails;
// its error is returned, and mem.ErrExhausted only when no NPU has room.
func (s *Stage) Seat(has, slabs int, try func(*Seat) error) error {
	err := fmt.Errorf("all NPUs of the instance are about to leave: %w", mem.ErrExhausted)
	for _, npu := range s.order(has) {
		seat := s.sit(npu, slabs)
		if seat == nil {
			continue
		}
		if err = try(seat); err == nil {
			return nil
		}
		seat.Leave()
		if !errors.Is(err, mem.ErrExhausted) {
			return err
		}
	}
	return err
}

// order is the slots of the NPUs that take new work in the order in which it tries to find room there.
func (s *Stage) order(has int) []int {
	s.seats.mu.Lock()
	defer s.seats.mu.Unlock()
	npus := s.NPUs()
	order := sched.Seats(s.seats.held, s.seats.open, nil)
	for i, npu := range order {
		if npus[npu].Number == has {
			copy(order[1:i+1], order[:i])
			order[0] = npu
		}
	}
	return order
}

// sit takes a place on an NPU for what needs so much memory, in slabs of KV; nil when no work comes there any more.
func (s *Stage) sit(npu, slabs int) *Seat {
	s.seats.mu.Lock()
	defer s.seats.mu.Unlock()
	if !s.seats.open.Has(npu) {
		return nil
	}
	s.seats.held[npu].Seqs++
	s.seats.held[npu].Slabs += slabs
	return &Seat{NPU: npu, number: s.NPUs()[npu].Number, stage: s, slabs: slabs}
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

// Slabs is what it has noted that it needs.
func (t *Seat) Slabs() int {
	t.stage.seats.mu.Lock()
	defer t.stage.seats.mu.Unlock()
	return t.slabs
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
