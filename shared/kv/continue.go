package kv

import (
	"fmt"

	"trireme.dev/shared/mem"
	"trireme.dev/shared/model"
)

// A sequence has one writer, and nothing revokes the map of one that was taken for dead and wakes up. So a successor goes
// on in memory of its own: it shares what nobody writes to any more and copies the rest, the log too. What the writer
// before it still writes lands in pages that nobody reads.

// Continuation is what a successor needs to go on with a sequence.
type Continuation struct {
	Share []int // slabs that it goes on in as they are, by number in the table of the log before
	Skip  []int // slabs that hold nothing that it needs: only blocks that it knows, or none
	Fresh int   // slabs of its own, for copies of the blocks in other slabs and for what comes next
	Shape LogShape

	known Known
}

// Known is the first blocks of a sequence, in slabs where the successor has found them by their content: it needs no copies
// of them. Each slab is full of them, in order (see Whole). They are of the prompt.
type Known struct {
	Slabs  []Slab
	Blocks []BlockRef
}

// Continuation says what a successor needs that knows some of the blocks. Slabs that are not far, which it cannot compute
// with where they are, are shared as a whole: those of other sequences, and own ones that are full. The blocks of a slab
// with room left are copied, full ones too, or each successor would leave the rest of a slab unused behind.
func (l *Log) Continuation(known Known, far func(slab mem.Handle) bool) (Continuation, error) {
	full, used := l.written()/model.BlockTokens, Blocks(l.written())-len(known.Blocks)
	filled := make([]int, l.SlabCount())  // full blocks by slab, but for those known
	needed := make([]bool, l.SlabCount()) // slabs with any block that is not known
	for i := len(known.Blocks); i < l.BlockCount(); i++ {
		ref, err := l.Block(i)
		if err != nil {
			return Continuation{}, err
		}
		needed[ref.Slab] = true
	}
	for i := len(known.Blocks); i < full; i++ {
		ref, err := l.Block(i)
		if err != nil {
			return Continuation{}, err
		}
		filled[ref.Slab]++
	}
	c := Continuation{Shape: l.shape, known: known}
	for n, blocks := range filled {
		h, own, err := l.Slab(n)
		if err != nil {
			return Continuation{}, err
		}
		if !needed[n] {
			c.Skip = append(c.Skip, n)
		}
		if blocks > 0 && (!own || blocks == SlabBlocks) && !far(h) {
			c.Share = append(c.Share, n)
			used -= blocks
		}
	}
	c.Fresh = max(1, (used+SlabBlocks-1)/SlabBlocks)
	c.Shape.MaxSlabs = len(known.Slabs) + len(c.Share) + c.Fresh + Slabs(l.shape.Prompt+l.shape.MaxTokens)
	return c, nil
}

// written is the number of positions whose KV is there.
func (l *Log) written() int { return l.shape.Prompt + max(l.Committed()-1, 0) }

// Continue starts a successor of s: c is what the log of s said, log an empty one of its shape, fresh are its slabs. What
// s has not committed is left out. Blocks that are neither known nor shared are copied by copyBlock, and the copies of full
// ones checked, like the known: an error then wraps mem.ErrCorrupt. An error of copyBlock ends it.
func (s *Sequence) Continue(t *model.Text, c Continuation, log *Log, fresh []Slab, copyBlock func(dst, src []float32) error) (*Sequence, error) {
	next := NewSequence(t, log)
	for i, k := range c.known.Blocks {
		ref, err := s.Log.Block(i)
		if err == nil && (!ref.Sealed || ref.CRC != k.CRC) {
			err = fmt.Errorf("KV block %d of %s/%d is not what is known by its name: %w", i, log.shape.Request, log.shape.Choice, mem.ErrCorrupt)
		}
		if err != nil {
			return nil, err
		}
	}
	if _, err := next.Share(c.known.Slabs, c.known.Blocks); err != nil {
		return nil, err
	}
	number := make([]int, len(s.slabs)) // in the table of next; -1: not shared
	for n := range number {
		number[n] = -1
	}
	for _, n := range c.Share {
		var err error
		if number[n], err = log.AddSlab(s.slabs[n].Handle(), false); err != nil {
			return nil, err
		}
		next.slabs = append(next.slabs, s.slabs[n])
	}
	for _, slab := range fresh {
		if err := next.AddSlab(slab); err != nil {
			return nil, err
		}
	}
	full := s.Log.written() / model.BlockTokens
	for i := len(next.Blocks); i < Blocks(s.Log.written()); i++ {
		ref, err := s.Log.Block(i)
		if err != nil {
			return nil, err
		}
		shared := number[ref.Slab] >= 0
		if shared {
			if err := log.AddBlock(number[ref.Slab], ref.Block); err != nil {
				return nil, err
			}
			next.Blocks = append(next.Blocks, s.Blocks[i])
		} else {
			if err := next.Grow((i + 1) * model.BlockTokens); err != nil {
				return nil, err
			}
			if err := copyBlock(next.Blocks[i], s.Blocks[i]); err != nil {
				return nil, fmt.Errorf("copying KV block %d of %s/%d: %w", i, log.shape.Request, log.shape.Choice, err)
			}
		}
		if i == full {
			break // the open block
		}
		if !shared && mem.Checksum(bytesOf(next.Blocks[i])) != ref.CRC {
			return nil, fmt.Errorf("copy of KV block %d of %s/%d: %w", i, log.shape.Request, log.shape.Choice, mem.ErrCorrupt)
		}
		log.SealBlock(i, ref.CRC)
	}
	for i := range s.Log.Committed() {
		rec, err := s.Log.Record(i)
		if err != nil {
			return nil, err
		}
		if err := log.Append(rec); err != nil {
			return nil, err
		}
	}
	return next, next.checkOpen()
}
