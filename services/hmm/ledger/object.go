package ledger

import (
	"container/list"
	"crypto/hmac"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"
)

// object is memory that somebody holds, or that rests in a cache. It is freed with its last hold if no cache names it.
type object struct {
	handle   mem.Handle
	extent   mem.Extent
	conns    map[*conn]int    // times attached
	requests map[*request]int // attempt

	key     *protocol.Key        // in the MM index, or nil
	blocks  map[int]protocol.Key // in the prefix index, by number in the slab
	set     *weightSet           // of a weight that can be found by its number, or nil
	resting *list.Element        // of the budget's list, while only a cache keeps it
	since   uint64               // order in which objects went to rest

	number  int   // of a weight in its set
	maker   *conn // of a weight that is not final; nil: nobody
	by      *conn // who made the weight
	doubted bool  // the weight's maker gave up others later: see giveUp

	origin uint64 // generation of the sealed object that this is a copy of; 0: of none
}

// Limits of an object's description.
const (
	maxShape = 8
	maxKind  = 32
	maxID    = 128 // bytes of a request id, stage or reply subject
)

// Alloc makes objects, all or none, each with a connection hold and the request hold that its spec names.
func (l *Ledger) Alloc(now time.Time, id Conn, specs []protocol.Spec) ([]protocol.Grant, error) {
	c := l.conn(id)
	need := map[*budget]int64{}
	for i, s := range specs {
		b, err := l.checkSpec(c, s)
		if err != nil {
			return nil, fmt.Errorf("allocating object %d of %d: %w", i+1, len(specs), err)
		}
		need[b] += mem.Padded(s.Bytes, l.cfg.Page)
	}
	for b, n := range need {
		err := b.fits(n)
		if err == nil && b.npu == mem.HostNPU {
			err = l.share(c, n)
		}
		if err != nil {
			return nil, fmt.Errorf("allocating %d objects: %w", len(specs), err)
		}
	}
	owners := make([]*request, len(specs))
	for i, s := range specs {
		if s.Ref.Request == "" {
			continue
		}
		var err error
		if owners[i], err = l.touch(now, c, s.Ref); err != nil {
			return nil, fmt.Errorf("allocating: %w", err)
		}
	}
	for i, r := range owners {
		if r != nil && specs[i].Ref.Attempt < r.newest { // raised by a later one of specs
			return nil, fmt.Errorf("allocating for two attempts at request %s: %w", r.id, mem.ErrEnded)
		}
	}
	for b, n := range need {
		l.clear(b, n)
	}
	grants := make([]protocol.Grant, 0, len(specs))
	for i, s := range specs {
		o, err := l.place(s)
		if err != nil {
			l.Undo(grants)
			return nil, fmt.Errorf("allocating object %d of %d: %w", i+1, len(specs), err)
		}
		l.hold(c, o)
		if r := owners[i]; r != nil {
			o.requests[r] = s.Ref.Attempt
			r.objects[o] = true
		}
		grants = append(grants, protocol.Grant{Handle: o.handle, Extent: o.extent})
	}
	l.mark(c)
	return grants, nil
}

// share reports with ErrExhausted that a client would itself hold more of the host memory, which all share, than it may,
// whatever is free: three quarters.
func (l *Ledger) share(c *conn, bytes int64) error {
	held, most := int64(0), mem.Padded(l.cfg.Host-l.cfg.Host/4, l.cfg.Page)
	for o := range c.objects {
		if o.handle.NPU == mem.HostNPU {
			held += o.extent.Bytes
		}
	}
	if held+bytes > most {
		return fmt.Errorf("%d bytes of host memory wanted, %q holds %d and may hold %d of %d: %w", bytes, c.instance, held, most, l.cfg.Host, mem.ErrExhausted)
	}
	return nil
}

