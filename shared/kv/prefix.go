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

// Share begins an empty sequence with sealed blocks of others: blocks[i] is in slabs[blocks[i].Slab], and slabs are in
// order of their first block. Each block's CRC is checked first: the sequence begins with those before the first wrong
// one; Share returns their number, and an error that wraps mem.ErrCorrupt when that is not all. The slabs are only ever
// read. Other errors are those of Log.AddSlab and Log.AddBlock.
func (s *Sequence) Share(slabs []Slab, blocks []BlockRef) (n int, err error) {
	if len(s.Blocks)+len(s.slabs)+s.Log.BlockCount() > 0 {
		panic("BUG: sharing blocks with a sequence that has some")
	}
	for i, ref := range blocks {
		p := slabs[ref.Slab].Bytes()
		size := s.blockFloats * 4
		at := ref.Block * size
		if at+size > len(p) || mem.Checksum(p[at:at+size]) != ref.CRC {
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
