package kv

import (
	"fmt"
	"unsafe"

	"trireme.dev/shared/mem"
	"trireme.dev/shared/model"
)

// SlabBlocks is the number of KV blocks in one slab, the unit in which the HMM gives out KV memory.
const SlabBlocks = 16

// Blocks is the number of KV blocks that hold n positions.
func Blocks(n int) int { return (n + model.BlockTokens - 1) / model.BlockTokens }

// Slabs is the number of slabs that hold n positions.
func Slabs(n int) int { return (Blocks(n) + SlabBlocks - 1) / SlabBlocks }

// SlabBytes is the size of one slab of a model.
func SlabBytes(t *model.Text) int64 { return int64(SlabBlocks) * int64(t.BlockFloats()) * 4 }

// Slab is a slab of KV blocks mapped into this process.
type Slab interface {
	Handle() mem.Handle
	Bytes() []byte // valid until the owner frees it
}

// Sequence is one choice's KV blocks and log as one process sees them. It does not own slabs or log memory; whoever
// mapped them frees them after the sequence is dropped. Not safe for concurrent use.
type Sequence struct {
	Log    *Log
	Blocks [][]float32 // device, in order; each model.Text.BlockFloats long

	slabs       []Slab
	free        []BlockRef // blocks of this sequence's own slabs not yet in use, in order
	blockFloats int
	rowFloats   int // of one token in one plane; a block is planes of [BlockTokens, rowFloats], see model.Text.BlockFloats
	covered     int // positions whose KV a record or a seal vouches for
}

// NewSequence returns an empty sequence that writes to log.
func NewSequence(t *model.Text, log *Log) *Sequence {
	return &Sequence{Log: log, blockFloats: t.BlockFloats(), rowFloats: t.KVHeads * t.HeadDim}
}

// OpenSequence rebuilds a sequence from its log and its mapped slabs, given in the order of the log's table. Every full
// block must be sealed and is checked against its CRC, and the open one against the records; an error then wraps
// mem.ErrCorrupt. A slab that a Continuation has no need of may be nil: its blocks are then nil, and not checked.
func OpenSequence(t *model.Text, log *Log, slabs []Slab) (*Sequence, error) {
	s := NewSequence(t, log)
	if len(slabs) != log.SlabCount() {
		panic(fmt.Sprintf("BUG: %d slabs for a log of %d", len(slabs), log.SlabCount()))
	}
	s.slabs = slabs
	for i := range slabs {
		if slabs[i] == nil {
			continue
		}
		if got, want := int64(len(slabs[i].Bytes())), SlabBytes(t); got < want {
			return nil, fmt.Errorf("opening slab %d: %d bytes, want %d: %w", i, got, want, mem.ErrCorrupt)
		}
	}
	written := log.written()
	if n := log.BlockCount(); n < Blocks(written) {
		return nil, fmt.Errorf("%d KV blocks for %d positions: %w", n, written, mem.ErrCorrupt)
	}
	next := make([]int, len(slabs)) // by slab: the block behind the last one in use
	for i := range log.BlockCount() {
		ref, err := log.Block(i)
		if err != nil {
			return nil, err
		}
		if slabs[ref.Slab] == nil {
			s.Blocks = append(s.Blocks, nil)
			continue
		}
		block := s.block(ref)
		if full := i < written/model.BlockTokens; full && !ref.Sealed || ref.Sealed && mem.Checksum(bytesOf(block)) != ref.CRC {
			return nil, fmt.Errorf("KV block %d of %s/%d: %w", i, log.shape.Request, log.shape.Choice, mem.ErrCorrupt)
		}
		s.Blocks = append(s.Blocks, block)
		next[ref.Slab] = max(next[ref.Slab], ref.Block+1)
	}
	for i := range slabs {
		_, own, err := log.Slab(i)
		if err != nil {
			return nil, err
		}
		for b := next[i]; own && slabs[i] != nil && b < SlabBlocks; b++ {
			s.free = append(s.free, BlockRef{Slab: i, Block: b})
		}
	}
	return s, s.checkOpen()
}

// AddSlab gives the sequence a fresh slab of its own. mem.ErrFenced when another writer has changed the log.
func (s *Sequence) AddSlab(slab Slab) error {
	if n := len(s.slabs); n != s.Log.SlabCount() {
		return errTakenOver("slab", n)
	}
	n, err := s.Log.AddSlab(slab.Handle(), true)
	if err != nil {
		return err
	}
	s.slabs = append(s.slabs, slab)
	for b := range SlabBlocks {
		s.free = append(s.free, BlockRef{Slab: n, Block: b})
	}
	return nil
}

// Room is the number of positions that fit without another slab.
func (s *Sequence) Room() int { return (len(s.Blocks) + len(s.free)) * model.BlockTokens }

