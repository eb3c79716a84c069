package stage

import (
	"math"
	"sync"
	"time"

	"trireme.dev/shared/wire"
)

// endedSet remembers for a while which requests, attempts and choices have ended.
type endedSet struct {
	mu    sync.Mutex
	of    map[endedKey]end
	swept time.Time
}

type endedKey struct {
	request string
	choice  int // -1: all
}

type end struct {
	attempt int // and those before it
	at      time.Time
}

// endedKept is how long an ended request is remembered: a message that was on its way when the event came is seen far
// sooner, and later ones are refused by the HMM's claim.
const endedKept = time.Minute

func (e *endedSet) add(m *wire.Done) {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := time.Now()
	if e.of == nil {
		e.of = make(map[endedKey]end)
	}
	k := endedKey{m.Request, max(m.Choice, -1)}
	attempt := m.Attempt
	if attempt == 0 {
		attempt = math.MaxInt
	}
	e.of[k] = end{max(attempt, e.of[k].attempt), now}
	if now.Sub(e.swept) > endedKept {
		e.swept = now
		for k, x := range e.of {
			if now.Sub(x.at) > endedKept {
				delete(e.of, k)
			}
		}
	}
}

func (e *endedSet) has(req wire.Request, choice int) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.of[endedKey{req.ID, -1}].attempt >= req.Attempt || e.of[endedKey{req.ID, choice}].attempt >= req.Attempt
}

// whole reports whether all attempts at a request have ended.
func (e *endedSet) whole(req wire.Request) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.of[endedKey{req.ID, -1}].attempt == math.MaxInt
}
