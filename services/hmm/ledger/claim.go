package ledger

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"
)

// claim says who runs a part. Its generation stands in its slot of the claim table as long as it is held; generations are
// never drawn twice, so a slot that serves another claim later fences the old one all the same.
type claim struct {
	part       protocol.Part
	generation uint64
	slot       int
	reply      string
	owner      *conn // nil: orphan
	request    *request
	encoding   *encoding // the MM object that its holder makes for the cache, or nil
}

type claimKey struct {
	request, stage string
	part           int
}

func keyOf(p protocol.Part) claimKey { return claimKey{p.Request, p.Stage, p.Part} }

// Claim gives a part to the client, whoever had it before: ErrEnded when the request has ended or a newer attempt is
// known.
func (l *Ledger) Claim(now time.Time, id Conn, c protocol.Claim) (protocol.Claimed, error) {
	p := c.Part
	if p.Stage == "" || len(p.Stage) > maxID || len(c.Reply) > 4*maxID || p.Part < 0 {
		return protocol.Claimed{}, fmt.Errorf("claiming part %d of stage %.40q: %w", p.Part, p.Stage, mem.ErrInvalid)
	}
	r, err := l.raise(now, l.conn(id), p.Request, p.Attempt, p.Left)
	if err != nil {
		return protocol.Claimed{}, fmt.Errorf("claiming part %d of %s: %w", p.Part, p.Stage, err)
	}
	k, ok := l.claims[keyOf(p)]
	if !ok {
		if most := l.cfg.Slots - l.cfg.Slots/4; len(l.conn(id).claims) >= most {
			return protocol.Claimed{}, fmt.Errorf("claiming: %q has %d claims, as many as one may have of %d: %w",
				l.conn(id).instance, most, l.cfg.Slots, mem.ErrExhausted)
		}
		n := len(l.freeSlots)
		if n == 0 {
			return protocol.Claimed{}, fmt.Errorf("claiming: all %d claims are in use: %w", l.cfg.Slots, mem.ErrExhausted)
		}
		k = &claim{slot: l.freeSlots[n-1], request: r}
		l.freeSlots = l.freeSlots[:n-1]
		l.claims[keyOf(p)] = k
		r.claims[k] = true
	} else if k.owner != nil {
		l.heard(k)
		delete(k.owner.claims, k)
	}
	l.endEncoding(k.encoding)
	k.part, k.reply, k.generation, k.owner = p, c.Reply, l.next(), l.conn(id)
	k.owner.claims[k] = true
	l.effects.Slots = append(l.effects.Slots, Slot{k.slot, k.generation})
	past := r.records[keyOf(p)]
	out := protocol.Claimed{Generation: k.generation, Slot: k.slot, Strikes: past.strikes, Reached: past.reached}
	if o := r.logs[keyOf(p)]; o != nil {
		h := o.handle
		out.Log = &h
	}
	return out, nil
}

// Inherit makes the holder of a claim the writer of the part's sequence, all or nothing: whoever claims the part later is
// told the log. With a request's last log in a memory domain, dropped for one in another domain, its KV there goes, too. The
// writer before may have what is dropped mapped and still write to it: it is handed out again when that process has freed it,
// or has exited. ErrFenced and ErrEnded as Unclaim.
func (l *Ledger) Inherit(now time.Time, id Conn, v protocol.Inherit) error {
	fail := func(err error) error {
		return fmt.Errorf("inheriting part %d of %s of request %.40s: %w", v.Part.Part, v.Part.Stage, v.Part.Request, err)
	}
	if err := l.claimed(id, v.Part, v.Generation); err != nil {
		return fail(err)
	}
	if len(v.Keep) == 0 {
		return fail(fmt.Errorf("no token log: %w", mem.ErrInvalid))
	}
	keep := make([]*object, len(v.Keep))
	for i, name := range v.Keep {
		o, err := l.held(id, name)
		if err == nil && i == 0 && o.handle.Kind != mem.KindLog {
			err = fmt.Errorf("%v is no token log: %w", o.handle.Kind, mem.ErrInvalid)
		}
		if err != nil {
			return fail(fmt.Errorf("object %d: %w", name.ID, err))
		}
		keep[i] = o
	}
	r, err := l.raise(now, l.conn(id), v.Part.Request, v.Part.Attempt, v.Part.Left)
	if err != nil {
		return fail(err)
	}
	var drop []*object
	for _, name := range v.Drop {
		o, ok := l.objects[name.ID]
		if ok && o.handle.Generation == name.Generation && r.objects[o] && !slices.Contains(keep, o) {
			drop = append(drop, o)
		}
	}
	for _, o := range keep {
		o.requests[r] = v.Part.Attempt
		r.objects[o] = true
	}
	r.logs[keyOf(v.Part)] = keep[0]
	for part, o := range r.logs {
		if slices.Contains(drop, o) { // another part's, which nobody could find any more
			delete(r.logs, part)
		}
	}
	left := map[int]bool{}                    // memory domains that the sequence has left
	for _, o := range slices.Backward(drop) { // see newestFirst
		if o.handle.Kind == mem.KindLog && o.extent.Space != keep[0].extent.Space {
			left[o.extent.Space] = true
		}
		l.drop(r, o)
	}
	for space := range left {
		l.leave(r, space)
	}
	return nil
}

