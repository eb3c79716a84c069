package cpu

import (
	"fmt"
	"sync"
	"unsafe"

	"trireme.dev/shared/kernel"
)

// memory is the scratch of a Compute: pages of its own for each array, outside the garbage-collected heap, so that they are gone
// when they are given back, as a GPU's are. Whoever touches them then crashes.
type memory struct {
	mu    sync.Mutex
	pages map[*float32][]byte // by the first element
}

// Alloc implements kernel.Compute.
func (c *compute) Alloc(n int) ([]float32, error) {
	if n == 0 {
		return nil, nil
	}
	p, err := takePages(4 * n)
	if err != nil {
		return nil, fmt.Errorf("%w: %d MiB: %w", kernel.ErrNoMemory, n>>18, err)
	}
	scratch := unsafe.Slice((*float32)(unsafe.Pointer(&p[0])), n)
	m := &c.memory
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pages == nil {
		m.pages = make(map[*float32][]byte)
	}
	m.pages[&scratch[0]] = p
	return scratch, nil
}

// Free implements kernel.Compute.
func (c *compute) Free(scratch []float32) {
	if len(scratch) == 0 {
		return
	}
	m := &c.memory
	m.mu.Lock()
	defer m.mu.Unlock()
	p, ok := m.pages[&scratch[0]]
	if !ok || len(p) != 4*len(scratch) {
		panic(fmt.Sprintf("BUG: %d floats are given back that are not what Alloc has returned", len(scratch)))
	}
	delete(m.pages, &scratch[0])
	givePages(p)
}

func (m *memory) close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range m.pages {
		givePages(p)
	}
	m.pages = nil
}
