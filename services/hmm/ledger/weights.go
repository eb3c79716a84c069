package ledger

import (
	"bytes"
	"cmp"
	"encoding/hex"
	"fmt"
	"slices"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"
)

// A weight set is the weights of one model in one memory domain, booked to the domain and not to an NPU. Who opens it
// first makes it, object by object in a fixed order; others wait. Its maker's place is free again when the maker gives it
// up or its process has exited, not before: until then it may write. The successor goes on behind the last object that is
// final. Clients hold sets, not their objects; a set that nobody holds rests, whole or not, until its room is needed.

// weightsKey names a weight set on the node.
type weightsKey struct {
	space int
	key   protocol.Key
}

type weightSet struct {
	id  uint64
	key weightsKey

	want      int       // objects of the whole set
	bytes     int64     // of their content together
	objects   []*object // those that have memory, in order
	placed    int64     // bytes of their content
	sealed    int       // the first so many are final
	loaded    int64     // bytes of their content
	maker     *conn     // nil: nobody
	conns     map[*conn]int
	forgotten bool // nobody can open it any more
}

func (s *weightSet) made() bool { return s.sealed == s.want }

// Bounds of a set: what a model may have, and what the books can carry.
const (
	maxSetObjects = 1 << 20
	maxSetBytes   = 1 << 50
)

// OpenWeights adds a hold to the weight set of a key in an NPU's memory domain. One that is not made is to be made by the
// caller, unless busy is true, because somebody does already: Effects names the key when that has ended, and OpenWeights is
// called again. ErrInvalid when the set has another number of objects or bytes.
func (l *Ledger) OpenWeights(id Conn, o protocol.OpenWeights) (opened protocol.OpenedWeights, busy bool, err error) {
	c, err := l.stage(id)
	if err != nil {
		return opened, false, fmt.Errorf("opening weights: %w", err)
	}
	b, err := l.budget(o.NPU)
	if err == nil && (o.NPU < 0 || o.Objects < 1 || o.Objects > maxSetObjects || o.Bytes < int64(o.Objects) || o.Bytes > maxSetBytes) {
		err = fmt.Errorf("%d objects of %d bytes for NPU %d: %w", o.Objects, o.Bytes, o.NPU, mem.ErrInvalid)
	}
	if err != nil {
		return opened, false, fmt.Errorf("opening weights: %w", err)
	}
	key := weightsKey{b.space, o.Key}
	s := l.weights[key]
	switch {
	case s == nil:
		if err := l.account(mem.Shared(b.space)).fits(o.Bytes); err != nil {
			return opened, false, fmt.Errorf("opening weights: %w", err)
		}
		s = &weightSet{id: l.next(), key: key, want: o.Objects, bytes: o.Bytes, conns: map[*conn]int{}}
		l.weights[key], l.sets[s.id] = s, s
	case s.want != o.Objects || s.bytes != o.Bytes:
		return opened, false, fmt.Errorf("opening weights of %d objects and %d bytes, the set has %d and %d: %w",
			o.Objects, o.Bytes, s.want, s.bytes, mem.ErrInvalid)
	case s.maker != nil:
		return protocol.OpenedWeights{Loaded: s.loaded}, true, nil
	}
	for _, o := range s.objects {
		l.wake(o)
	}
	s.conns[c]++
	c.sets[s]++
	if !s.made() {
		s.maker = c
	}
	return protocol.OpenedWeights{Set: s.id, Make: s.maker == c, Sealed: s.sealed, Loaded: s.loaded}, false, nil
}

// PlaceWeights says where the objects of a set lie that a client holds; fresh is how many of them, the last ones, have
// just been given addresses and need memory, which only the maker gets. ErrInvalid when a size is another, or an object
// is not there.
func (l *Ledger) PlaceWeights(id Conn, p protocol.PlaceWeights) (grants []protocol.Grant, fresh int, err error) {
	s, err := l.setOf(id, p.Set)
	if err == nil && (p.First < 0 || len(p.Sizes) > s.want || p.First > s.want-len(p.Sizes)) {
		err = fmt.Errorf("the set has %d objects: %w", s.want, mem.ErrInvalid)
	}
	if err != nil {
		return nil, 0, fmt.Errorf("placing weights %d to %d: %w", p.First, p.First+len(p.Sizes)-1, err)
	}
	there := s.sealed
	if s.maker == l.conn(id) {
		there = len(s.objects)
	}
	for i, size := range p.Sizes[:min(len(p.Sizes), max(there-p.First, 0))] {
		if have := s.objects[p.First+i].handle.Bytes; have != size {
			return nil, 0, fmt.Errorf("weight %d has %d bytes, not %d: %w", p.First+i, have, size, mem.ErrInvalid)
		}
	}
	if p.First+len(p.Sizes) > there {
		if s.maker != l.conn(id) || p.First > there {
			return nil, 0, fmt.Errorf("placing weight %d, the set has %d: %w", p.First+len(p.Sizes)-1, there, mem.ErrInvalid)
		}
		fresh = p.First + len(p.Sizes) - there
		if err := l.placeWeights(s, p.Sizes[len(p.Sizes)-fresh:]); err != nil {
			return nil, 0, fmt.Errorf("placing weights %d to %d of %d: %w", there, there+fresh-1, s.want, err)
		}
	}
	for _, o := range s.objects[p.First : p.First+len(p.Sizes)] {
		grants = append(grants, protocol.Grant{Handle: o.handle, Extent: o.extent})
	}
	return grants, fresh, nil
}

