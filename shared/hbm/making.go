package hbm

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/mem/host"
)

// making is a weight that this client makes.
type making struct {
	place int // in the set
	to    protocol.Grant
	from  *protocol.Grant // of another memory domain, to be copied; nil: none

	content []byte // mapped for writing; nil: not yet
	source  []byte // the same of from, for reading
	done    bool   // it is final and the set's
}

// abandon gives up what is not final, and what is held of a source.
func (m *making) abandon(c *Client) error {
	err := m.leaveSource(c)
	if m.content != nil {
		err = errors.Join(err, c.maps.release(m.to.Extent, mem.ReadWrite))
		m.content = nil
	}
	return errors.Join(err, c.giveUp([]protocol.Grant{m.to}))
}

func (m *making) leaveSource(c *Client) error {
	if m.from == nil {
		return nil
	}
	var err error
	if m.source != nil {
		err = c.maps.release(m.from.Extent, mem.ReadOnly)
	}
	err = errors.Join(err, c.giveUp([]protocol.Grant{*m.from}))
	m.from, m.source = nil, nil
	return err
}

// make writes the content of objects and makes them final: first those that are copied, then the others. What is done is the set's.
func (w *Weights) make(ctx context.Context, all []*making, fill Filler) error {
	for _, m := range all {
		b, err := w.client.maps.acquire(m.to.Extent, mem.ReadWrite)
		if err != nil {
			return err
		}
		m.content = b[:m.to.Handle.Bytes:m.to.Handle.Bytes]
	}
	if w.set.Instead == nil {
		if err := w.copy(ctx, all); err != nil {
			return err
		}
		return w.fill(ctx, all, fill)
	}
	var far []*making
	for _, m := range all {
		if m.from != nil {
			far = append(far, m)
			if err := m.leaveSource(w.client); err != nil {
				return err
			}
		}
	}
	if err := w.fill(ctx, far, w.set.Instead); err != nil {
		return err
	}
	return w.fill(ctx, all, fill)
}

// fill has those filled that are not done, and makes them final.
func (w *Weights) fill(ctx context.Context, all []*making, fill Filler) error {
	var rest []*making
	var numbers []int
	var objects [][]byte
	for _, m := range all {
		if !m.done {
			rest = append(rest, m)
			numbers, objects = append(numbers, w.set.Numbers[m.place]), append(objects, m.content)
		}
	}
	if len(rest) == 0 {
		return nil
	}
	if err := fill(ctx, numbers, objects); err != nil {
		return err
	}
	items := make([]protocol.Sealing, len(rest))
	for i, crc := range checksums(objects) {
		rest[i].to.Handle.CRC = crc
		items[i] = protocol.Sealing{Object: nameOf(rest[i].to.Handle), CRC: crc}
	}
	if err := w.client.call(ctx, protocol.OpSealWeights, items, nil); err != nil {
		return err
	}
	for _, m := range rest {
		m.to.Handle.Sealed = true
		w.Filled, w.FilledBytes = w.Filled+1, w.FilledBytes+m.to.Handle.Bytes
	}
	return w.made(rest)
}

// copy copies those that another memory domain has and makes them final.
func (w *Weights) copy(ctx context.Context, all []*making) error {
	var some []*making
	for _, m := range all {
		if m.from != nil {
			b, err := w.client.maps.acquire(m.from.Extent, mem.ReadOnly)
			if err != nil {
				return err
			}
			m.source = b[:m.from.Handle.Bytes:m.from.Handle.Bytes]
			some = append(some, m)
		}
	}
	if len(some) == 0 {
		return nil
	}
	began := time.Now()
	defer func() { w.Copying += time.Since(began) }()
	var mu sync.Mutex
	sofar := w.done
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	var ready []chan struct{}
	if w.set.Pace != nil {
		g.SetLimit(w.set.Pace.copiers())
		var readied func()
		ready, readied = readyAhead(gctx, some)
		defer readied()
	}
	wrong := make([]bool, len(some))
	for i, m := range some {
		g.Go(func() error {
			if ready != nil {
				select {
				case <-ready[i]:
				case <-gctx.Done():
					return context.Cause(gctx)
				}
			}
			crc, err := copyBytes(gctx, m.content, m.source, true, w.set.Pace)
			if err != nil {
				return fmt.Errorf("copying weight %d of %d bytes: %w", w.set.Numbers[m.place], len(m.content), err)
			}
			wrong[i] = crc != m.from.Handle.CRC
			mu.Lock()
			defer mu.Unlock()
			sofar += int64(len(m.content))
			w.told(sofar, w.Bytes)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	var bad []protocol.Grant
	var good []*making
	var pairs []protocol.Copy
	for i, m := range some {
		if wrong[i] { // it is read from the files, here and by whoever wants it there
			bad = append(bad, *m.from)
			m.from, m.source = nil, nil
			continue
		}
		good = append(good, m)
		pairs = append(pairs, protocol.Copy{Source: nameOf(m.from.Handle), Copy: nameOf(m.to.Handle)})
	}
	if err := w.client.disown(bad); err != nil {
		return err
	}
	if len(good) == 0 {
		return nil
	}
	var handles []mem.Handle
	if err := w.client.call(ctx, protocol.OpCopied, pairs, &handles); err != nil {
		return err
	}
	if len(handles) != len(good) {
		return fmt.Errorf("the HMM took %d copies of %d: %w", len(handles), len(good), mem.ErrInvalid)
	}
	for i, m := range good {
		m.to.Handle = handles[i]
		w.Copied, w.CopiedBytes = w.Copied+1, w.CopiedBytes+m.to.Handle.Bytes
	}
	return w.made(good)
}

// readyAhead readies the memory that copies at a rate write, in their order and ahead of them: a machine may take longer to find the pages
// than the rate leaves for the copy. ready[i] is closed when that of copy i is; wait returns when nobody readies any more, soon after ctx
// has ended.
func readyAhead(ctx context.Context, all []*making) (ready []chan struct{}, wait func()) {
	ready = make([]chan struct{}, len(all))
	for i := range ready {
		ready[i] = make(chan struct{})
	}
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(len(all), beside()) {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= len(all) {
					return
				}
				for piece := range slices.Chunk(all[i].content, copyReady) {
					if ctx.Err() != nil {
						return
					}
					host.Prefault(piece)
				}
				close(ready[i])
			}
		})
	}
	return ready, wg.Wait
}

// made maps objects that have just become final for reading only, and lets their sources go.
func (w *Weights) made(all []*making) error {
	var errs []error
	for _, m := range all {
		content, err := w.client.maps.acquire(m.to.Extent, mem.ReadOnly)
		if err != nil {
			return errors.Join(append(errs, err)...)
		}
		errs = append(errs, w.client.maps.release(m.to.Extent, mem.ReadWrite))
		w.keep(m.place, content[:m.to.Handle.Bytes:m.to.Handle.Bytes], m.to.Handle, m.to.Extent)
		w.written[m.place], m.done = true, true
	}
	var sources []protocol.Grant
	for _, m := range all {
		if m.from != nil {
			errs = append(errs, w.client.maps.release(m.from.Extent, mem.ReadOnly))
			sources = append(sources, *m.from)
			m.from, m.source = nil, nil
		}
	}
	for batch := range slices.Chunk(sources, protocol.MaxBatch) {
		errs = append(errs, w.client.giveUp(batch))
	}
	return errors.Join(errs...)
}