// Grow takes blocks until n positions fit. The caller has made room. mem.ErrFenced when another writer has changed the
// log.
func (s *Sequence) Grow(n int) error {
	for len(s.Blocks) < Blocks(n) {
		if i := len(s.Blocks); i != s.Log.BlockCount() {
			return errTakenOver("block", i)
		}
		if len(s.free) == 0 {
			panic(fmt.Sprintf("BUG: growing to %d positions with room for %d", n, s.Room()))
		}
		ref := s.free[0]
		if err := s.Log.AddBlock(ref.Slab, ref.Block); err != nil {
			return err
		}
		s.free = s.free[1:]
		s.Blocks = append(s.Blocks, s.block(ref))
	}
	return nil
}

// Seal seals the blocks that positions [from, to) have filled up.
func (s *Sequence) Seal(from, to int) {
	for i := from / model.BlockTokens; i < to/model.BlockTokens; i++ {
		s.Log.SealBlock(i, mem.Checksum(bytesOf(s.Blocks[i])))
	}
}

// Append commits the next token: the KV of all positions before it is written, and full blocks are sealed. r gets the
// checksum of what the open block has gained since the last record. Errors are those of Log.Append.
func (s *Sequence) Append(r Record) error {
	end := s.Log.shape.Prompt + r.Index
	if from := max(s.covered, end/model.BlockTokens*model.BlockTokens); from < end {
		r.Covers, r.KV = end-from, s.checksum(from, end)
	}
	if err := s.Log.Append(r); err != nil {
		return err
	}
	s.covered = end
	return nil
}

// checkOpen compares the open block's KV with what the records say of it: an error wraps mem.ErrCorrupt. Nobody vouches
// for the KV of an answer that was complete before it was resumed, and nobody will use it.
func (s *Sequence) checkOpen() error {
	end := s.Log.written()
	first := end / model.BlockTokens * model.BlockTokens
	for n := s.Log.Committed() - 1; n >= 0 && s.Log.shape.Prompt+n > first; n-- {
		rec, err := s.Log.Record(n)
		if err != nil {
			return err
		}
		at := s.Log.shape.Prompt + n
		if from := at - rec.Covers; from < first || s.checksum(from, at) != rec.KV {
			return fmt.Errorf("KV of %d positions before token %d of %s/%d: %w",
				rec.Covers, n, s.Log.shape.Request, s.Log.shape.Choice, mem.ErrCorrupt)
		}
	}
	s.covered = end
	return nil
}

// checksum is that of the KV of positions [from, to) of one block, plane by plane.
func (s *Sequence) checksum(from, to int) (crc uint32) {
	if from == to {
		return 0
	}
	block, at := s.Blocks[from/model.BlockTokens], from%model.BlockTokens*s.rowFloats
	for ; at < len(block); at += model.BlockTokens * s.rowFloats {
		crc = mem.Extend(crc, bytesOf(block[at:at+(to-from)*s.rowFloats]))
	}
	return crc
}

// Fork starts a sequence of another choice behind n positions of s: full blocks are shared, the open block is copied
// by copyBlock into the fork's first own block. The slabs of s are added to the fork's table, then slab as its own.
// The blocks that s has in reserve stay s's.
func (s *Sequence) Fork(t *model.Text, log *Log, n int, slab Slab, copyBlock func(dst, src []float32)) (*Sequence, error) {
	f := NewSequence(t, log)
	full := n / model.BlockTokens
	for i := range full {
		ref, err := s.Log.Block(i)
		if err != nil {
			return nil, err
		}
		for n := len(f.slabs); n <= ref.Slab; n++ { // slabs are in order of their first block
			if _, err := log.AddSlab(s.slabs[n].Handle(), false); err != nil {
				return nil, err
			}
			f.slabs = append(f.slabs, s.slabs[n])
		}
		if err := log.AddBlock(ref.Slab, ref.Block); err != nil {
			return nil, err
		}
		if ref.Sealed {
			log.SealBlock(i, ref.CRC)
		}
		f.Blocks = append(f.Blocks, s.Blocks[i])
	}
	if err := f.AddSlab(slab); err != nil {
		return nil, err
	}
	if n%model.BlockTokens != 0 {
		if err := f.Grow(n); err != nil {
			return nil, err
		}
		copyBlock(f.Blocks[full], s.Blocks[full])
	}
	return f, nil
}

// SlabList returns the slabs in the order of the log's table. It is the sequence's own slice.
func (s *Sequence) SlabList() []Slab { return s.slabs }

func (s *Sequence) block(ref BlockRef) []float32 {
	size := s.blockFloats * 4
	at := ref.Block * size
	return floatsOf(s.slabs[ref.Slab].Bytes()[at : at+size])
}

// floatsOf views the bytes of a block as what they are.
func floatsOf(p []byte) []float32 {
	return unsafe.Slice((*float32)(unsafe.Pointer(&p[0])), len(p)/4)
}

// bytesOf views a block, or a part of it, as bytes, for checksums. On a GPU the backend will have to do that.
func bytesOf(block []float32) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(&block[0])), len(block)*4)
}
