package ledger

import "trireme.dev/shared/hbm/protocol"

// Of each client the ledger knows how much device memory it has in use, and the most since it last asked: all that is booked to its NPUs, but
// for what only a cache keeps, and the weights that it holds in their memory domains. Weights in a domain in which it has no NPU do not
// count: it copies from them. What several clients hold counts for each. Bytes of whole pages.

// Use tells, and, if it is to, begins to look for the most anew.
func (l *Ledger) Use(id Conn, again bool) protocol.Use {
	c := l.conn(id)
	u := protocol.Use{Now: l.uses(c), Most: c.most}
	if again {
		c.most = u.Now
	}
	return u
}

func (l *Ledger) uses(c *conn) (bytes int64) {
	for _, n := range c.npus {
		t := &l.budgets[n+1].total
		bytes += t.Used + t.Padded - t.Cached
	}
	for space, held := range c.weights {
		if c.domains[space] > 0 {
			bytes += held
		}
	}
	return bytes
}

// mark is called behind whatever may have given a client more.
func (l *Ledger) mark(c *conn) { c.most = max(c.most, l.uses(c)) }

// hold adds a connection hold.
func (l *Ledger) hold(c *conn, o *object) {
	if o.conns[c]++; o.conns[c] == 1 && o.shared() {
		c.weights[o.extent.Space] += o.extent.Bytes
	}
	c.objects[o] = true
}

// unhold ends all connection holds of a client on an object.
func (l *Ledger) unhold(c *conn, o *object) {
	if o.conns[c] > 0 && o.shared() {
		c.weights[o.extent.Space] -= o.extent.Bytes
	}
	delete(o.conns, c)
	delete(c.objects, o)
}
