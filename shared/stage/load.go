package stage

import (
	"sync"

	"trireme.dev/shared/sched"
)

// load is what a process has in work, and at which levels it asks for more (sched.Load): the idlest of all instances takes first.
type load struct {
	mu      sync.Mutex
	work    sched.Load
	onward  map[string]bool          // roles whose results the process goes on with itself
	held    map[string]bool          // see Stage.Hold
	shut    bool                     // nothing is taken, see Stage.handOver
	room    map[string]int           // messages of a role in work at once, at most
	changed map[string]chan struct{} // by role, of those who ask: closed when they would ask differently
}

// take counts a message that a role is to take, if it has room for it.
func (l *load) take(r Role) (ok bool) {
	l.change(func() {
		has := l.of(r.Name)
		if ok = *has < l.room[r.Name]; !ok {
			return
		}
		*has++
		if r.Late {
			l.held[r.Name] = true
		}
	})
	return ok
}

// full reports whether a role has no room.
func (l *load) full(role string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return *l.of(role) >= l.room[role]
}

// drop counts a message that is settled.
func (l *load) drop(role string) { l.change(func() { *l.of(role)-- }) }

// hold sets whether a role wants nothing beside what it has.
func (l *load) hold(role string, hold bool) {
	l.change(func() { l.held[role] = hold })
}

// change has f change the load, and wakes those whom that concerns.
func (l *load) change(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held == nil {
		l.held, l.room = make(map[string]bool), make(map[string]int)
	}
	type ask struct {
		level int
		waits bool
	}
	asks := func(role string) ask { return ask{l.level(role), l.waits(role)} }
	before := make(map[string]ask, len(l.changed))
	for role := range l.changed {
		before[role] = asks(role)
	}
	f()
	for role, was := range before {
		if asks(role) != was {
			close(l.changed[role])
			delete(l.changed, role)
		}
	}
}

func (l *load) level(role string) int {
	if role == Decode {
		return l.work.LevelToDecode()
	}
	return l.work.LevelToCompute(l.onward[role])
}

// waits reports whether a role does not ask: it has something and wants no more, or has no room.
func (l *load) waits(role string) bool {
	has := *l.of(role)
	return l.held[role] && has > 0 || has >= l.room[role]
}

// of is what a role has in work.
func (l *load) of(role string) *int {
	switch role {
	case Encode:
		return &l.work.Pictures
	case Prefill:
		return &l.work.Prompts
	}
	return &l.work.Sequences
}

// ask says how a role asks for work: at which level, how much it has, and how much more it can take, 0: not at all for now; and what is
// closed when that changes.
func (l *load) ask(role string) (level, has, room int, changed <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.changed[role]
	if c == nil {
		if l.changed == nil {
			l.changed = make(map[string]chan struct{})
		}
		c = make(chan struct{})
		l.changed[role] = c
	}
	if has = *l.of(role); !l.waits(role) {
		room = l.room[role] - has
	}
	return l.level(role), has, room, c
}

// makeRoom sets how much of each role may be in work at once: so much for each NPU, and nothing while work is handed over.
func (s *Stage) makeRoom() {
	npus := setOf(s.NPUs()).Len()
	takes := false
	s.load.change(func() {
		if s.load.shut {
			npus = 0
		}
		takes = npus > 0
		for _, r := range s.roles {
			s.load.room[r.Name] = npus * r.Slots
		}
	})
	if err := s.offers.open.listen(takes); err != nil {
		s.Log.Warn("what others offer to anybody does not come here", "error", err)
	}
}

// doors sets whether nothing more is taken.
func (l *load) doors(shut bool) { l.change(func() { l.shut = shut }) }

// running is the number of messages in work.
func (l *load) running() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.work.Pictures + l.work.Prompts + l.work.Sequences
}

// Hold says whether a role wants no work beside what it has, although it has room: what it would get later is better off with
// whoever is idle first. It takes work when it has none in any case.
func (s *Stage) Hold(role string, hold bool) { s.load.hold(role, hold) }