// placeWeights adds objects to a set, all or none.
func (l *Ledger) placeWeights(s *weightSet, sizes []int64) error {
	var bytes, pages int64
	for _, n := range sizes {
		if n < 1 || n > s.bytes-s.placed-bytes {
			return fmt.Errorf("%d bytes in a set of %d, %d of them placed: %w", n, s.bytes, s.placed+bytes, mem.ErrInvalid)
		}
		bytes += n
		pages += mem.Padded(n, l.cfg.Page)
	}
	b := l.account(mem.Shared(s.key.space))
	if err := b.fits(pages); err != nil {
		return err
	}
	l.clear(b, pages)
	for i, n := range sizes {
		o, err := l.place(protocol.Spec{Kind: mem.KindWeights, NPU: b.npu, Bytes: n})
		if err != nil {
			l.undoWeights(s, i)
			return err
		}
		o.set = s
		s.objects = append(s.objects, o)
		s.placed += n
	}
	return nil
}

// undoWeights takes the last n objects of a set back.
func (l *Ledger) undoWeights(s *weightSet, n int) {
	keep := len(s.objects) - n
	for _, o := range s.objects[keep:] {
		s.placed -= o.handle.Bytes
		l.free(o)
	}
	s.objects = s.objects[:keep]
}

// UndoWeights takes the objects back that PlaceWeights called fresh, whose memory could not be had.
func (l *Ledger) UndoWeights(id Conn, set uint64, fresh int) {
	s, err := l.setOf(id, set)
	if err != nil || s.maker != l.conn(id) || fresh > len(s.objects)-s.sealed {
		panic(fmt.Sprintf("BUG: taking %d weights back: %v", fresh, err))
	}
	l.undoWeights(s, fresh)
}

// SealWeights makes the next objects of a set final, whose maker the client is. With the last one others can open it.
func (l *Ledger) SealWeights(id Conn, v protocol.SealWeights) error {
	s, err := l.setOf(id, v.Set)
	switch {
	case err != nil:
	case s.maker != l.conn(id):
		err = fmt.Errorf("this connection does not make them: %w", mem.ErrFenced)
	case v.First != s.sealed || len(v.CRCs) > len(s.objects)-s.sealed:
		err = fmt.Errorf("%d of %d are final, %d have memory: %w", s.sealed, s.want, len(s.objects), mem.ErrInvalid)
	case s.sealed+len(v.CRCs) == s.want && s.placed != s.bytes:
		err = fmt.Errorf("they have %d bytes, the set has %d: %w", s.placed, s.bytes, mem.ErrInvalid)
	}
	if err != nil {
		return fmt.Errorf("sealing weights %d to %d: %w", v.First, v.First+len(v.CRCs)-1, err)
	}
	for i, crc := range v.CRCs {
		o := s.objects[s.sealed+i]
		o.handle.Sealed, o.handle.CRC = true, crc
		o.handle.Capability = l.capability(o.handle)
		s.loaded += o.handle.Bytes
	}
	s.sealed += len(v.CRCs)
	if s.made() {
		l.stopMaking(s)
	}
	return nil
}

// CloseWeights ends one hold of the client on a set, and its making of it.
func (l *Ledger) CloseWeights(id Conn, v protocol.CloseWeights) error {
	s, err := l.setOf(id, v.Set)
	if err != nil {
		return fmt.Errorf("closing weights: %w", err)
	}
	c := l.conn(id)
	if v.Wrong {
		l.forgetSet(s)
	}
	if c.sets[s]--; c.sets[s] > 0 {
		s.conns[c]--
		return nil
	}
	l.leaveSet(c, s)
	return nil
}

// leaveSet ends all holds of a client on a set.
func (l *Ledger) leaveSet(c *conn, s *weightSet) {
	delete(c.sets, s)
	delete(s.conns, c)
	if s.maker == c {
		l.stopMaking(s)
	}
	if len(s.conns) > 0 {
		return
	}
	if len(s.objects) == 0 {
		l.forgetSet(s) // nothing of it is worth keeping
	}
	for _, o := range s.objects {
		l.settle(o)
	}
	if s.forgotten {
		delete(l.sets, s.id)
	}
}

// stopMaking ends the making of a set, done or not, and wakes those who wait for it.
func (l *Ledger) stopMaking(s *weightSet) {
	s.maker = nil
	l.effects.Settled = append(l.effects.Settled, s.key.key)
}

// forgetSet takes a set out of the index. What nobody holds of it is freed.
func (l *Ledger) forgetSet(s *weightSet) {
	if s.forgotten {
		return
	}
	s.forgotten = true
	delete(l.weights, s.key)
	if len(s.conns) > 0 {
		return
	}
	delete(l.sets, s.id)
	for _, o := range s.objects {
		if !o.inUse() {
			l.wake(o)
			l.free(o)
		}
	}
}

// setOf returns a set that the client holds.
func (l *Ledger) setOf(id Conn, set uint64) (*weightSet, error) {
	s := l.sets[set]
	if s == nil || l.conn(id).sets[s] == 0 {
		return nil, fmt.Errorf("this connection does not hold set %d: %w", set, mem.ErrInvalid)
	}
	return s, nil
}

// weightsStats describes the sets that can be opened, by key and domain.
func (l *Ledger) weightsStats() []protocol.WeightsStats {
	out := make([]protocol.WeightsStats, 0, len(l.weights))
	for _, s := range l.weights {
		out = append(out, protocol.WeightsStats{
			Key: hex.EncodeToString(s.key.key[:]), Domain: s.key.space,
			Objects: s.want, Bytes: s.bytes, Loaded: s.loaded, Holders: len(s.conns),
		})
	}
	slices.SortFunc(out, func(a, b protocol.WeightsStats) int {
		return cmp.Or(bytes.Compare([]byte(a.Key), []byte(b.Key)), cmp.Compare(a.Domain, b.Domain))
	})
	return out
}
