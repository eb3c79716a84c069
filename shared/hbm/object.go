package hbm

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"unsafe"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"
)

// Spec describes an object to allocate.
type Spec = protocol.Spec

// Object is memory that this client holds and has mapped. Client.Free ends both; so does Client.Close for all.
type Object struct {
	client *Client
	handle atomic.Pointer[mem.Handle]
	source *mem.Handle // what it was copied from, or nil
	extent mem.Extent
	access mem.Access
	bytes  []byte
	freed  atomic.Bool
}

// Handle is the object's name, to be sent to others. Seal changes it. Shape and Capability must not be modified.
func (o *Object) Handle() mem.Handle { return *o.handle.Load() }

// Extent is where the object lies; the same extent is the same memory in every process of the node.
func (o *Object) Extent() mem.Extent { return o.extent }

// Bytes is the content in mapped memory: Handle().Bytes long, owned by the object, invalid after Free. Writing to an
// object that was attached read-only, or was sealed, faults.
func (o *Object) Bytes() []byte {
	if o.freed.Load() {
		return nil
	}
	return o.bytes
}

// Floats is Bytes as float32 in the byte order of the machine; up to 3 odd bytes at the end are left out.
func (o *Object) Floats() []float32 {
	b := o.Bytes()
	return unsafe.Slice((*float32)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/4)
}

// Verify compares the content of a sealed object with its checksum: mem.ErrCorrupt when they differ, mem.ErrInvalid when
// the object is not sealed.
func (o *Object) Verify() error {
	h := o.Handle()
	b := o.Bytes()
	if !h.Sealed || b == nil {
		return fmt.Errorf("verifying %v %d, which is not sealed or freed: %w", h.Kind, h.Object, mem.ErrInvalid)
	}
	if crc := mem.Checksum(b); crc != h.CRC {
		return fmt.Errorf("%v %d of %d bytes has checksum %08x, its handle says %08x: %w", h.Kind, h.Object, h.Bytes, crc, h.CRC, mem.ErrCorrupt)
	}
	return nil
}

// Alloc makes objects, all or none: mapped read-write, zeroed, with a hold of this connection and the request hold that
// each Spec names. mem.ErrExhausted when an NPU has no room, mem.ErrEnded when a request is over.
func (c *Client) Alloc(ctx context.Context, specs ...Spec) ([]*Object, error) {
	return gather(c, specs, func(part []Spec) ([]*Object, error) {
		return c.grant(ctx, protocol.OpAlloc, part, mem.ReadWrite)
	})
}

// Attach maps objects by their handles, all or none, and holds them. With npu >= 0, NPU memory is booked to that NPU
// from now on: the hand-over; host memory stays what it is. mem.ErrGone when an object was freed, mem.ErrDenied when a
// capability is wrong, mem.ErrSealed when a sealed one is attached for writing, mem.ErrExhausted when npu has no room.
// The content of what is mapped is not checked: see Verify.
//
// An object of another memory domain than npu's is copied into a new one on npu, by the calling goroutine; with npu < 0 it
// is mapped where it is. An object of another node is pulled into a new one here, if the HMM knows that node; NPU memory
// needs npu >= 0. In both cases the Object's handle names the copy, and Source the other one; only this connection holds
// the copy until Keep; the content was compared with the checksum of what was sealed, and must not change meanwhile; the
// other one is as it was. mem.ErrGone when a node cannot be reached, mem.ErrCorrupt when what comes is not what was sealed.
func (c *Client) Attach(ctx context.Context, access mem.Access, npu int, handles ...mem.Handle) ([]*Object, error) {
	return gather(c, handles, func(part []mem.Handle) ([]*Object, error) {
		var grants []protocol.Grant
		a := protocol.Attach{Access: access, NPU: npu, Handles: part}
		if err := c.acquire(ctx, protocol.OpAttach, a, &grants, func() { _ = c.giveUp(grants) }); err != nil {
			return nil, err
		}
		objects, err := c.take(ctx, grants, access, npu)
		for i, o := range objects {
			if grants[i].Pulled {
				o.source = &part[i]
			}
		}
		return objects, err
	})
}

// Source is the handle of the object in another memory domain or on another node that this one was copied from; ok is
// false when it was not.
func (o *Object) Source() (h mem.Handle, ok bool) {
	if o.source == nil {
		return h, false
	}
	return *o.source, true
}

// gather calls get for batches of at most protocol.MaxBatch; when one fails, what the others got is freed.
func gather[T any](c *Client, all []T, get func([]T) ([]*Object, error)) ([]*Object, error) {
	objects := make([]*Object, 0, len(all))
	for part := range slices.Chunk(all, protocol.MaxBatch) {
		got, err := get(part)
		if err != nil {
			return nil, errors.Join(err, c.Free(context.Background(), objects...))
		}
		objects = append(objects, got...)
	}
	return objects, nil
}

// grant asks for objects and maps them.
func (c *Client) grant(ctx context.Context, op protocol.Op, body any, access mem.Access) ([]*Object, error) {
	var grants []protocol.Grant
	if err := c.acquire(ctx, op, body, &grants, func() { _ = c.giveUp(grants) }); err != nil {
		return nil, err
	}
	return c.mapAll(grants, access)
}

// giveUp drops the holds that came with grants.
func (c *Client) giveUp(grants []protocol.Grant) error {
	names := make([]protocol.Object, len(grants))
	for i, g := range grants {
		names[i] = nameOf(g.Handle)
	}
	return c.call(context.Background(), protocol.OpFree, names, nil)
}