// Unclaim gives a claim up, or says why it is held no more: ErrEnded when the request has ended or a newer attempt is
// known, ErrFenced when somebody has claimed the part since, even if that one has given it up again.
func (l *Ledger) Unclaim(id Conn, u protocol.Unclaim) error {
	if err := l.claimed(id, u.Part, u.Generation); err != nil {
		return fmt.Errorf("giving up part %d of %s: request %.40s: %w", u.Part.Part, u.Part.Stage, u.Part.Request, err)
	}
	k := l.claims[keyOf(u.Part)]
	l.heard(k)
	l.release(k)
	return nil
}

// claimed says why a client does not hold a claim, nil when it does.
func (l *Ledger) claimed(id Conn, part protocol.Part, generation uint64) error {
	r, ok := l.requests[part.Request]
	if !ok || r.ended || r.newest > part.Attempt {
		return mem.ErrEnded
	}
	k, ok := l.claims[keyOf(part)]
	if !ok || k.generation != generation || k.owner != l.conn(id) {
		return fmt.Errorf("generation %d: %w", generation, mem.ErrFenced)
	}
	return nil
}

// release ends a claim and frees its slot.
func (l *Ledger) release(k *claim) {
	delete(l.claims, keyOf(k.part))
	delete(k.request.claims, k)
	l.endEncoding(k.encoding)
	if k.owner != nil {
		delete(k.owner.claims, k)
	}
	l.freeSlots = append(l.freeSlots, k.slot)
	l.effects.Slots = append(l.effects.Slots, Slot{k.slot, 0})
}

// Orphans hands out at most protocol.MaxBatch claims of a stage whose claimant's connection has ended, oldest first. They
// end with that: each orphan goes to one caller, who gives its message back to the queue.
func (l *Ledger) Orphans(stage string) []protocol.Orphan {
	var found []*claim
	for _, k := range l.claims {
		if k.owner == nil && k.part.Stage == stage {
			found = append(found, k)
		}
	}
	slices.SortFunc(found, func(a, b *claim) int { return cmp.Compare(a.generation, b.generation) })
	var out []protocol.Orphan
	for _, k := range found[:min(len(found), protocol.MaxBatch)] {
		out = append(out, protocol.Orphan{Part: k.part, Generation: k.generation, Reply: k.reply})
		l.release(k)
	}
	return out
}

// Gone reports whether an instance of a stage has gone since it was last asked, or may have before the daemon started. Each
// is told to one caller, who looks for the messages that it had taken and not claimed yet.
func (l *Ledger) Gone(stage string) bool {
	if l.settled[stage] || len(stage) > maxID || len(l.settled) >= maxStages {
		return false
	}
	l.settled[stage] = true
	return true
}

// maxStages bounds the stages that clients can name.
const maxStages = 64

// Unclaimed returns the parts that nobody has claimed, whether their request goes on or not.
func (l *Ledger) Unclaimed(parts []protocol.Part) []protocol.Part {
	var out []protocol.Part
	for _, p := range parts {
		if k := l.claims[keyOf(p)]; k == nil || k.part.Attempt != p.Attempt {
			out = append(out, p)
		}
	}
	return out
}
