package ledger

import (
	"fmt"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"
)

// blockKey names the content of a KV block within a memory domain.
type blockKey struct {
	space int
	hash  protocol.Key
}

// blockAt is where a cached KV block lies.
type blockAt struct {
	slab  *object
	block int
	crc   uint32
}

// maxSlabBlocks bounds the number of a block in its slab; shared/kv has 16 in one.
const maxSlabBlocks = 256

// CacheBlocks enters full KV blocks of slabs that the client holds into the prefix index of their domain, all or none.
// Blocks whose hash is there already are passed over: the first copy stays, unless it lies in a slab that has fewer
// cached blocks than this one has named. So a run of blocks ends up in one slab, which can be shared as a whole, however
// many sequences have begun with parts of it.
func (l *Ledger) CacheBlocks(id Conn, v protocol.CacheBlocks) error {
	slabs := make([]*object, len(v.Slabs))
	for i, name := range v.Slabs {
		o, err := l.held(id, name)
		if err == nil && o.handle.Kind != mem.KindKV {
			err = fmt.Errorf("it is %v: %w", o.handle.Kind, mem.ErrInvalid)
		}
		if err != nil {
			return fmt.Errorf("caching blocks of object %d: %w", name.ID, err)
		}
		slabs[i] = o
	}
	hashes, err := protocol.UnpackKeys(v.Hashes)
	if err != nil {
		return err
	}
	blocks, err := protocol.UnpackBlocks(v.Blocks)
	if err != nil {
		return err
	}
	if len(hashes) != len(blocks) {
		return fmt.Errorf("%d hashes for %d blocks: %w", len(hashes), len(blocks), mem.ErrInvalid)
	}
	for i, b := range blocks {
		if b.Slab < 0 || b.Slab >= len(slabs) || b.Block < 0 || b.Block >= maxSlabBlocks {
			return fmt.Errorf("caching block %d of slab %d of %d: %w", b.Block, b.Slab, len(slabs), mem.ErrInvalid)
		}
		if old, ok := slabs[b.Slab].blocks[b.Block]; ok && old != hashes[i] {
			return fmt.Errorf("block %d of object %d has another hash already: %w", b.Block, v.Slabs[b.Slab].ID, mem.ErrInvalid)
		}
	}
	if l.cfg.KVCache == 0 {
		return nil
	}
	named := map[*object]map[int]bool{} // blocks of each slab, now and before
	for _, b := range blocks {
		o := slabs[b.Slab]
		if named[o] == nil {
			named[o] = map[int]bool{}
			for n := range o.blocks {
				named[o][n] = true
			}
		}
		named[o][b.Block] = true
	}
	for i, b := range blocks {
		o := slabs[b.Slab]
		if _, ok := o.blocks[b.Block]; ok { // there already, or named twice in one call, with two hashes: the first counts
			continue
		}
		key := blockKey{o.extent.Space, hashes[i]}
		if at, ok := l.prefix[key]; ok {
			if at.slab == o || len(at.slab.blocks) >= len(named[o]) {
				continue
			}
			l.unname(at)
		}
		if o.blocks == nil {
			o.blocks = map[int]protocol.Key{}
		}
		o.blocks[b.Block] = hashes[i]
		l.prefix[key] = blockAt{o, b.Block, b.CRC}
	}
	return nil
}

// unname takes one block's cache reference, whose hash another block gets.
func (l *Ledger) unname(at blockAt) {
	o := at.slab
	delete(o.blocks, at.block)
	if !o.inUse() && !o.cached() {
		l.wake(o)
		l.free(o)
	}
}

// FindPrefix returns the cached blocks of the first hashes, up to one that is not there: those in the memory domain of an
// NPU, and for what is not there, those in other domains, as copying is cheaper than computing. Each slab that holds some
// of them, in order of their first, gets a connection hold and stays booked where it is.
func (l *Ledger) FindPrefix(id Conn, f protocol.FindPrefix) (protocol.Prefix, error) {
	c, err := l.stage(id)
	if err != nil {
		return protocol.Prefix{}, fmt.Errorf("looking for a prefix: %w", err)
	}
	b, err := l.budget(f.NPU)
	if err != nil {
		return protocol.Prefix{}, fmt.Errorf("looking for a prefix: %w", err)
	}
	hashes, err := protocol.UnpackKeys(f.Hashes)
	if err != nil {
		return protocol.Prefix{}, fmt.Errorf("looking for a prefix: %w", err)
	}
	var p protocol.Prefix
	var blocks []protocol.Block
	number := map[*object]int{}
	last := b.space
	for _, hash := range hashes {
		at, ok := l.block(hash, b.space, last)
		if !ok {
			break
		}
		last = at.slab.extent.Space
		n, ok := number[at.slab]
		if !ok {
			if len(p.Slabs) == protocol.MaxBatch {
				break
			}
			n = len(p.Slabs)
			number[at.slab] = n
			p.Slabs = append(p.Slabs, protocol.Grant{Handle: at.slab.handle, Extent: at.slab.extent})
		}
		blocks = append(blocks, protocol.Block{Slab: n, Block: at.block, CRC: at.crc})
	}
	for o := range number {
		l.wake(o)
		l.hold(c, o)
	}
	l.mark(c)
	p.Blocks = protocol.PackBlocks(blocks)
	return p, nil
}

// CountPrefix returns how many blocks FindPrefix would find. Nothing is held for that, so it may be less a moment later.
func (l *Ledger) CountPrefix(id Conn, f protocol.FindPrefix) (int, error) {
	if _, err := l.stage(id); err != nil {
		return 0, fmt.Errorf("looking for a prefix: %w", err)
	}
	b, err := l.budget(f.NPU)
	if err != nil {
		return 0, fmt.Errorf("looking for a prefix: %w", err)
	}
	hashes, err := protocol.UnpackKeys(f.Hashes)
	if err != nil {
		return 0, fmt.Errorf("looking for a prefix: %w", err)
	}
	for n, hash := range hashes {
		if _, ok := l.block(hash, b.space, b.space); !ok {
			return n, nil
		}
	}
	return len(hashes), nil
}

// block finds a cached block: in the space home if it is there, else in the space last, else anywhere.
func (l *Ledger) block(hash protocol.Key, home, last int) (at blockAt, ok bool) {
	for i := range len(l.spaces) + 1 {
		space := i - 1 // the spaces in order, host memory has no blocks
		switch i {
		case 0:
			space = home
		case 1:
			space = last
		}
		if at, ok = l.prefix[blockKey{space, hash}]; ok {
			return at, true
		}
	}
	return at, false
}
