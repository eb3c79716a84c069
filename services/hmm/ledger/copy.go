package ledger

import (
	"fmt"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"
)

// Between two memory domains, and between nodes, a hand-over is a copy. Whoever takes an object makes the copy; the source
// and its holds are not touched by that. Of a sealed object one copy in a domain serves all who want it there.

// copyKey names a copy of a sealed object in a memory domain.
type copyKey struct {
	space  int
	origin uint64 // generation of the object that was copied first
}

// nearest is the copy of a sealed object in a space, or else the object.
func (l *Ledger) nearest(o *object, space int) *object {
	if o.extent.Space == space || o.handle.NPU == mem.HostNPU || !o.handle.Sealed {
		return o
	}
	if c := l.copies[copyKey{space, o.first()}]; c != nil {
		return c
	}
	return o
}

// first is the generation of the object whose content this one has.
func (o *object) first() uint64 {
	if o.origin != 0 {
		return o.origin
	}
	return o.handle.Generation
}

// forgetCopy keeps others from getting o in place of what it is a copy of.
func (l *Ledger) forgetCopy(o *object) {
	if key := (copyKey{o.extent.Space, o.origin}); l.copies[key] == o {
		delete(l.copies, key)
	}
}

// Copied notes that the client has copied objects that it holds into others that only it knows, all or none: the copy of
// a sealed object is sealed with the same checksum, which the client has compared. It returns the copies' handles.
func (l *Ledger) Copied(id Conn, copies []protocol.Copy) ([]mem.Handle, error) {
	type pair struct{ from, to *object }
	pairs := make([]pair, len(copies))
	seen := map[*object]bool{}
	for i, c := range copies {
		from, err := l.held(id, c.Source)
		if err != nil {
			return nil, fmt.Errorf("copying object %d: %w", c.Source.ID, err)
		}
		to, err := l.held(id, c.Copy)
		if err == nil && (to.handle.Sealed || to.handle.Kind != from.handle.Kind || to.handle.Bytes != from.handle.Bytes || seen[to]) {
			err = fmt.Errorf("it is no new %v of %d bytes: %w", from.handle.Kind, from.handle.Bytes, mem.ErrInvalid)
		}
		if err == nil && to.shared() {
			if err = l.conn(id).makes(to); err == nil && !from.handle.Sealed {
				err = fmt.Errorf("a weight that is not final: %w", mem.ErrInvalid)
			}
		}
		if err != nil {
			return nil, fmt.Errorf("copying object %d to object %d: %w", c.Source.ID, c.Copy.ID, err)
		}
		seen[to] = true
		pairs[i] = pair{from, to}
	}
	handles := make([]mem.Handle, len(pairs))
	for i, p := range pairs {
		l.copied += p.from.handle.Bytes
		if p.from.handle.Sealed {
			p.to.handle.Sealed, p.to.handle.CRC = true, p.from.handle.CRC
			p.to.handle.Capability = l.capability(p.to.handle)
			if p.to.maker != nil {
				l.made(p.to)
			}
			p.to.origin = p.from.first()
			if key := (copyKey{p.to.extent.Space, p.to.origin}); l.copies[key] == nil && p.to.handle.NPU != mem.HostNPU {
				l.copies[key] = p.to
			}
		}
		handles[i] = p.to.handle
	}
	return handles, nil
}

// leave lets a request's KV in a memory domain go when none of its token logs is left there: all its sequences have been
// copied out of it.
func (l *Ledger) leave(r *request, space int) {
	for o := range r.objects {
		if o.handle.Kind == mem.KindLog && o.extent.Space == space {
			return
		}
	}
	for _, o := range newestFirst(r.objects) {
		if o.handle.Kind == mem.KindKV && o.extent.Space == space {
			l.drop(r, o)
		}
	}
}
