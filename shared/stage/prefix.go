package stage

import (
	"context"
	"errors"
	"fmt"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/kv"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/wire"
)

// BlockKeys names the full KV blocks of a sequence that begins with the spec's prompt; tokens is prompt and answer. The
// same blocks have the same keys in every stage and request.
func (s *Stage) BlockKeys(spec *wire.Spec, tokens []int32) []hbm.Key {
	pictures := make([]kv.Picture, len(spec.Pictures))
	for i, p := range spec.Pictures {
		pictures[i] = kv.Picture{Start: p.Offset, Tokens: s.Tokens(p.Grid), Grid: p.Grid, Content: p.Content}
	}
	o := kv.Origin{Model: s.Model.Digest, Processor: s.processor, Kernels: s.Kernels(), Salt: spec.Salt}
	return kv.Hashes(o, tokens, pictures)
}

// CacheBlocks enters the sealed blocks of a sequence from number from on into the node's prefix index. keys names its
// blocks from the first one on; its slabs are objects that this process holds. That it fails costs only the cache.
func (s *Stage) CacheBlocks(ctx context.Context, seq *kv.Sequence, keys []hbm.Key, from int) {
	var slabs []*hbm.Object
	for _, slab := range seq.SlabList() {
		slabs = append(slabs, slab.(*hbm.Object))
	}
	var blocks []hbm.Block
	end := from
	for ; end < min(seq.Log.BlockCount(), len(keys)); end++ {
		b, err := seq.Log.Block(end)
		if err != nil || !b.Sealed || b.Slab >= len(slabs) {
			break
		}
		blocks = append(blocks, hbm.Block{Slab: b.Slab, Block: b.Block, CRC: b.CRC})
	}
	if len(blocks) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTimeout)
	defer cancel()
	if err := s.HBM.CacheBlocks(ctx, slabs, blocks, keys[from:end]); err != nil && !errors.Is(err, mem.ErrLost) {
		s.Log.Warn("caching KV blocks", "error", err)
	}
}

// Prefix is the cached beginning of a prompt. The caller frees Slabs.
type Prefix struct {
	Slabs  []*hbm.Object // in order of their first block, mapped for reading; perhaps of other memory domains
	Blocks []kv.BlockRef // by number in the sequence
	Shared int           // the first of Blocks, which may be shared (see kv.Whole); the others are to be copied
}

// Known looks for the first blocks of a prompt in the index of an NPU's memory domain, those that can be shared as whole
// slabs.
func (s *Stage) Known(ctx context.Context, npu int, spec *wire.Spec, keys []hbm.Key) (Prefix, error) {
	p, err := s.Prefix(ctx, npu, spec, keys)
	if err != nil {
		return Prefix{}, fmt.Errorf("looking for the prompt in the cache: %w", err)
	}
	whole := p.Shared / kv.SlabBlocks
	s.Free(ctx, p.Slabs[whole:]...)
	p.Slabs, p.Blocks = p.Slabs[:whole:whole], p.Blocks[:p.Shared]
	return p, nil
}

// Reusable is how many blocks of a prompt can come from the cache at most: one token at least is computed.
func Reusable(spec *wire.Spec) int { return kv.Blocks(len(spec.Prompt)) - 1 }

// Prefix looks for the longest cached beginning of a prompt, for use on an NPU (by its number on the node), of whole blocks, at
// least one token short of it: the last one's logits have to be computed.
func (s *Stage) Prefix(ctx context.Context, npu int, spec *wire.Spec, keys []hbm.Key) (Prefix, error) {
	slabs, blocks, err := s.HBM.FindPrefix(ctx, npu, keys[:min(Reusable(spec), len(keys))])
	if err != nil {
		return Prefix{}, err
	}
	p := Prefix{Slabs: slabs, Blocks: make([]kv.BlockRef, len(blocks))}
	near := len(blocks)
	for i, b := range blocks {
		p.Blocks[i] = kv.BlockRef{Slab: b.Slab, Block: b.Block, Sealed: true, CRC: b.CRC}
		if slabs[b.Slab].Far(npu) {
			near = min(near, i)
		}
	}
	p.Shared = kv.Whole(p.Blocks[:near])
	return p, nil
}
