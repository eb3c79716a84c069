package hbm

import (
	"context"
	"fmt"
	"slices"
	"time"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"
)

// Key is a SHA-256 that names the content of an MM object or of a KV block.
type Key = protocol.Key

// Block says where a KV block lies: Slab counts in the slabs beside it.
type Block = protocol.Block

// Ticket is the right to make the MM object of a key for the cache, as long as the claim is held under which it was
// given. It ends with PublishMM or AbandonMM.
type Ticket struct {
	key    Key
	number uint64
}

// FindMM looks for the MM object of a key in the node's cache. It returns the object's handle, which then has the
// request hold ref, or a ticket to make it, or, with neither, that the caller makes it for itself: there is no cache,
// or another one who makes it took longer than wait. mem.ErrEnded when the request is over, mem.ErrFenced when the claim
// is not held any more.
func (c *Client) FindMM(ctx context.Context, key Key, ref Ref, claim *Claim, wait time.Duration) (*mem.Handle, *Ticket, error) {
	var found protocol.FoundMM
	undo := func() {
		_ = c.AbandonMM(context.Background(), &Ticket{key, found.Ticket}) // a handle's hold ends with the request
	}
	err := c.acquire(ctx, protocol.OpFindMM, protocol.FindMM{
		Key: key, Ref: ref, Part: claim.part, Generation: claim.generation, Wait: wait,
	}, &found, undo)
	switch {
	case err != nil:
		return nil, nil, err
	case found.Handle != nil:
		return found.Handle, nil, nil
	case found.Ticket != 0:
		return nil, &Ticket{key, found.Ticket}, nil
	}
	return nil, nil, nil
}

// PublishMM gives a sealed object to the cache under the ticket's key. mem.ErrFenced when the ticket is good no more:
// the object is then as it was.
func (c *Client) PublishMM(ctx context.Context, t *Ticket, o *Object) error {
	if err := c.check([]*Object{o}); err != nil {
		return fmt.Errorf("publishing: %w", err)
	}
	return c.call(ctx, protocol.OpPublishMM, protocol.PublishMM{Key: t.key, Ticket: t.number, Object: nameOf(o.Handle())}, nil)
}

// AbandonMM gives a ticket back: whoever waits for the object makes it. One that is good no more is no error.
func (c *Client) AbandonMM(ctx context.Context, t *Ticket) error {
	return c.call(ctx, protocol.OpAbandonMM, protocol.AbandonMM{Key: t.key, Ticket: t.number}, nil)
}

// FindPrefix maps, read-only, the slabs that hold the cached KV blocks of the first of these keys, up to one that is
// not there, in the memory domain of an NPU and, where that has no more of them, in other domains of the node: slabs of
// these (Far) are mapped where they are. The slabs are in order of their first block; the caller frees them. The blocks' content is not checked. At most the first protocol.MaxBlocks keys are looked at.
func (c *Client) FindPrefix(ctx context.Context, npu int, keys []Key) ([]*Object, []Block, error) {
	var p protocol.Prefix
	keys = keys[:min(len(keys), protocol.MaxBlocks)]
	err := c.acquire(ctx, protocol.OpFindPrefix, protocol.FindPrefix{NPU: npu, Hashes: protocol.PackKeys(keys)}, &p,
		func() { _ = c.giveUp(p.Slabs) })
	if err != nil {
		return nil, nil, err
	}
	slabs, err := c.mapAll(p.Slabs, mem.ReadOnly)
	if err != nil {
		return nil, nil, err
	}
	blocks, err := protocol.UnpackBlocks(p.Blocks)
	if err == nil && (len(blocks) > len(keys) || slices.ContainsFunc(blocks, func(b Block) bool { return b.Slab >= len(slabs) })) {
		err = fmt.Errorf("the HMM found %d blocks in %d slabs for %d keys: %w", len(blocks), len(slabs), len(keys), mem.ErrInvalid)
	}
	if err != nil {
		_ = c.Free(context.WithoutCancel(ctx), slabs...)
		return nil, nil, err
	}
	return slabs, blocks, nil
}

// CountPrefix returns how many blocks FindPrefix would find, and holds none of them: it may be less a moment later.
func (c *Client) CountPrefix(ctx context.Context, npu int, keys []Key) (n int, err error) {
	keys = keys[:min(len(keys), protocol.MaxBlocks)]
	err = c.call(ctx, protocol.OpCountPrefix, protocol.FindPrefix{NPU: npu, Hashes: protocol.PackKeys(keys)}, &n)
	return n, err
}

// CacheBlocks enters full KV blocks, which nobody writes any more, into the prefix index: blocks[i] of slabs, which this
// client holds, under keys[i]. Those whose key is there already are passed over.
func (c *Client) CacheBlocks(ctx context.Context, slabs []*Object, blocks []Block, keys []Key) error {
	if err := c.check(slabs); err != nil {
		return fmt.Errorf("caching blocks: %w", err)
	}
	if len(blocks) != len(keys) {
		panic(fmt.Sprintf("BUG: %d blocks with %d keys", len(blocks), len(keys)))
	}
	for len(blocks) > 0 {
		// As many as one request takes, with the slabs that they are in.
		number := map[int]int{}
		var names []protocol.Object
		n := 0
		var part []Block
		for ; n < len(blocks) && n < protocol.MaxBlocks; n++ {
			b := blocks[n]
			at, ok := number[b.Slab]
			if !ok {
				if len(names) == protocol.MaxBatch {
					break
				}
				at = len(names)
				number[b.Slab] = at
				names = append(names, nameOf(slabs[b.Slab].Handle()))
			}
			part = append(part, Block{Slab: at, Block: b.Block, CRC: b.CRC})
		}
		err := c.call(ctx, protocol.OpCacheBlocks, protocol.CacheBlocks{
			Slabs: names, Hashes: protocol.PackKeys(keys[:n]), Blocks: protocol.PackBlocks(part),
		}, nil)
		if err != nil {
			return err
		}
		blocks, keys = blocks[n:], keys[n:]
	}
	return nil
}

// Forget takes objects out of the caches: their content was found to be wrong. Their holds stay.
func (c *Client) Forget(ctx context.Context, objects ...*Object) error {
	if err := c.check(objects); err != nil {
		return fmt.Errorf("forgetting: %w", err)
	}
	for part := range slices.Chunk(objects, protocol.MaxBatch) {
		if err := c.call(ctx, protocol.OpForget, names(part), nil); err != nil {
			return err
		}
	}
	return nil
}
