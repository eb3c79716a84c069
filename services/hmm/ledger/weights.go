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

// A weight set is what the memory domains of the node have of the weights of one model: objects by number, booked to the domain and not
// to an NPU. A domain has as many of them as its NPUs need. Whoever wants an object first makes it, others wait. Its maker's place is
// free again when the maker gives it up or its process has exited, not before: until then it may write. A final object that nobody
// holds rests until its room is needed.

// weightsKey names a weight set in a domain.
type weightsKey struct {
	space int
	key   protocol.Key
}

// weightSet is what a domain has of a set: at least one object.
type weightSet struct {
	key     weightsKey
	objects map[int]*object // by number; final, or being made
	wanted  int64           // most bytes that a client wanted in all
}

// Bounds of a request for weights: what a model may have, and what the books can carry.
const (
	maxWeights     = 1 << 20
	maxWeightBytes = 1 << 50
)

// Weights gives a client objects of a weight set in an NPU's memory domain, with a hold on each: those that are final, and to be made,
// up to as many bytes as it asks for, those that nobody has nor makes. A final one of another domain comes with each of these that has
// one, to be copied. busy is true when there is none of either sort, because others make them all: Effects names the key when one of
// them is done or given up, and Weights is called again. ErrInvalid when an object has another size.
func (l *Ledger) Weights(id Conn, v protocol.Weights) (placed []protocol.Placed, busy bool, err error) {
	c, err := l.stage(id)
	if err == nil {
		err = l.checkWeights(v)
	}
	if err != nil {
		return nil, false, fmt.Errorf("asking for weights: %w", err)
	}
	key := weightsKey{l.budgets[v.NPU+1].space, v.Key}
	if s := l.weights[key]; s != nil {
		s.wanted = max(s.wanted, v.Need)
	}
	placed = make([]protocol.Placed, len(v.Numbers))
	final, fresh, err := l.sortWeights(key, v)
	if err != nil {
		return nil, false, fmt.Errorf("asking for weights: %w", err)
	}
	if len(final)+len(fresh) == 0 {
		return placed, true, nil
	}
	for _, f := range final { // first, so that they do not make room for the others
		placed[f.place] = protocol.Placed{State: protocol.PlacedFinal, Grant: l.give(c, f.o), Check: f.o.doubted}
	}
	if err := l.placeWeights(c, key, v, fresh, placed); err != nil {
		for _, f := range final {
			l.takeBack(c, f.o)
		}
		return nil, false, fmt.Errorf("making room for %d weights: %w", len(fresh), err)
	}
	l.mark(c)
	return placed, false, nil
}

func (l *Ledger) checkWeights(v protocol.Weights) error {
	if _, err := l.budget(v.NPU); err != nil || v.NPU < 0 || len(v.Sizes) != len(v.Numbers) || len(v.Numbers) == 0 {
		return fmt.Errorf("%d numbers and %d sizes for NPU %d: %w", len(v.Numbers), len(v.Sizes), v.NPU, mem.ErrInvalid)
	}
	for i, n := range v.Numbers {
		if n < 0 || n >= maxWeights || i > 0 && n <= v.Numbers[i-1] || v.Sizes[i] < 1 || v.Sizes[i] > maxWeightBytes {
			return fmt.Errorf("weight %d of %d bytes, numbers must rise: %w", n, v.Sizes[i], mem.ErrInvalid)
		}
	}
	return nil
}

// finalWeight is an object that is final, and its place in a request.
type finalWeight struct {
	place int
	o     *object
}

// sortWeights finds those that are final, and the places of those that the client is to make.
func (l *Ledger) sortWeights(key weightsKey, v protocol.Weights) (final []finalWeight, fresh []int, err error) {
	s := l.weights[key]
	left := v.Most
	for i, n := range v.Numbers {
		var o *object
		if s != nil {
			o = s.objects[n]
		}
		switch {
		case o == nil:
			if left > 0 && (len(fresh) == 0 || v.Sizes[i] <= left) {
				fresh = append(fresh, i)
				left -= v.Sizes[i]
			} else {
				left = 0 // the ones behind are made after it
			}
		case o.handle.Bytes != v.Sizes[i]:
			return nil, nil, fmt.Errorf("weight %d has %d bytes, not %d: %w", n, o.handle.Bytes, v.Sizes[i], mem.ErrInvalid)
		case o.handle.Sealed:
			final = append(final, finalWeight{i, o})
		}
	}
	return final, fresh, l.weightsFit(key, s, v.Need)
}

// weightsFit reports with ErrExhausted that a client cannot have so many bytes of a set, whatever is evicted.
func (l *Ledger) weightsFit(key weightsKey, s *weightSet, need int64) error {
	if need <= 0 {
		return nil
	}
	if s != nil {
		for _, o := range s.objects {
			if o.inUse() {
				need -= o.handle.Bytes // it may be one of them
			}
		}
	}
	return l.account(mem.Shared(key.space)).fits(need)
}

