package kv

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	"trireme.dev/shared/mem"
	"trireme.dev/shared/model"
)

// Origin is what the KV of a token depends on beside the tokens up to it.
type Origin struct {
	Model     [32]byte // digest
	Processor [32]byte // digest of the image processor; zero for a model without one
	Kernels   string   // digest of the kernel set
	Salt      string   // of the tenant: who may share
}

// Picture is a picture among a sequence's tokens.
type Picture struct {
	Start, Tokens int
	Grid          [3]int
	Content       [32]byte // SHA-256 of the encoded bytes
}

// Hashes names the content of each full block of tokens: SHA-256 over the hash of the block before it (of the first: over
// the origin and the KV format, mode exact) and over each token, which is its id, or for a picture's token the picture's
// content, grid and the token's number in it. Positions follow from these. Two blocks with one hash hold the same
// bits. pictures are in order and do not overlap.
func Hashes(o Origin, tokens []int32, pictures []Picture) [][32]byte {
	parent := sha256.Sum256(fmt.Appendf(nil, "trireme kv 1 float32 %d %x %x %q %q", model.BlockTokens, o.Model, o.Processor, o.Kernels, o.Salt))
	hashes := make([][32]byte, 0, len(tokens)/model.BlockTokens)
	be := binary.BigEndian
	var b []byte
	for i := 0; i+model.BlockTokens <= len(tokens); i += model.BlockTokens {
		b = append(b[:0], parent[:]...)
		for n := i; n < i+model.BlockTokens; n++ {
			for len(pictures) > 0 && n >= pictures[0].Start+pictures[0].Tokens {
				pictures = pictures[1:]
			}
			if len(pictures) == 0 || n < pictures[0].Start {
				b = be.AppendUint32(append(b, 0), uint32(tokens[n]))
				continue
			}
			p := &pictures[0]
			b = append(append(b, 1), p.Content[:]...)
			for _, side := range p.Grid {
				b = be.AppendUint32(b, uint32(side))
			}
			b = be.AppendUint32(b, uint32(n-p.Start))
		}
		parent = sha256.Sum256(b)
		hashes = append(hashes, parent)
	}
	return hashes
}

// Whole is how many of a sequence's first blocks may be shared without holding more memory than their number says: those
// in slabs of which every block is the sequence's, in order. It is a multiple of SlabBlocks. What comes behind is copied:
// less than a slab, unless a sequence has cached it that is no prompt's first choice, as those have their blocks in order.
func Whole(blocks []BlockRef) int {
	for i, b := range blocks {
		first := i / SlabBlocks * SlabBlocks
		if b.Block != i-first || b.Slab != blocks[first].Slab {
			return first
		}
	}
	return len(blocks) / SlabBlocks * SlabBlocks
}

// Share begins an empty sequence with sealed blocks of others: blocks[i] is in slabs[blocks[i].Slab], and slabs are in
// order of their first block. Each block's CRC is checked first: the sequence begins with those before the first wrong
// one; Share returns their number, and an error that wraps mem.ErrCorrupt when that is not all. The slabs are only ever
// read. Other errors are those of Log.AddSlab and Log.AddBlock.
func (s *Sequence) Share(slabs []Slab, blocks []BlockRef) (n int, err error) {
	if len(s.Blocks)+len(s.slabs)+s.Log.BlockCount() > 0 {
		panic("BUG: sharing blocks with a sequence that has some")
	}
	for i, ref := range blocks {
		p, ok := s.inSlab(slabs[ref.Slab], ref)
		if !ok || mem.Checksum(p) != ref.CRC {
			return i, fmt.Errorf("cached KV block %d: %w", i, mem.ErrCorrupt)
		}
		for k := len(s.slabs); k <= ref.Slab; k++ {
			if _, err := s.Log.AddSlab(slabs[k].Handle(), false); err != nil {
				return i, err
			}
			s.slabs = append(s.slabs, slabs[k])
		}
		if err := s.Log.AddBlock(ref.Slab, ref.Block); err != nil {
			return i, err
		}
		s.Log.SealBlock(i, ref.CRC)
		s.Blocks = append(s.Blocks, s.block(ref))
	}
	return len(blocks), nil
}

// Copy goes on with copies of others' sealed blocks, which copyBlock makes, in blocks of the sequence's own slabs; the
// sequence so far ends with a block, and the caller has made room. blocks[i] is in slabs[blocks[i].Slab]. The content
// of each copy is checked: Copy returns the number of right ones before the first wrong one, which the sequence then has
// as an open block, and an error that wraps mem.ErrCorrupt when that is not all. Other errors are those
// of Grow and of copyBlock, which ends the copy.
func (s *Sequence) Copy(slabs []Slab, blocks []BlockRef, copyBlock func(dst, src []float32) error) (n int, err error) {
	for n, ref := range blocks {
		at := len(s.Blocks)
		p, ok := s.inSlab(slabs[ref.Slab], ref)
		if !ok {
			return n, fmt.Errorf("cached KV block %d: %w", at, mem.ErrCorrupt)
		}
		if err := s.Grow((at + 1) * model.BlockTokens); err != nil {
			return n, err
		}
		if err := copyBlock(s.Blocks[at], floatsOf(p)); err != nil {
			return n, fmt.Errorf("copying cached KV block %d: %w", at, err)
		}
		if mem.Checksum(bytesOf(s.Blocks[at])) != ref.CRC {
			return n, fmt.Errorf("copy of cached KV block %d: %w", at, mem.ErrCorrupt)
		}
		s.Log.SealBlock(at, ref.CRC)
	}
	return len(blocks), nil
}

// inSlab is the bytes of a block, false when the slab has no such block.
func (s *Sequence) inSlab(slab Slab, ref BlockRef) ([]byte, bool) {
	p, size := slab.Bytes(), s.blockFloats*4
	at := ref.Block * size
	if at+size > len(p) {
		return nil, false
	}
	return p[at : at+size], true
}
