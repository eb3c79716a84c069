package ledger

import (
	"container/list"
	"fmt"
	"time"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"
)

// budget is the account of one NPU, of host memory, or of what the NPUs of a domain share. Bytes count whole pages.
type budget struct {
	npu      int
	space    int
	capacity int64
	owner    *conn     // whom the NPU is granted to
	reserved string    // name of the client that the NPU, which has no owner, is kept for; "": of nobody
	until    time.Time // it is
	total    protocol.Usage
	kinds    map[mem.Kind]*protocol.Usage
	resting  map[mem.Kind]*list.List // of *object: what only a cache keeps, the first is evicted first
}

func newBudget(npu, space int, capacity int64) *budget {
	return &budget{npu: npu, space: space, capacity: capacity, kinds: map[mem.Kind]*protocol.Usage{},
		resting: map[mem.Kind]*list.List{}}
}

func (l *Ledger) budget(npu int) (*budget, error) {
	if npu < mem.HostNPU || npu >= len(l.cfg.NPUs) {
		return nil, fmt.Errorf("NPU %d, the node has %d: %w", npu, len(l.cfg.NPUs), mem.ErrInvalid)
	}
	return l.budgets[npu+1], nil
}

// account is the budget that an object is booked to: of an NPU, or one of the numbers in mem that stand for others.
func (l *Ledger) account(npu int) *budget {
	if npu < mem.HostNPU {
		return l.shared[mem.HostNPU-npu-1]
	}
	return l.budgets[npu+1]
}

func (b *budget) name() string {
	switch {
	case b.npu == mem.HostNPU:
		return "host memory"
	case b.npu < mem.HostNPU:
		return fmt.Sprintf("the weights' memory of domain %d", b.space)
	}
	return fmt.Sprintf("NPU %d", b.npu)
}

func (b *budget) free() int64 { return b.capacity - b.total.Used - b.total.Padded }

// fits reports with ErrExhausted that bytes more do not fit, even if everything that rests is evicted.
func (b *budget) fits(bytes int64) error {
	if room := b.free() + b.total.Cached; bytes > room {
		return fmt.Errorf("%d bytes wanted, %s has %d free of %d: %w", bytes, b.name(), room, b.capacity, mem.ErrExhausted)
	}
	return nil
}

func (b *budget) add(o *object) {
	k := b.kinds[o.handle.Kind]
	if k == nil {
		k = &protocol.Usage{}
		b.kinds[o.handle.Kind] = k
	}
	for _, u := range []*protocol.Usage{&b.total, k} {
		u.Used += o.handle.Bytes
		u.Padded += o.extent.Bytes - o.handle.Bytes
		u.Peak = max(u.Peak, u.Used+u.Padded)
	}
}

func (b *budget) remove(o *object) {
	for _, u := range []*protocol.Usage{&b.total, b.kinds[o.handle.Kind]} {
		u.Used -= o.handle.Bytes
		u.Padded -= o.extent.Bytes - o.handle.Bytes
	}
}

// keep counts an object that goes to rest (by 1) or is held again (-1).
func (b *budget) keep(o *object, by int64) {
	for _, u := range []*protocol.Usage{&b.total, b.kinds[o.handle.Kind]} {
		u.Cached += by * o.extent.Bytes
	}
}

func (b *budget) stats() protocol.NPUStats {
	n := protocol.NPUStats{NPU: b.npu, Capacity: b.capacity, Free: b.free(), Usage: b.total, Kinds: map[string]protocol.Usage{}}
	if b.owner != nil {
		n.Instance, n.Name = b.owner.instance, b.owner.name
	}
	n.Reserved = b.reserved
	for k, u := range b.kinds {
		n.Kinds[k.String()] = *u
	}
	return n
}

// Stats describes the state; the daemon adds what it alone knows: Cached, and of Spaces all but Booked.
func (l *Ledger) Stats() protocol.Stats {
	s := protocol.Stats{
		Node: l.cfg.Node, Objects: len(l.objects), Requests: len(l.live), Ended: len(l.ended), Claims: len(l.claims),
		CachedMM: len(l.mm), CachedBlocks: len(l.prefix), Copied: l.copied,
	}
	for _, b := range l.budgets {
		s.Memory = append(s.Memory, b.stats())
	}
	for i, room := range l.cfg.Spaces {
		s.Spaces = append(s.Spaces, protocol.SpaceStats{Booked: room - l.spaces[i].Free()*l.cfg.Page})
	}
	for _, b := range l.shared {
		s.Shared = append(s.Shared, b.stats())
	}
	s.Weights = l.weightsStats()
	for _, o := range l.objects {
		if o.shared() {
			s.Objects--
			continue
		}
		s.Holds += len(o.conns) + len(o.requests)
		if o.resting != nil {
			s.Resting++
		}
	}
	for _, k := range l.claims {
		if k.owner == nil {
			s.Orphans++
		}
	}
	for _, c := range l.conns {
		if !c.gone {
			s.Connections++
		}
	}
	return s
}
