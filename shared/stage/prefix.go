package stage

import (
	"context"
	"errors"
	"fmt"
	"slices"

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
	o := kv.Origin{Model: s.Model.Digest, Processor: s.processor, Kernels: s.Compute.Digest(), Salt: spec.Salt}
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
	Slabs  []*hbm.Object // in order of their first block, mapped for reading
	Blocks []kv.BlockRef // by number in the sequence
	Known  int           // the first of Blocks that the index of this memory domain has for sure
}

// Prefix looks for the longest cached beginning of a prompt, of whole blocks, at least one token short of it: the last
// one's logits have to be computed.
func (s *Stage) Prefix(ctx context.Context, spec *wire.Spec, keys []hbm.Key) (Prefix, error) {
	most := kv.Blocks(len(spec.Prompt)) - 1
	slabs, blocks, err := s.HBM.FindPrefix(ctx, s.NPU, keys[:min(most, len(keys))])
	if err != nil {
		return Prefix{}, err
	}
	return s.bring(ctx, slabs, blocks)
}

// bring makes a prefix of cached blocks. Those in other memory domains are copied into fresh slabs here and checked; the
// prefix ends before the first one that is wrong, or for which there is no room. It takes the slabs over.
func (s *Stage) bring(ctx context.Context, slabs []*hbm.Object, blocks []hbm.Block) (p Prefix, err error) {
	far := 0
	for _, b := range blocks {
		if slabs[b.Slab].Far(s.NPU) {
			far++
		}
	}
	var drop []*hbm.Object
	defer func() {
		if err != nil {
			drop = append(drop, p.Slabs...)
		}
		s.Free(ctx, drop...)
	}()
	var fresh []*hbm.Object
	if far > 0 {
		specs := slices.Repeat([]hbm.Spec{{Kind: mem.KindKV, NPU: s.NPU, Bytes: kv.SlabBytes(&s.Model.Text)}}, kv.SlabsOf(far))
		if fresh, err = s.HBM.Alloc(ctx, specs...); err != nil && !errors.Is(err, mem.ErrExhausted) {
			drop = slabs
			return p, fmt.Errorf("copying %d cached KV blocks: %w", far, err)
		}
	}
	size := int64(s.Model.Text.BlockFloats()) * 4
	at := map[*hbm.Object]int{}
	copied := 0
	p.Known = -1
	for i, b := range blocks {
		from, number := slabs[b.Slab], b.Block
		if from.Far(s.NPU) {
			if p.Known < 0 {
				p.Known = i
			}
			if fresh == nil {
				break
			}
			to := fresh[copied/kv.SlabBlocks]
			number = copied % kv.SlabBlocks
			if err := copyBlock(to.Bytes(), number, from.Bytes(), b, size); err != nil {
				s.Log.Warn("copying a cached KV block from another memory domain", "error", err)
				if err := s.HBM.Forget(ctx, from); err != nil { // or the next one would be given it again
					s.Log.Warn("forgetting wrong KV", "error", err)
				}
				break
			}
			copied++
			from = to
		}
		n, ok := at[from]
		if !ok {
			n = len(p.Slabs)
			at[from] = n
			p.Slabs = append(p.Slabs, from)
		}
		p.Blocks = append(p.Blocks, kv.BlockRef{Slab: n, Block: number, Sealed: true, CRC: b.CRC})
	}
	if p.Known < 0 {
		p.Known = len(p.Blocks)
	}
	for _, o := range append(slabs, fresh...) {
		if _, ok := at[o]; !ok {
			drop = append(drop, o)
		}
	}
	return p, nil
}

// copyBlock copies one block of size bytes between two slabs and compares the copy with the block's checksum.
func copyBlock(dst []byte, number int, src []byte, b hbm.Block, size int64) error {
	if int64(b.Block+1)*size > int64(len(src)) {
		return fmt.Errorf("block %d of a slab of %d bytes: %w", b.Block, len(src), mem.ErrCorrupt)
	}
	to := dst[int64(number)*size:][:size]
	copy(to, src[int64(b.Block)*size:])
	if mem.Checksum(to) != b.CRC {
		return fmt.Errorf("block %d: %w", b.Block, mem.ErrCorrupt)
	}
	return nil
}
