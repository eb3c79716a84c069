package engine

import (
	"fmt"

	"trireme.dev/shared/kernel"
	"trireme.dev/shared/model"
)

// Limits bounds one batch of a Text. They fix its scratch memory.
type Limits struct {
	Rows int // most new tokens of one batch, all sequences together
	Seqs int // most sequences of one batch, and most rows whose logits are wanted
}

// Seq is one sequence's part of a batch: a chunk of its prompt, or one token in decode. Every slice belongs to the
// caller and is not kept after Forward.
type Seq struct {
	Tokens []int32 // new tokens of this step, at least one
	Pos    int     // tokens already in the KV blocks; the new ones go behind them

	// Rope holds the M-RoPE position of each new token (Positions). Nil: token i stands at Pos+i+Delta on all axes, as
	// in decode and in models without M-RoPE.
	Rope  [][3]int32
	Delta int

	// Blocks are the sequence's KV blocks in order, device memory, each model.Text.BlockFloats long, enough for
	// Pos+len(Tokens) positions. Forward writes the new positions and reads the rest.
	Blocks [][]float32

	// Visual lists the multimodal tokens among the new tokens, by rising Row.
	Visual []Visual

	Want bool // logits of the last new token are wanted
	All  bool // logits of every new token are wanted; implies Want
}

// Visual says that new tokens [Row, Row+Rows) of a sequence are multimodal. Planes are device memory, each [Rows,
// Hidden]: plane 0 stands in for the embedding, plane p > 0 is added to the hidden states after layer p-1 (DeepStack,
// _deepstack_process).
type Visual struct {
	Row, Rows int
	Planes    [][]float32
}

// wanted is the number of rows of s whose logits are wanted; they are its last ones.
func (s *Seq) wanted() int {
	switch {
	case s.All:
		return len(s.Tokens)
	case s.Want:
		return 1
	default:
		return 0
	}
}

// plan checks a batch and prepares what the layers share: the kernel's view of the sequences and the rotary angles.
func (t *Text) plan(seqs []Seq) error {
	if len(seqs) > t.lim.Seqs {
		return fmt.Errorf("%w: %d sequences, the limit is %d", ErrBatch, len(seqs), t.lim.Seqs)
	}
	t.rows, t.planes = 0, 0
	wanted := 0
	t.seqs = t.seqs[:0]
	for i := range seqs {
		s := &seqs[i]
		if err := t.check(s); err != nil {
			return fmt.Errorf("%w: sequence %d: %w", ErrBatch, i, err)
		}
		t.seqs = append(t.seqs, kernel.Seq{Row: t.rows, Rows: len(s.Tokens), Pos: s.Pos, Blocks: s.Blocks})
		t.rows += len(s.Tokens)
		wanted += s.wanted()
		for j := range s.Visual {
			t.planes = max(t.planes, len(s.Visual[j].Planes))
		}
	}
	if t.rows > t.lim.Rows || wanted > t.lim.Seqs {
		return fmt.Errorf("%w: %d rows and logits of %d, the limits are %d and %d",
			ErrBatch, t.rows, wanted, t.lim.Rows, t.lim.Seqs)
	}
	t.angles(seqs)
	return nil
}

// check says what is wrong with one sequence.
func (t *Text) check(s *Seq) error {
	n := len(s.Tokens)
	if n == 0 || s.Pos < 0 {
		return fmt.Errorf("%d tokens at position %d", n, s.Pos)
	}
	if s.Rope != nil && len(s.Rope) != n {
		return fmt.Errorf("%d rotary positions for %d tokens", len(s.Rope), n)
	}
	if need := (s.Pos + n + model.BlockTokens - 1) / model.BlockTokens; len(s.Blocks) < need {
		return fmt.Errorf("%d KV blocks, %d needed", len(s.Blocks), need)
	}
	for i, b := range s.Blocks {
		if len(b) != t.cfg.BlockFloats() {
			return fmt.Errorf("KV block %d has %d float32, want %d", i, len(b), t.cfg.BlockFloats())
		}
	}
	from := 0 // the first token not yet looked at
	for i := range s.Visual {
		v := &s.Visual[i]
		if v.Row < from || v.Rows <= 0 || v.Row+v.Rows > n || len(v.Planes) == 0 || len(v.Planes) > t.cfg.Layers+1 {
			return fmt.Errorf("multimodal run %d of %d planes at [%d, %d)", i, len(v.Planes), v.Row, v.Row+v.Rows)
		}
		for _, p := range v.Planes {
			if len(p) != v.Rows*t.cfg.Hidden {
				return fmt.Errorf("plane of %d float32 for %d multimodal tokens of %d", len(p), v.Rows, t.cfg.Hidden)
			}
		}
		if err := t.checkIDs(s.Tokens[from:v.Row]); err != nil {
			return err
		}
		from = v.Row + v.Rows
	}
	return t.checkIDs(s.Tokens[from:])
}

