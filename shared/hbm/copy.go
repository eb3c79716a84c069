package hbm

import (
	"context"
	"errors"
	"fmt"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/mem/host"
)

// take makes objects of what was granted for use on an NPU, or gives it all up: what lies in the NPU's memory domain or
// in host memory is mapped, what lies in another domain is copied. With npu < 0 all is mapped where it is.
func (c *Client) take(ctx context.Context, grants []protocol.Grant, access mem.Access, npu int) ([]*Object, error) {
	var near, far []protocol.Grant
	for _, g := range grants {
		if c.far(g.Extent, npu) {
			far = append(far, g)
		} else {
			near = append(near, g)
		}
	}
	if len(far) == 0 {
		return c.mapAll(grants, access)
	}
	mapped, err := c.mapAll(near, access)
	if err != nil {
		return nil, errors.Join(err, c.giveUp(far))
	}
	copies, err := c.copyAll(ctx, far, access, npu)
	if err != nil {
		return nil, errors.Join(err, c.Free(context.WithoutCancel(ctx), mapped...))
	}
	objects := make([]*Object, len(grants))
	for i, g := range grants {
		from := &mapped
		if c.far(g.Extent, npu) {
			from = &copies
		}
		objects[i], *from = (*from)[0], (*from)[1:]
	}
	return objects, nil
}

// far reports whether NPU memory is of another memory domain than an NPU.
func (c *Client) far(e mem.Extent, npu int) bool {
	return npu >= 0 && npu < len(c.homes) && e.Space != hostSpace && e.Space != c.homes[npu]
}

// hostSpace is the space of host memory, which all NPUs read.
const hostSpace = 0

// Far reports whether the object lies in another memory domain than an NPU, which must copy what it computes with.
func (o *Object) Far(npu int) bool { return o.client.far(o.extent, npu) }

// Far reports whether memory of NPU from, of this node, lies in another memory domain than NPU to. Host memory does not.
func (c *Client) Far(from, to int) bool {
	return from >= 0 && from < len(c.homes) && to >= 0 && to < len(c.homes) && c.homes[from] != c.homes[to]
}

// Domain is the memory domain of an NPU of this node; -1 when the node has no such NPU.
func (c *Client) Domain(npu int) int {
	if npu < 0 || npu >= len(c.homes) {
		return -1
	}
	return c.homes[npu]
}

// Copier returns what copies mapped memory of NPUs, within a domain or between two, on the calling goroutine and beside whatever the
// NPUs compute: on a GPU it would have a stream of its own. Once ctx has ended it copies nothing, and its error is the cause.
func Copier(ctx context.Context) func(dst, src []float32) error {
	return func(dst, src []float32) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		copy(dst, src)
		return nil
	}
}

// Prefault readies objects that this client has just allocated to be written, so that whoever computes with them does not
// pay for it.
func Prefault(objects ...*Object) {
	for _, o := range objects {
		host.Prefault(o.Bytes())
	}
}

// Fetched reports whether this client has copied the object from another memory domain or node when it attached it.
func (o *Object) Fetched() bool { return o.source != nil }

// copyAll copies what was granted in other memory domains into new objects on npu, all or none, and gives the holds that
// came with it up. Nothing but the copies is ever mapped for writing.
func (c *Client) copyAll(ctx context.Context, grants []protocol.Grant, access mem.Access, npu int) (copies []*Object, err error) {
	sources, err := c.mapAll(grants, mem.ReadOnly)
	if err != nil {
		return nil, err
	}
	defer func() {
		if ferr := c.Free(context.WithoutCancel(ctx), sources...); ferr != nil {
			err = errors.Join(err, ferr)
		}
		if err != nil {
			err = errors.Join(err, c.Free(context.WithoutCancel(ctx), copies...))
			copies = nil
		}
	}()
	specs := make([]Spec, len(sources))
	for i, s := range sources {
		h := s.Handle()
		specs[i] = Spec{Kind: h.Kind, NPU: npu, Bytes: h.Bytes, Shape: h.Shape}
	}
	if copies, err = c.Alloc(ctx, specs...); err != nil {
		return nil, fmt.Errorf("copying %d objects to NPU %d: %w", len(sources), npu, err)
	}
	pairs := make([]protocol.Copy, len(sources))
	for i, s := range sources {
		from := s.Handle()
		crc, err := copyBytes(ctx, copies[i].Bytes(), s.Bytes(), from.Sealed, nil)
		if err == nil && from.Sealed && crc != from.CRC {
			err = fmt.Errorf("it has checksum %08x, its handle says %08x: %w", crc, from.CRC, mem.ErrCorrupt)
		}
		if err != nil {
			return copies, fmt.Errorf("copying %v %d of %d bytes to NPU %d: %w", from.Kind, from.Object, from.Bytes, npu, err)
		}
		copies[i].source = &from
		pairs[i] = protocol.Copy{Source: nameOf(from), Copy: nameOf(copies[i].Handle())}
	}
	var handles []mem.Handle
	if err := c.call(ctx, protocol.OpCopied, pairs, &handles); err != nil {
		return copies, err
	}
	if len(handles) != len(copies) {
		return copies, fmt.Errorf("the HMM took %d copies of %d: %w", len(handles), len(copies), mem.ErrInvalid)
	}
	for i, o := range copies {
		o.handle.Store(&handles[i])
		if handles[i].Sealed {
			err = errors.Join(err, c.maps.seal(o.extent, true))
		}
		if access == mem.ReadOnly {
			err = errors.Join(err, c.readOnly(o))
		}
	}
	return copies, err
}

// readOnly gives up the right to write to an object.
func (c *Client) readOnly(o *Object) error {
	if _, err := c.maps.acquire(o.extent, mem.ReadOnly); err != nil {
		return err
	}
	o.access = mem.ReadOnly
	return c.maps.release(o.extent, mem.ReadWrite)
}

const (
	copyReady = 1 << 20   // bytes that are readied for writing at a time: whoever maps anything in this process waits for that
	copyPiece = 256 << 10 // bytes that are copied at a time: still in the cache when their checksum is taken
)

// copyBytes copies from one mapping to another, fresh one, and returns the checksum of the copy if sum. It stops when ctx ends. With a
// pace it keeps to that, and dst has been readied for writing.
func copyBytes(ctx context.Context, dst, src []byte, sum bool, p *Pacer) (crc uint32, err error) {
	for at := 0; at < len(src); {
		if p == nil && at%copyReady == 0 {
			host.Prefault(dst[at:min(at+copyReady, len(src))])
		}
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		n := copy(dst[at:], src[at:min(at+copyPiece, len(src))])
		if sum {
			crc = mem.Extend(crc, dst[at:at+n])
		}
		at += n
		if err := p.wait(ctx, n); err != nil {
			return 0, err
		}
	}
	return crc, nil
}