// admits reports with ErrDenied that an NPU is granted to another client, which alone may book memory there.
func (b *budget) admits(c *conn) error {
	if b.owner != nil && b.owner != c {
		return fmt.Errorf("NPU %d is granted to %q: %w", b.npu, b.owner.instance, mem.ErrDenied)
	}
	return nil
}

func (l *Ledger) checkSpec(c *conn, s protocol.Spec) (*budget, error) {
	b, err := l.budget(s.NPU)
	if err == nil {
		err = b.admits(c)
	}
	if err != nil {
		return nil, err
	}
	if c.role == protocol.RoleGateway && s.NPU != mem.HostNPU {
		return nil, fmt.Errorf("a gateway has no use for memory of NPU %d: %w", s.NPU, mem.ErrDenied)
	}
	if s.Bytes < 1 || s.Bytes > 1<<50 {
		return nil, fmt.Errorf("%v of %d bytes: %w", s.Kind, s.Bytes, mem.ErrInvalid)
	}
	if s.Kind == 0 || s.Kind > maxKind || len(s.Shape) > maxShape {
		return nil, fmt.Errorf("%v of shape %v: %w", s.Kind, s.Shape, mem.ErrInvalid)
	}
	if s.Shape != nil {
		n := int64(4)
		for _, d := range s.Shape {
			if d < 0 || int64(d) > s.Bytes {
				return nil, fmt.Errorf("%v of shape %v in %d bytes: %w", s.Kind, s.Shape, s.Bytes, mem.ErrInvalid)
			}
			if n *= int64(d); n > s.Bytes {
				return nil, fmt.Errorf("%v of shape %v takes more than %d bytes: %w", s.Kind, s.Shape, s.Bytes, mem.ErrInvalid)
			}
		}
	}
	return b, nil
}

func (l *Ledger) place(s protocol.Spec) (*object, error) {
	b := l.account(s.NPU)
	bytes := mem.Padded(s.Bytes, l.cfg.Page)
	at, err := l.spaces[b.space].Alloc(bytes / l.cfg.Page)
	for err != nil && l.evictIn(b.space) {
		at, err = l.spaces[b.space].Alloc(bytes / l.cfg.Page)
	}
	if err != nil {
		return nil, fmt.Errorf("%d bytes: %w: %w", bytes, mem.ErrExhausted, err)
	}
	id := uint64(len(l.objects)) + 1
	if n := len(l.freeIDs); n > 0 {
		id, l.freeIDs = l.freeIDs[n-1], l.freeIDs[:n-1]
	}
	o := &object{
		handle: mem.Handle{
			Node: l.cfg.Node, Object: id, Generation: l.next(), Kind: s.Kind, NPU: int16(s.NPU), Bytes: s.Bytes, Shape: s.Shape,
		},
		extent:   mem.Extent{Space: b.space, Offset: at * l.cfg.Page, Bytes: bytes},
		conns:    map[*conn]int{},
		requests: map[*request]int{},
	}
	o.handle.Capability = l.capability(o.handle)
	l.objects[id] = o
	b.add(o)
	return o, nil
}

// Undo takes back an Alloc whose memory could not be had, before its handles are known to anybody.
func (l *Ledger) Undo(grants []protocol.Grant) {
	for _, g := range grants {
		o := l.objects[g.Handle.Object]
		for c := range o.conns {
			delete(c.objects, o)
		}
		for r := range o.requests {
			delete(r.objects, o)
		}
		l.free(o)
	}
}

