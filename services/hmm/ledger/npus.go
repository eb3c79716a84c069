package ledger

import (
	"fmt"
	"slices"
	"time"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"
)

// An NPU is granted to a connection, or spare. Those of a connection that had a name stay reserved for the next one of the same
// name for a while after its end, so that a process which is started again finds the NPUs that its layout is made for.

// Join grants a client more NPUs: those wanted, or as many as told, of what is reserved for its name and then the lowest spare ones;
// all or none. ErrExhausted when they are not to be had.
func (l *Ledger) Join(now time.Time, id Conn, j protocol.Join) ([]int, error) {
	c := l.conn(id)
	npus, err := l.choose(now, c.name, j.NPUs, j.Want)
	if err == nil && c.role == protocol.RoleGateway {
		err = fmt.Errorf("a gateway has no NPUs: %w", mem.ErrDenied)
	}
	if err != nil {
		return nil, fmt.Errorf("joining NPUs: %w", err)
	}
	l.grant(c, npus)
	return npus, nil
}

// Part takes NPUs from a client that has them, all or none; they are spare from then on, or reserved for a name. ErrInvalid when the client has one of them
// not, or holds something on one that nobody else keeps: memory booked there that no request and no cache has, or weights in
// a domain in which no NPU is left to it.
func (l *Ledger) Part(now time.Time, id Conn, p protocol.Parting) error {
	c, npus := l.conn(id), p.NPUs
	for i, n := range npus {
		if !slices.Contains(c.npus, n) || slices.Contains(npus[:i], n) {
			return fmt.Errorf("parting with NPU %d, %q has %v: %w", n, c.instance, c.npus, mem.ErrInvalid)
		}
	}
	rest := slices.DeleteFunc(slices.Clone(c.npus), func(n int) bool { return slices.Contains(npus, n) })
	for _, n := range npus {
		if err := l.emptied(c, n, rest); err != nil {
			return fmt.Errorf("parting with NPU %d: %w", n, err)
		}
	}
	for _, n := range npus {
		l.keepFor(now, n, p.For)
	}
	c.npus = rest
	return nil
}

// emptied reports with ErrInvalid what a client holds on an NPU that would be nobody's without it; rest are the NPUs it keeps.
func (l *Ledger) emptied(c *conn, npu int, rest []int) error {
	objects, bytes := 0, int64(0)
	for o := range c.objects {
		if int(o.handle.NPU) == npu && len(o.requests) == 0 && !o.cached() {
			objects, bytes = objects+1, bytes+o.extent.Bytes
		}
	}
	if objects > 0 {
		return fmt.Errorf("%q holds %d objects of %d bytes there that no request has: free them first: %w", c.instance, objects, bytes, mem.ErrInvalid)
	}
	space := l.budgets[npu+1].space
	if slices.ContainsFunc(rest, func(n int) bool { return l.budgets[n+1].space == space }) {
		return nil
	}
	for o := range c.objects {
		if o.shared() && o.extent.Space == space {
			return fmt.Errorf("%q holds weights in its domain, where no other NPU is left to it: close them first: %w", c.instance, mem.ErrInvalid)
		}
	}
	return nil
}

// choose finds NPUs for a client of a name, or of none: those wanted, or n of what there is.
func (l *Ledger) choose(now time.Time, name string, n int, want []int) ([]int, error) {
	l.lapse(now)
	if n < 0 || len(want) > 0 && n != 0 && n != len(want) {
		return nil, fmt.Errorf("%d NPUs, of which are named %v: %w", n, want, mem.ErrInvalid)
	}
	for i, w := range want {
		if w < 0 || w >= len(l.cfg.NPUs) || slices.Contains(want[:i], w) {
			return nil, fmt.Errorf("NPUs %v, the node has %d: %w", want, len(l.cfg.NPUs), mem.ErrInvalid)
		}
		if b := l.budgets[w+1]; !b.spare(name) {
			return nil, fmt.Errorf("NPU %d is wanted, %s: %w", w, b.taken(now), mem.ErrExhausted)
		}
	}
	if len(want) > 0 {
		return slices.Clone(want), nil
	}
	var own, others []int
	kept := 0
	for _, b := range l.budgets[1:] {
		switch {
		case !b.spare(name):
			if b.owner == nil {
				kept++
			}
		case b.reserved != "":
			own = append(own, b.npu)
		default:
			others = append(others, b.npu)
		}
	}
	free := append(own, others...)
	if n > len(free) {
		return nil, fmt.Errorf("%d NPUs wanted, %d of %d are free, and %d reserved for instances that may come back: %w",
			n, len(free), len(l.cfg.NPUs), kept, mem.ErrExhausted)
	}
	free = free[:n:n]
	slices.Sort(free)
	return free, nil
}

// spare reports whether a client of a name, or of none, may have the NPU.
func (b *budget) spare(name string) bool {
	return b.owner == nil && (b.reserved == "" || b.reserved == name)
}

// taken says why an NPU is not to be had.
func (b *budget) taken(now time.Time) string {
	if b.owner != nil {
		return fmt.Sprintf("%q has it", b.owner.instance)
	}
	return fmt.Sprintf("it is reserved for %q for %v", b.reserved, b.until.Sub(now).Round(time.Millisecond))
}

// grant gives NPUs to a client.
func (l *Ledger) grant(c *conn, npus []int) {
	for _, n := range npus {
		b := l.budgets[n+1]
		b.owner = c
		c.domains[b.space]++
		l.unreserve(b)
	}
	c.npus = append(c.npus, npus...)
	l.mark(c)
}

// reserve takes the NPUs of a client that has gone, and keeps them for its name.
func (l *Ledger) reserve(now time.Time, c *conn) {
	for _, n := range c.npus {
		l.keepFor(now, n, c.name)
	}
}

// keepFor takes an NPU from whoever has it, and keeps it for a name; "": for nobody.
func (l *Ledger) keepFor(now time.Time, npu int, name string) {
	b := l.budgets[npu+1]
	b.owner.domains[b.space]--
	b.owner = nil
	if name != "" && l.cfg.Reserve > 0 {
		b.reserved, b.until = name, now.Add(l.cfg.Reserve)
		l.reserved = append(l.reserved, b)
	}
}

func (l *Ledger) unreserve(b *budget) {
	if b.reserved == "" {
		return
	}
	b.reserved = ""
	l.reserved = slices.DeleteFunc(l.reserved, func(x *budget) bool { return x == b })
}

// lapse ends the reservations whose time is over.
func (l *Ledger) lapse(now time.Time) {
	for len(l.reserved) > 0 && !l.reserved[0].until.After(now) {
		l.unreserve(l.reserved[0])
	}
}