// mapAll maps what was granted, or gives it all up.
func (c *Client) mapAll(grants []protocol.Grant, access mem.Access) ([]*Object, error) {
	objects := make([]*Object, len(grants))
	for i, g := range grants {
		b, err := c.maps.acquire(g.Extent, access)
		if err == nil && int64(len(b)) < g.Handle.Bytes {
			err = fmt.Errorf("%v holds no %d bytes: %w", g.Extent, g.Handle.Bytes, mem.ErrInvalid)
		}
		if err != nil {
			for _, o := range objects[:i] {
				err = errors.Join(err, c.maps.release(o.extent, access))
			}
			if c.table.Load() == nil {
				return nil, c.lostError()
			}
			return nil, errors.Join(err, c.giveUp(grants))
		}
		o := &Object{client: c, extent: g.Extent, access: access, bytes: b[:g.Handle.Bytes:g.Handle.Bytes]}
		o.handle.Store(&g.Handle)
		objects[i] = o
	}
	return objects, nil
}

func nameOf(h mem.Handle) protocol.Object {
	return protocol.Object{ID: h.Object, Generation: h.Generation}
}

// check refuses objects that are freed or another client's.
func (c *Client) check(objects []*Object) error {
	for _, o := range objects {
		if o == nil || o.client != c || o.freed.Load() {
			return fmt.Errorf("object is nil, freed or of another client: %w", mem.ErrInvalid)
		}
	}
	return nil
}

// Seal computes the checksums of the objects' content, makes it final and adds the request hold ref; this connection's
// own hold stays until Free. This process loses write access; others that have an object mapped for writing must not
// write any more. It returns the handles to send, which carry the checksums. mem.ErrEnded when the request is over: the
// objects are then as they were.
func (c *Client) Seal(ctx context.Context, ref Ref, objects ...*Object) ([]mem.Handle, error) {
	if err := c.check(objects); err != nil {
		return nil, fmt.Errorf("sealing: %w", err)
	}
	handles := make([]mem.Handle, 0, len(objects))
	for part := range slices.Chunk(objects, protocol.MaxBatch) {
		got, err := c.seal(ctx, ref, part)
		if err != nil {
			return nil, err
		}
		handles = append(handles, got...)
	}
	return handles, nil
}

func (c *Client) seal(ctx context.Context, ref Ref, objects []*Object) (handles []mem.Handle, err error) {
	var sealed []*Object
	defer func() {
		if err != nil {
			for _, o := range sealed {
				err = errors.Join(err, c.maps.seal(o.extent, false))
			}
		}
	}()
	items := make([]protocol.Sealing, len(objects))
	for i, o := range objects {
		if o.Handle().Sealed {
			return nil, fmt.Errorf("sealing object %d: %w", o.Handle().Object, mem.ErrSealed)
		}
		if err := c.maps.seal(o.extent, true); err != nil {
			return nil, err
		}
		sealed = append(sealed, o)
		items[i] = protocol.Sealing{Object: nameOf(o.Handle()), CRC: mem.Checksum(o.bytes)}
	}
	if err := c.call(ctx, protocol.OpSeal, protocol.Seal{Ref: ref, Items: items}, &handles); err != nil {
		return nil, err
	}
	if len(handles) != len(objects) {
		return nil, fmt.Errorf("the HMM sealed %d objects of %d: %w", len(handles), len(objects), mem.ErrInvalid)
	}
	for i, o := range objects {
		o.handle.Store(&handles[i])
	}
	return handles, nil
}

// Keep adds the request hold ref to objects without sealing them. With no objects it tells the HMM of the attempt, which
// drops what older attempts hold. mem.ErrEnded when the request is over.
func (c *Client) Keep(ctx context.Context, ref Ref, objects ...*Object) error {
	if err := c.check(objects); err != nil {
		return fmt.Errorf("keeping: %w", err)
	}
	if len(objects) == 0 {
		return c.call(ctx, protocol.OpKeep, protocol.Keep{Ref: ref}, nil)
	}
	for part := range slices.Chunk(objects, protocol.MaxBatch) {
		if err := c.call(ctx, protocol.OpKeep, protocol.Keep{Ref: ref, Objects: names(part)}, nil); err != nil {
			return err
		}
	}
	return nil
}

// Free unmaps objects and drops this connection's holds; the memory lives on while another hold does. Objects that are
// nil or freed already are passed over. The holds are dropped even when ctx ends before the HMM has answered.
func (c *Client) Free(ctx context.Context, objects ...*Object) error {
	var errs []error
	var freed []*Object
	for _, o := range objects {
		if o == nil || !o.freed.CompareAndSwap(false, true) {
			continue
		}
		if o.client != c {
			panic("BUG: Free of another client's object")
		}
		if err := c.maps.release(o.extent, o.access); err != nil {
			errs = append(errs, err)
			continue // it may still be mapped: the hold has to stay
		}
		freed = append(freed, o)
	}
	for part := range slices.Chunk(freed, protocol.MaxBatch) {
		errs = append(errs, c.call(ctx, protocol.OpFree, names(part), nil))
	}
	return errors.Join(errs...)
}

func names(objects []*Object) []protocol.Object {
	n := make([]protocol.Object, len(objects))
	for i, o := range objects {
		n[i] = nameOf(o.Handle())
	}
	return n
}