// Attach checks handles and adds connection holds, all or none. With npu >= 0, NPU memory of its domain is booked to
// that NPU. Memory of another domain stays where it is: the client, which sees that by the extent's space, copies it, or
// gets the copy that somebody has made in the NPU's domain already.
func (l *Ledger) Attach(id Conn, a protocol.Attach) ([]protocol.Grant, error) {
	c := l.conn(id)
	to := (*budget)(nil)
	if a.NPU >= 0 {
		var err error
		if to, err = l.budget(a.NPU); err == nil {
			err = to.admits(c)
		}
		if err != nil {
			return nil, fmt.Errorf("attaching: %w", err)
		}
	}
	objects := make([]*object, len(a.Handles))
	moves := map[*object]bool{}
	var moved int64
	for i, h := range a.Handles {
		o, err := l.find(h)
		if err == nil {
			err = o.admits(c, a.Access)
		}
		if err != nil {
			return nil, fmt.Errorf("attaching %v %d: %w", h.Kind, h.Object, err)
		}
		if to != nil {
			o = l.nearest(o, to.space)
		}
		objects[i] = o
		if to != nil && o.handle.NPU >= 0 && o.extent.Space == to.space && int(o.handle.NPU) != to.npu && !moves[o] {
			moves[o] = true
			moved += o.extent.Bytes
		}
	}
	awake := map[*object]bool{}
	for _, o := range objects {
		if o.resting != nil {
			l.wake(o) // so that they do not make room for themselves
			awake[o] = true
		}
	}
	if moved > 0 {
		if err := to.fits(moved); err != nil {
			for _, o := range newestFirst(awake) {
				l.settle(o)
			}
			return nil, fmt.Errorf("attaching %d objects: %w", len(moves), err)
		}
		l.clear(to, moved)
	}
	for o := range moves {
		l.account(int(o.handle.NPU)).remove(o)
		o.handle.NPU = int16(to.npu)
		to.add(o)
	}
	grants := make([]protocol.Grant, len(objects))
	for i, o := range objects {
		l.hold(c, o)
		grants[i] = protocol.Grant{Handle: o.handle, Extent: o.extent}
	}
	l.mark(c)
	return grants, nil
}

// find returns the object that a handle names, after proof that this HMM issued the handle for it.
func (l *Ledger) find(h mem.Handle) (*object, error) {
	if h.Node != l.cfg.Node {
		return nil, fmt.Errorf("it is on node %q, not on %q: %w", h.Node, l.cfg.Node, mem.ErrGone)
	}
	o, ok := l.objects[h.Object]
	if !ok {
		return nil, fmt.Errorf("freed: %w", mem.ErrGone)
	}
	if o.handle.Generation != h.Generation {
		return nil, fmt.Errorf("generation is %d, the handle has %d: %w", o.handle.Generation, h.Generation, mem.ErrGone)
	}
	if !hmac.Equal(h.Capability, l.capability(h)) {
		return nil, fmt.Errorf("capability does not match: %w", mem.ErrDenied)
	}
	return o, nil
}

func (o *object) admits(c *conn, a mem.Access) error {
	switch {
	case a != mem.ReadOnly && a != mem.ReadWrite:
		return fmt.Errorf("access %d: %w", a, mem.ErrInvalid)
	case c.role == protocol.RoleGateway && o.handle.NPU != mem.HostNPU:
		return fmt.Errorf("a gateway maps host memory only: %w", mem.ErrDenied)
	case a == mem.ReadWrite && o.handle.Sealed:
		return fmt.Errorf("for writing: %w", mem.ErrSealed)
	}
	return nil
}

// capability proves that a handle was issued here. The NPU is not covered: it changes when the object is handed over,
// and handles that are under way stay good.
func (l *Ledger) capability(h mem.Handle) []byte {
	b := binary.AppendUvarint(make([]byte, 0, 128), uint64(len(h.Node)))
	b = append(b, h.Node...)
	b = binary.BigEndian.AppendUint64(b, h.Object)
	b = binary.BigEndian.AppendUint64(b, h.Generation)
	b = append(b, byte(h.Kind))
	b = binary.BigEndian.AppendUint64(b, uint64(h.Bytes))
	if h.Sealed {
		b = binary.BigEndian.AppendUint32(append(b, 1), h.CRC)
	} else {
		b = append(b, 0)
	}
	for _, d := range h.Shape {
		b = binary.BigEndian.AppendUint64(b, uint64(d))
	}
	l.mac.Reset()
	l.mac.Write(b)
	return l.mac.Sum(nil)[:16]
}

