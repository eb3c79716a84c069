package hbm

import (
	"errors"
	"fmt"
	"sync"

	"trireme.dev/shared/mem"
)

// maps counts who uses each mapped extent in this process: an object attached twice is mapped once.
type maps struct {
	mu     sync.Mutex
	spaces []mem.Space
	live   map[place]*mapping
}

// place tells extents apart; live ones of one space do not overlap.
type place struct {
	space  int
	offset int64
}

type mapping struct {
	readers, writers int
	sealed           bool // never writable again
}

func (m *mapping) access() mem.Access {
	if m.writers > 0 && !m.sealed {
		return mem.ReadWrite
	}
	return mem.ReadOnly
}

func (m *mapping) count(a mem.Access, by int) {
	if a == mem.ReadWrite {
		m.writers += by
	} else {
		m.readers += by
	}
}

// acquire maps e, or counts one user more of it, and returns its memory.
func (ms *maps) acquire(e mem.Extent, a mem.Access) ([]byte, error) {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	if e.Space < 0 || e.Space >= len(ms.spaces) {
		return nil, fmt.Errorf("%v: this client has %d spaces: %w", e, len(ms.spaces), mem.ErrInvalid)
	}
	space, at := ms.spaces[e.Space], place{e.Space, e.Offset}
	if m, ok := ms.live[at]; ok {
		m.count(a, 1)
		if err := space.Protect(e, m.access()); err != nil {
			m.count(a, -1)
			return nil, err
		}
		return space.Bytes(e), nil
	}
	if _, err := space.Map(e, a); err != nil {
		return nil, err
	}
	m := &mapping{}
	m.count(a, 1)
	ms.live[at] = m
	return space.Bytes(e), nil
}

// window reserves a second range of addresses for extents of a space.
func (ms *maps) window(space int, bytes int64) (mem.Window, error) {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	if space < 0 || space >= len(ms.spaces) {
		return nil, fmt.Errorf("a window of space %d: this client has %d: %w", space, len(ms.spaces), mem.ErrInvalid)
	}
	return ms.spaces[space].Window(bytes)
}

// release ends one use of e and unmaps it after the last.
func (ms *maps) release(e mem.Extent, a mem.Access) error {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	at := place{e.Space, e.Offset}
	m, ok := ms.live[at]
	if !ok {
		return nil // the client is closed
	}
	m.count(a, -1)
	if m.readers+m.writers > 0 {
		return ms.spaces[e.Space].Protect(e, m.access())
	}
	delete(ms.live, at)
	return ms.spaces[e.Space].Unmap(e)
}

// seal takes write access to e away from this process, or gives it back.
func (ms *maps) seal(e mem.Extent, sealed bool) error {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	m, ok := ms.live[place{e.Space, e.Offset}]
	if !ok {
		return fmt.Errorf("sealing %v, which is not mapped: %w", e, mem.ErrInvalid)
	}
	m.sealed = sealed
	return ms.spaces[e.Space].Protect(e, m.access())
}

func (ms *maps) close() error {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	var errs []error
	for _, s := range ms.spaces {
		errs = append(errs, s.Close())
	}
	clear(ms.live)
	return errors.Join(errs...)
}
