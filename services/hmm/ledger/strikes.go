package ledger

import "trireme.dev/shared/hbm/protocol"

// record is how the deliveries of a part have ended. A request that brings every process down which runs it must not be
// given to the next one for ever, and those that only happened to run beside it must not be taken for it: a strike is for
// who was running, and who gets further than anybody before has none. Dying at the same place each time is no progress.
type record struct {
	strikes int
	reached uint32 // furthest at this attempt
}

// heard takes note of how far a holder came that let go of its claim.
func (r record) heard(p protocol.Progress) record {
	if p.Reached > r.reached {
		return record{reached: p.Reached}
	}
	return r
}

// died takes note of a holder that has died.
func (r record) died(p protocol.Progress) record {
	next := r.heard(p)
	if p.Running && next == r {
		next.strikes++
	}
	return next
}

// progress is what the holder of a claim has said last.
func (l *Ledger) progress(k *claim) protocol.Progress {
	if l.cfg.Board == nil {
		return protocol.Progress{}
	}
	return protocol.ParseProgress(l.cfg.Board(k.slot), k.generation)
}

// heard notes that the holder of a claim lets go of it.
func (l *Ledger) heard(k *claim) { k.request.note(k, record.heard, l.progress(k)) }

// died notes that the holder of a claim has died.
func (l *Ledger) died(k *claim) { k.request.note(k, record.died, l.progress(k)) }

func (r *request) note(k *claim, how func(record, protocol.Progress) record, p protocol.Progress) {
	key := keyOf(k.part)
	old := r.records[key]
	next := how(old, p)
	if next == old {
		return
	}
	if r.records == nil {
		r.records = map[claimKey]record{}
	}
	r.records[key] = next
}

// again begins the records of a newer attempt: strikes stay, but it starts from nowhere.
func (r *request) again() {
	for key, past := range r.records {
		past.reached = 0
		r.records[key] = past
	}
}

// Died notes that a client's connection has ended without its taking leave: Disconnect, and a strike for each part that it
// was running without progress.
func (l *Ledger) Died(id Conn) {
	for k := range l.conn(id).claims {
		l.died(k)
	}
	l.Disconnect(id)
}