// Seal makes objects that the client holds final and adds the request hold, all or none.
func (l *Ledger) Seal(now time.Time, id Conn, s protocol.Seal) ([]mem.Handle, error) {
	objects := make([]*object, len(s.Items))
	for i, item := range s.Items {
		o, err := l.held(id, item.Object)
		if err == nil && o.handle.Sealed {
			err = mem.ErrSealed
		}
		if err != nil {
			return nil, fmt.Errorf("sealing object %d: %w", item.Object.ID, err)
		}
		objects[i] = o
	}
	if err := l.keep(now, id, s.Ref, objects); err != nil {
		return nil, fmt.Errorf("sealing: %w", err)
	}
	handles := make([]mem.Handle, len(objects))
	for i, o := range objects {
		o.handle.Sealed, o.handle.CRC = true, s.Items[i].CRC
		o.handle.Capability = l.capability(o.handle)
		handles[i] = o.handle
	}
	return handles, nil
}

// Finish seals an object that the client holds without a request hold: it is a copy of a sealed one.
func (l *Ledger) Finish(id Conn, s protocol.Sealing) (mem.Handle, error) {
	o, err := l.held(id, s.Object)
	if err == nil && o.handle.Sealed {
		err = mem.ErrSealed
	}
	if err != nil {
		return mem.Handle{}, fmt.Errorf("finishing object %d: %w", s.Object.ID, err)
	}
	o.handle.Sealed, o.handle.CRC = true, s.CRC
	o.handle.Capability = l.capability(o.handle)
	return o.handle, nil
}

// Keep adds a request hold to objects that the client holds, all or none.
func (l *Ledger) Keep(now time.Time, id Conn, k protocol.Keep) error {
	objects := make([]*object, len(k.Objects))
	for i, name := range k.Objects {
		var err error
		if objects[i], err = l.held(id, name); err != nil {
			return fmt.Errorf("keeping object %d: %w", name.ID, err)
		}
	}
	if err := l.keep(now, id, k.Ref, objects); err != nil {
		return fmt.Errorf("keeping: %w", err)
	}
	return nil
}

func (l *Ledger) keep(now time.Time, id Conn, ref protocol.Ref, objects []*object) error {
	r, err := l.touch(now, l.conn(id), ref)
	if err != nil {
		return err
	}
	for _, o := range objects {
		o.requests[r] = ref.Attempt
		r.objects[o] = true
	}
	return nil
}

// Free drops connection holds of the client, one for each mention. Objects that it does not hold are an ErrInvalid after
// the others are freed.
func (l *Ledger) Free(id Conn, objects []protocol.Object) error {
	c := l.conn(id)
	var errs []error
	for _, name := range slices.Backward(objects) { // see newestFirst
		o, err := l.held(id, name)
		if err != nil {
			errs = append(errs, fmt.Errorf("freeing object %d: %w", name.ID, err))
			continue
		}
		l.takeBack(c, o)
	}
	return errors.Join(errs...)
}

// held returns an object on which the client has a connection hold.
func (l *Ledger) held(id Conn, name protocol.Object) (*object, error) {
	c := l.conn(id)
	o, ok := l.objects[name.ID]
	if !ok || o.handle.Generation != name.Generation || o.conns[c] == 0 {
		return nil, fmt.Errorf("this connection does not hold it: %w", mem.ErrInvalid)
	}
	return o, nil
}

func (l *Ledger) free(o *object) {
	l.spaces[o.extent.Space].Release(o.extent.Offset / l.cfg.Page)
	l.account(int(o.handle.NPU)).remove(o)
	l.forgetCopy(o)
	delete(l.objects, o.handle.Object)
	l.freeIDs = append(l.freeIDs, o.handle.Object)
	l.effects.Freed = append(l.effects.Freed, o.extent)
}
