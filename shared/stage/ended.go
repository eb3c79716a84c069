package stage

import (
	"sync"
	"time"
)

// endedSet remembers for a while which requests and choices have ended.
type endedSet struct {
	mu    sync.Mutex
	at    map[endedKey]time.Time
	swept time.Time
}

type endedKey struct {
	request string
	choice  int // -1: all
}

// endedKept is how long an ended request is remembered: a message that was on its way when the event came is seen far
// sooner, and later ones are refused by the HMM's claim.
const endedKept = time.Minute

func (e *endedSet) add(request string, choice int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := time.Now()
	if e.at == nil {
		e.at = make(map[endedKey]time.Time)
	}
	e.at[endedKey{request, choice}] = now
	if now.Sub(e.swept) > endedKept {
		e.swept = now
		for k, t := range e.at {
			if now.Sub(t) > endedKept {
				delete(e.at, k)
			}
		}
	}
}

func (e *endedSet) has(request string, choice int) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	_, all := e.at[endedKey{request, -1}]
	_, one := e.at[endedKey{request, choice}]
	return all || one
}
