package gateway_test

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"time"

	"trireme.dev/services/gateway"
	"trireme.dev/shared/mem"
)

// memory stands for the HMM: objects by handle, holds, and connections that can be lost.
type memory struct {
	mu       sync.Mutex
	next     uint64
	objects  map[uint64]object
	ended    map[string]bool
	newest   map[string]int // attempt told by Supersede
	conns    map[*memoryConn]bool
	capacity int64
	full     bool // Put finds no room
	down     bool // nobody can connect
}

type object struct {
	blob gateway.Blob
	hold gateway.Hold
}

func newMemory() *memory {
	return &memory{objects: map[uint64]object{}, ended: map[string]bool{}, newest: map[string]int{}, conns: map[*memoryConn]bool{}, capacity: 1 << 30}
}

func (m *memory) dial(ctx context.Context) (gateway.Memory, error) {
	for {
		m.mu.Lock()
		if !m.down {
			c := &memoryConn{memory: m, lost: make(chan struct{})}
			m.conns[c] = true
			m.mu.Unlock()
			return c, nil
		}
		m.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
}

// lose ends every connection and forgets every object, as the death of an HMM does.
func (m *memory) lose() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for c := range m.conns {
		c.end()
		delete(m.conns, c)
	}
	clear(m.objects)
}

func (m *memory) set(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f()
}

// get reads an object as a stage that attaches it.
func (m *memory) get(h mem.Handle) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	o, ok := m.objects[h.Object]
	if !ok {
		return nil, mem.ErrGone
	}
	if mem.Checksum(o.blob.Data) != h.CRC || !h.Sealed {
		return nil, mem.ErrCorrupt
	}
	return o.blob.Data, nil
}

type memoryConn struct {
	memory *memory
	lost   chan struct{}
	once   sync.Once
}

func (c *memoryConn) end() { c.once.Do(func() { close(c.lost) }) }

func (c *memoryConn) check() error {
	select {
	case <-c.lost:
		return mem.ErrLost
	default:
		return nil
	}
}

func (c *memoryConn) Put(_ context.Context, hold gateway.Hold, blobs []gateway.Blob) ([]mem.Handle, error) {
	m := c.memory
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := c.check(); err != nil {
		return nil, err
	}
	if m.full {
		return nil, fmt.Errorf("no room: %w", mem.ErrExhausted)
	}
	if m.ended[hold.Request] {
		return nil, mem.ErrEnded
	}
	var out []mem.Handle
	for _, b := range blobs {
		m.next++
		m.objects[m.next] = object{blob: gateway.Blob{Kind: b.Kind, Data: bytes.Clone(b.Data)}, hold: hold}
		out = append(out, mem.Handle{Node: "node", Object: m.next, Generation: 1, Kind: b.Kind, NPU: mem.HostNPU,
			Bytes: int64(len(b.Data)), Sealed: true, CRC: mem.Checksum(b.Data), Capability: make([]byte, 16)})
	}
	return out, nil
}

func (c *memoryConn) Supersede(_ context.Context, hold gateway.Hold) error {
	c.memory.mu.Lock()
	defer c.memory.mu.Unlock()
	if err := c.check(); err != nil {
		return err
	}
	c.memory.newest[hold.Request] = hold.Attempt
	for id, o := range c.memory.objects {
		if o.hold.Request == hold.Request && o.hold.Attempt < hold.Attempt {
			delete(c.memory.objects, id)
		}
	}
	return nil
}

func (c *memoryConn) End(_ context.Context, request string) error {
	c.memory.mu.Lock()
	defer c.memory.mu.Unlock()
	if err := c.check(); err != nil {
		return err
	}
	c.memory.ended[request] = true
	for id, o := range c.memory.objects {
		if o.hold.Request == request {
			delete(c.memory.objects, id)
		}
	}
	return nil
}

func (c *memoryConn) Capacity(context.Context) ([]gateway.NPUCapacity, error) {
	c.memory.mu.Lock()
	defer c.memory.mu.Unlock()
	return []gateway.NPUCapacity{{Instance: "stages", Bytes: c.memory.capacity}}, c.check()
}

func (c *memoryConn) Node() string          { return "node" }
func (c *memoryConn) Lost() <-chan struct{} { return c.lost }
func (c *memoryConn) Close() error          { c.end(); return nil }
