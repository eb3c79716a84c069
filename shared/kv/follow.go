package kv

import (
	"fmt"

	"trireme.dev/shared/mem"
	"trireme.dev/shared/model"
)

// A sequence moves to another memory domain while its writer goes on: a copy follows it, block by block, and takes its place between two
// steps, when only the open block and the last records are missing.

// View is s as it is now, for who reads it beside its writer: its full blocks, the first tokens of its log and its slabs.
type View struct {
	seq    Sequence
	tokens int
}

// View is called by the writer, between two tokens.
func (s *Sequence) View() *View {
	v := &View{tokens: s.Log.Committed()}
	v.seq.Log = s.Log
	v.seq.Blocks, v.seq.slabs = s.Blocks[:len(s.Blocks):len(s.Blocks)], s.slabs[:len(s.slabs):len(s.slabs)]
	return v
}

// Shape is that of the log.
func (v *View) Shape() LogShape { return v.seq.Log.shape }

// Block is what the log says of a block.
func (v *View) Block(i int) (BlockRef, error) { return v.seq.Log.Block(i) }

// SlabList returns the slabs of the log's table, in order.
func (v *View) SlabList() []Slab { return v.seq.slabs }

// Positions is the number of positions whose KV is there.
func (v *View) Positions() int { return v.seq.Log.shape.Prompt + max(v.tokens-1, 0) }

// Full is the number of full blocks.
func (v *View) Full() int { return v.Positions() / model.BlockTokens }

// Follow brings s, a copy of v's sequence as it was before, or of none of it yet, up to its full blocks and records. With last, which is
// for between two steps of the writer, it copies the open block, too, and s can go on. s has room for the positions of v. An error
// wraps mem.ErrCorrupt when a copy is not what was sealed, or recorded; one of copyBlock ends it.
func (s *Sequence) Follow(v *View, last bool, copyBlock func(dst, src []float32) error) error {
	for i := len(s.Blocks); i < v.Full(); i++ {
		ref, err := v.seq.Log.Block(i)
		if err != nil {
			return err
		}
		if err := s.Grow((i + 1) * model.BlockTokens); err != nil {
			return err
		}
		if err := copyBlock(s.Blocks[i], v.seq.Blocks[i]); err != nil {
			return fmt.Errorf("copying KV block %d: %w", i, err)
		}
		if !ref.Sealed || mem.Checksum(bytesOf(s.Blocks[i])) != ref.CRC {
			return fmt.Errorf("copy of KV block %d of %s/%d: %w", i, s.Log.shape.Request, s.Log.shape.Choice, mem.ErrCorrupt)
		}
		s.Log.SealBlock(i, ref.CRC)
	}
	if n := v.Positions(); last && n > v.Full()*model.BlockTokens {
		if err := s.Grow(n); err != nil {
			return err
		}
		if err := copyBlock(s.Blocks[v.Full()], v.seq.Blocks[v.Full()]); err != nil {
			return fmt.Errorf("copying the open KV block: %w", err)
		}
	}
	for i := s.Log.Committed(); i < v.tokens; i++ {
		rec, err := v.seq.Log.Record(i)
		if err != nil {
			return err
		}
		if err := s.Log.Append(rec); err != nil {
			return err
		}
	}
	if !last {
		return nil
	}
	return s.checkOpen()
}
