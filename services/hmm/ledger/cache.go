package ledger

import (
	"cmp"
	"container/list"
	"fmt"
	"slices"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"
)

// An object that an index names (of MM objects by content, of KV blocks by hash, or of weights by set and number) has a cache reference: when its last
// hold ends it is not freed but rests, until somebody holds it again or it is evicted. Resting objects are evicted least
// recently held first, by slab and not by block: when the resting ones of its kind exceed what the NPU may keep of it,
// and when an allocation on the NPU needs their room. What anybody holds is never evicted.

// cached reports whether an index names the object.
func (o *object) cached() bool {
	return o.key != nil || len(o.blocks) > 0 || o.set != nil
}

func (o *object) inUse() bool {
	return len(o.conns)+len(o.requests) > 0
}

// shared reports whether the object is booked to what the NPUs of a domain share: it is a weight.
func (o *object) shared() bool { return o.handle.NPU < mem.HostNPU }

// settle sees to an object that has lost a hold or its place in an index.
func (l *Ledger) settle(o *object) {
	switch {
	case o.inUse():
	case o.cached():
		l.rest(o)
	default:
		l.free(o)
	}
}

// rest keeps an object that nobody holds, as long as there is room for it.
func (l *Ledger) rest(o *object) {
	b, kind := l.account(int(o.handle.NPU)), o.handle.Kind
	if b.resting[kind] == nil {
		b.resting[kind] = list.New()
	}
	l.rests++
	o.since = l.rests
	o.resting = b.resting[kind].PushBack(o)
	b.keep(o, 1)
	for b.kinds[kind].Cached > l.cacheLimit(kind) {
		l.evict(b.resting[kind].Front().Value.(*object))
	}
}

// wake ends an object's rest, before somebody holds it.
func (l *Ledger) wake(o *object) {
	if o.resting == nil {
		return
	}
	b := l.account(int(o.handle.NPU))
	b.resting[o.handle.Kind].Remove(o.resting)
	o.resting = nil
	b.keep(o, -1)
}

// evict frees a resting object.
func (l *Ledger) evict(o *object) {
	l.wake(o)
	l.unindex(o)
	l.free(o)
}

// unindex takes an object's cache reference away.
func (l *Ledger) unindex(o *object) {
	if o.key != nil {
		delete(l.mm, *o.key)
		o.key = nil
	}
	for _, hash := range o.blocks {
		delete(l.prefix, blockKey{o.extent.Space, hash})
	}
	o.blocks = nil
	if o.set != nil {
		l.unshelve(o)
	}
}

func (l *Ledger) cacheLimit(k mem.Kind) int64 {
	switch k {
	case mem.KindMM:
		return l.cfg.MMCache
	case mem.KindKV:
		return l.cfg.KVCache
	case mem.KindWeights:
		return l.cfg.Weights
	}
	panic(fmt.Sprintf("BUG: %v is in no cache", k))
}

// oldest is the resting object of a budget that was held longest ago; nil when there is none.
func (b *budget) oldest() *object {
	var first *object
	for _, resting := range b.resting {
		if e := resting.Front(); e != nil {
			if o := e.Value.(*object); first == nil || o.since < first.since {
				first = o
			}
		}
	}
	return first
}

// clear evicts until so many bytes are free. The caller has checked that they can be.
func (l *Ledger) clear(b *budget, bytes int64) {
	for b.free() < bytes {
		l.evict(b.oldest())
	}
}

// evictIn evicts one object of a space, to mend its fragmentation, or, as the last, a weight; false when nothing rests
// there.
func (l *Ledger) evictIn(space int) bool {
	var first *object
	for _, b := range l.budgets {
		if b.space != space {
			continue
		}
		if o := b.oldest(); o != nil && (first == nil || o.since < first.since) {
			first = o
		}
	}
	if first == nil && space > 0 {
		first = l.account(mem.Shared(space)).oldest()
	}
	if first != nil {
		l.evict(first)
	}
	return first != nil
}

// Forget takes the cache references of objects that the client holds: their content was found to be wrong.
func (l *Ledger) Forget(id Conn, objects []protocol.Object) error {
	for _, name := range objects {
		o, err := l.held(id, name)
		if err != nil {
			return fmt.Errorf("forgetting object %d: %w", name.ID, err)
		}
		l.unindex(o)
		l.forgetCopy(o)
	}
	return nil
}

// newestFirst lists objects in the order in which they are let go: a sequence's later slabs are allocated later, and are
// of no use without the earlier ones, so they go to rest, and are evicted, first.
func newestFirst[V any](set map[*object]V) []*object {
	all := make([]*object, 0, len(set))
	for o := range set {
		all = append(all, o)
	}
	slices.SortFunc(all, func(a, b *object) int { return cmp.Compare(b.handle.Generation, a.handle.Generation) })
	return all
}

// stage returns the connection of a client that may use the caches: gateways see host memory only.
func (l *Ledger) stage(id Conn) (*conn, error) {
	c := l.conn(id)
	if c.role == protocol.RoleGateway {
		return nil, fmt.Errorf("a gateway has no use for the caches: %w", mem.ErrDenied)
	}
	return c, nil
}
