package gateway

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"trireme.dev/shared/mem"
)

// Memory is what the gateway needs of its node's HMM. Calls fail with mem.ErrLost once Lost is closed.
type Memory interface {
	// Put stores blobs as sealed objects in host memory, all or none, under the request hold; nothing of them stays
	// mapped here.
	Put(ctx context.Context, hold Hold, blobs []Blob) ([]mem.Handle, error)
	// Supersede drops what older attempts at hold's request hold.
	Supersede(ctx context.Context, hold Hold) error
	// End says that a request needs nothing any more.
	End(ctx context.Context, request string) error
	// Capacity is the memory of the node's NPUs.
	Capacity(ctx context.Context) ([]NPUCapacity, error)
	// Node is the name of the node.
	Node() string
	// Lost is closed when the connection ends.
	Lost() <-chan struct{}
	// Close ends the connection.
	Close() error
}

// Hold names a request hold: the memory lives until the request ends, or Left has passed and a margin.
type Hold struct {
	Request string
	Attempt int
	Left    time.Duration // to the request's deadline
}

// NPUCapacity is how many bytes of one NPU can hold KV and MM objects: all but the weights'.
type NPUCapacity struct {
	Instance string // whom the NPU is granted to, "" for a spare one
	Bytes    int64
}

// Blob is content to store. Data is only read.
type Blob struct {
	Kind mem.Kind
	Data []byte
}

// Dialer connects to the HMM, trying until ctx ends.
type Dialer func(ctx context.Context) (Memory, error)

// memoryLink keeps a connection to the HMM: it connects again when one is lost.
type memoryLink struct {
	dial Dialer
	log  *slog.Logger

	mu      sync.Mutex
	current Memory        // nil while there is none
	changed chan struct{} // closed and replaced when current changes
}

func newMemoryLink(dial Dialer, log *slog.Logger) *memoryLink {
	return &memoryLink{dial: dial, log: log, changed: make(chan struct{})}
}

// run connects until ctx ends. each is called for every connection and may talk to it; it is called again every
// interval, and when there is a value in again.
func (l *memoryLink) run(ctx context.Context, interval time.Duration, again <-chan struct{}, each func(context.Context, Memory)) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		m, err := l.dial(ctx)
		if ctx.Err() != nil {
			if m != nil {
				_ = m.Close()
			}
			return
		}
		if err != nil {
			l.log.Warn("connecting to the HMM", "error", err)
			select {
			case <-time.After(200 * time.Millisecond):
				continue
			case <-ctx.Done():
				return
			}
		}
		each(ctx, m)
		l.set(m)
		for lost := false; !lost; {
			select {
			case <-tick.C:
				each(ctx, m)
			case <-again:
				each(ctx, m)
			case <-m.Lost():
				l.log.Warn("the HMM is lost")
				lost = true
			case <-ctx.Done():
				lost = true
			}
		}
		l.set(nil)
		if err := m.Close(); err != nil {
			l.log.Debug("closing the connection to the HMM", "error", err)
		}
	}
}

func (l *memoryLink) set(m Memory) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.current = m
	close(l.changed)
	l.changed = make(chan struct{})
}

// get returns the connection, waiting for one until ctx ends.
func (l *memoryLink) get(ctx context.Context) (Memory, error) {
	for {
		l.mu.Lock()
		m, changed := l.current, l.changed
		l.mu.Unlock()
		if m != nil {
			select {
			case <-m.Lost(): // run has not seen it yet
			default:
				return m, nil
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for the HMM: %w", ctx.Err())
		}
	}
}

// up reports whether there is a connection.
func (l *memoryLink) up() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.current == nil {
		return false
	}
	select {
	case <-l.current.Lost():
		return false
	default:
		return true
	}
}