// checkIDs refuses tokens outside the vocabulary.
func (t *Text) checkIDs(ids []int32) error {
	for _, id := range ids {
		if id < 0 || int(id) >= t.cfg.Vocab {
			return fmt.Errorf("token %d outside a vocabulary of %d", id, t.cfg.Vocab)
		}
	}
	return nil
}

// work is what a batch is made of. One new token behind others is taken for a step of decoding.
func work(seqs []Seq) kernel.Work {
	var w kernel.Work
	for i := range seqs {
		s := &seqs[i]
		n := len(s.Tokens)
		if n == 1 && s.Pos > 0 {
			w.Decoding++
			w.Context += s.Pos + 1
			continue
		}
		w.Prompt += n
		w.Pairs += n*s.Pos + n*(n+1)/2
		for j := range s.Visual {
			w.Visual += s.Visual[j].Rows
		}
	}
	return w
}

// angles fills the rotary angles of all rows.
func (t *Text) angles(seqs []Seq) {
	half, row := t.cfg.HeadDim/2, 0
	for i := range seqs {
		s := &seqs[i]
		for j := range s.Tokens {
			p := int32(s.Pos + j + s.Delta)
			pos := [3]int32{p, p, p}
			if s.Rope != nil {
				pos = s.Rope[j]
			}
			t.rotary.fill(t.cos[row*half:(row+1)*half], t.sin[row*half:(row+1)*half], pos)
			row++
		}
	}
}

// embed fills hidden: embeddings of text tokens in runs as long as possible, plane 0 of multimodal ones.
func (t *Text) embed(seqs []Seq) {
	hidden := t.cfg.Hidden
	base, from := 0, 0 // first row of the sequence, first text row not yet embedded
	t.ids = t.ids[:0]
	for i := range seqs {
		s := &seqs[i]
		at := 0
		for j := range s.Visual {
			v := &s.Visual[j]
			t.ids = append(t.ids, s.Tokens[at:v.Row]...)
			t.embedText(from)
			t.c.Copy(t.hidden[(base+v.Row)*hidden:(base+v.Row+v.Rows)*hidden], v.Planes[0])
			at = v.Row + v.Rows
			from = base + at
		}
		t.ids = append(t.ids, s.Tokens[at:]...)
		base += len(s.Tokens)
	}
	t.embedText(from)
}

// embedText embeds the collected ids from row on and empties them.
func (t *Text) embedText(row int) {
	if n := len(t.ids); n > 0 {
		t.c.Embed(t.hidden[row*t.cfg.Hidden:(row+n)*t.cfg.Hidden], t.w.Embed, t.ids)
		t.ids = t.ids[:0]
	}
}

// deepStack adds the planes that belong behind a layer.
func (t *Text) deepStack(seqs []Seq, layer int) {
	if layer+1 >= t.planes {
		return
	}
	hidden, base := t.cfg.Hidden, 0
	for i := range seqs {
		for j := range seqs[i].Visual {
			v := &seqs[i].Visual[j]
			if layer+1 < len(v.Planes) {
				t.c.Add(t.hidden[(base+v.Row)*hidden:(base+v.Row+v.Rows)*hidden], v.Planes[layer+1])
			}
		}
		base += len(seqs[i].Tokens)
	}
}

// narrow moves the rows whose logits are wanted to the front of hidden and normed, with their angles and their
// kernel sequences, and forgets the others. Rows are computed independently of each other, so this changes no result.
func (t *Text) narrow(seqs []Seq) {
	hidden, half := t.cfg.Hidden, t.cfg.HeadDim/2
	to, kept := 0, 0
	for i := range seqs {
		n := seqs[i].wanted()
		if n == 0 {
			continue
		}
		k := t.seqs[i]
		from := k.Row + k.Rows - n
		for r := range n {
			if dst, src := to+r, from+r; dst != src {
				t.c.Copy(t.hidden[dst*hidden:(dst+1)*hidden], t.hidden[src*hidden:(src+1)*hidden])
				t.c.Copy(t.normed[dst*hidden:(dst+1)*hidden], t.normed[src*hidden:(src+1)*hidden])
				copy(t.cos[dst*half:(dst+1)*half], t.cos[src*half:(src+1)*half])
				copy(t.sin[dst*half:(dst+1)*half], t.sin[src*half:(src+1)*half])
			}
		}
		t.seqs[kept] = kernel.Seq{Row: to, Rows: n, Pos: k.Pos + k.Rows - n, Blocks: k.Blocks}
		to += n
		kept++
	}
	t.seqs, t.rows = t.seqs[:kept], to
}
