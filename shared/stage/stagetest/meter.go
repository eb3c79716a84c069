package stagetest

import (
	"math"
	"sync"

	"trireme.dev/shared/kernel"
	"trireme.dev/shared/stage"
)

// Meter counts the steps and pieces of pictures that a stage computes, and can hold the next one at its beginning.
type Meter struct {
	kernel.Compute
	r *Rig

	mu      sync.Mutex
	changed sync.Cond
	begun   int
	limit   int // those beyond are held
}

// Meter makes a stage count what it computes: call it before the stage serves.
func (r *Rig) Meter(s *stage.Stage) *Meter {
	m := &Meter{Compute: s.NPUs()[0].Compute, r: r, limit: math.MaxInt}
	m.changed.L = &m.mu
	r.tb.Cleanup(m.Release)
	s.NPUs()[0].Compute = m
	return m
}

// Begin implements kernel.Meter.
func (m *Meter) Begin(kernel.Work) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.begun++
	for m.begun > m.limit { // one begins at a time
		m.changed.Wait()
	}
}

// End implements kernel.Meter.
func (m *Meter) End() {}

// Begun is how many steps and pieces have begun, with the one that is held.
func (m *Meter) Begun() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.begun
}

// Hold holds the step or piece after the n-th, counted from the beginning. Await waits for that.
func (m *Meter) Hold(n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.limit = n
	m.changed.Broadcast()
}

// Await waits until a step or piece is being held.
func (m *Meter) Await() {
	m.r.tb.Helper()
	m.r.Until("a step is held", func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.begun > m.limit
	})
}

// Release lets all go on.
func (m *Meter) Release() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.limit = math.MaxInt
	m.changed.Broadcast()
}