// placeWeights makes room for the objects that a client is to make, all or none.
func (l *Ledger) placeWeights(c *conn, key weightsKey, v protocol.Weights, fresh []int, placed []protocol.Placed) error {
	var pages int64
	for _, i := range fresh {
		pages += mem.Padded(v.Sizes[i], l.cfg.Page)
	}
	b := l.account(mem.Shared(key.space))
	if err := b.fits(pages); err != nil {
		return err
	}
	l.clear(b, pages)
	for at, i := range fresh {
		o, err := l.place(protocol.Spec{Kind: mem.KindWeights, NPU: b.npu, Bytes: v.Sizes[i]})
		if err != nil {
			for _, i := range fresh[:at] {
				l.takeBack(c, l.objects[placed[i].Grant.Handle.Object])
				if placed[i].Source != nil {
					l.takeBack(c, l.objects[placed[i].Source.Handle.Object])
				}
			}
			return err
		}
		s := l.weights[key]
		if s == nil {
			s = &weightSet{key: key, objects: map[int]*object{}, wanted: v.Need}
			l.weights[key] = s
		}
		s.objects[v.Numbers[i]] = o
		o.set, o.number, o.maker = s, v.Numbers[i], c
		placed[i] = protocol.Placed{State: protocol.PlacedMake, Grant: l.give(c, o)}
		if from := l.elsewhere(o); from != nil {
			placed[i].Source = l.give(c, from)
		}
	}
	return nil
}

// elsewhere is a final object of another domain with the content that an object is to have, one that somebody uses before one that rests; nil:
// there is none.
func (l *Ledger) elsewhere(o *object) (found *object) {
	for space := 1; space < len(l.cfg.Spaces); space++ {
		s := l.weights[weightsKey{space, o.set.key.key}]
		if s == nil || space == o.extent.Space {
			continue
		}
		from := s.objects[o.number]
		if from != nil && from.handle.Sealed && from.handle.Bytes == o.handle.Bytes && (found == nil || !found.inUse() && from.inUse()) {
			found = from
		}
	}
	return found
}

// give adds a connection hold.
func (l *Ledger) give(c *conn, o *object) *protocol.Grant {
	l.wake(o)
	l.hold(c, o)
	return &protocol.Grant{Handle: o.handle, Extent: o.extent}
}

// takeBack ends one connection hold, and with the last one the making of a weight.
func (l *Ledger) takeBack(c *conn, o *object) {
	if o.conns[c] == 1 {
		l.letGo(c, o)
		return
	}
	o.conns[c]--
}

// letGo ends all connection holds of a client on an object.
func (l *Ledger) letGo(c *conn, o *object) {
	l.unhold(c, o)
	if o.maker == c && !o.handle.Sealed {
		l.giveUp(o)
	}
	l.settle(o)
}

// giveUp ends the making of an object that is not final: the next who wants it makes another. What its maker has made of the set may be
// as wrong as what made it fail, so it is checked by everyone who gets it.
func (l *Ledger) giveUp(o *object) {
	if o.set != nil {
		for _, other := range o.set.objects {
			other.doubted = other.doubted || other.handle.Sealed && other.by == o.maker
		}
	}
	o.maker = nil
	l.unindex(o)
}

// SealWeights makes objects final whose maker the client is, all or none.
func (l *Ledger) SealWeights(id Conn, items []protocol.Sealing) error {
	objects := make([]*object, len(items))
	for i, item := range items {
		o, err := l.held(id, item.Object)
		if err == nil {
			err = l.conn(id).makes(o)
		}
		if err != nil {
			return fmt.Errorf("sealing weight %d of %d: %w", i+1, len(items), err)
		}
		objects[i] = o
	}
	for i, o := range objects {
		o.handle.Sealed, o.handle.CRC = true, items[i].CRC
		o.handle.Capability = l.capability(o.handle)
		l.made(o)
	}
	return nil
}

// makes reports with ErrFenced that an object is no weight which the client makes.
func (c *conn) makes(o *object) error {
	if o.maker != c {
		return fmt.Errorf("this connection does not make object %d: %w", o.handle.Object, mem.ErrFenced)
	}
	return nil
}

// made notes that a weight is final.
func (l *Ledger) made(o *object) {
	o.by, o.maker = o.maker, nil
	if o.set != nil {
		l.settledKey(o.set.key.key)
	}
}

// settledKey tells those who wait for an object of a set that one is done or given up.
func (l *Ledger) settledKey(key protocol.Key) {
	if n := len(l.effects.Settled); n == 0 || l.effects.Settled[n-1] != key {
		l.effects.Settled = append(l.effects.Settled, key)
	}
}

// unshelve takes an object out of its set.
func (l *Ledger) unshelve(o *object) {
	if !o.handle.Sealed {
		l.settledKey(o.set.key.key)
	}
	delete(o.set.objects, o.number)
	if len(o.set.objects) == 0 {
		delete(l.weights, o.set.key)
	}
	o.set = nil
}

// weightsStats describes the sets, by key and domain.
func (l *Ledger) weightsStats() []protocol.WeightsStats {
	out := make([]protocol.WeightsStats, 0, len(l.weights))
	for _, s := range l.weights {
		w := protocol.WeightsStats{Key: hex.EncodeToString(s.key.key[:]), Domain: s.key.space, Objects: len(s.objects), Wanted: s.wanted}
		holders := map[*conn]bool{}
		for _, o := range s.objects {
			w.Bytes += o.handle.Bytes
			if o.handle.Sealed {
				w.Loaded += o.handle.Bytes
			}
			for c := range o.conns {
				holders[c] = true
			}
		}
		w.Holders = len(holders)
		out = append(out, w)
	}
	slices.SortFunc(out, func(a, b protocol.WeightsStats) int {
		return cmp.Or(bytes.Compare([]byte(a.Key), []byte(b.Key)), cmp.Compare(a.Domain, b.Domain))
	})
	return out
}
