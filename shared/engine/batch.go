package engine

import (
	"fmt"

	"trireme.dev/shared/kernel"
	"trireme.dev/shared/model"
)

// Limits bounds what one batch of a Text has on each NPU. They fix its scratch memory: as any NPU's rows may all go to the experts
// of one, that grows with the number of NPUs.
type Limits struct {
	Rows int // most new tokens of one batch, all sequences of an NPU together
	Seqs int // most sequences of one batch on an NPU, and most rows whose logits are wanted
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

	// NPU is the slot of the NPU that computes the sequence, by its place in NewText. Its blocks, and the planes of its Visuals,
	// lie in that NPU's memory.
	NPU int

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

// check says what is wrong with one sequence.
func (t *Text) check(s *Seq) error {
	n := len(s.Tokens)
	if s.NPU < 0 || s.NPU >= len(t.byNPU) || t.byNPU[s.NPU] == nil {
		return fmt.Errorf("on NPU %d, where there is none", s.NPU)
	}
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

// work is what the part of the batch is made of. One new token behind others is taken for a step of decoding. What experts of
// other NPUs do for its rows counts here, as if all NPUs had the same to do.
func (p *part) work() kernel.Work {
	var w kernel.Work
	for _, i := range p.own {
		s := &p.t.batch[i]
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
func (p *part) angles() {
	half, row := p.t.cfg.HeadDim/2, 0
	for _, i := range p.own {
		s := &p.t.batch[i]
		for j := range s.Tokens {
			at := int32(s.Pos + j + s.Delta)
			pos := [3]int32{at, at, at}
			if s.Rope != nil {
				pos = s.Rope[j]
			}
			p.t.rotary.fill(p.cos[row*half:(row+1)*half], p.sin[row*half:(row+1)*half], pos)
			row++
		}
	}
}

// embed fills hidden: embeddings of text tokens in runs as long as possible, plane 0 of multimodal ones.
func (p *part) embed() {
	hidden := p.t.cfg.Hidden
	base, from := 0, 0 // first row of the sequence, first text row not yet embedded
	p.ids = p.ids[:0]
	for _, i := range p.own {
		s := &p.t.batch[i]
		at := 0
		for j := range s.Visual {
			v := &s.Visual[j]
			p.ids = append(p.ids, s.Tokens[at:v.Row]...)
			p.embedText(from)
			p.c.Copy(p.hidden[(base+v.Row)*hidden:(base+v.Row+v.Rows)*hidden], v.Planes[0])
			at = v.Row + v.Rows
			from = base + at
		}
		p.ids = append(p.ids, s.Tokens[at:]...)
		base += len(s.Tokens)
	}
	p.embedText(from)
}

// embedText embeds the collected ids from row on and empties them.
func (p *part) embedText(row int) {
	if n := len(p.ids); n > 0 {
		p.c.Embed(p.hidden[row*p.t.cfg.Hidden:(row+n)*p.t.cfg.Hidden], p.w.Embed, p.ids)
		p.ids = p.ids[:0]
	}
}

// deepStack adds the planes that belong behind a layer.
func (p *part) deepStack(layer int) {
	if layer+1 >= p.planes {
		return
	}
	hidden, base := p.t.cfg.Hidden, 0
	for _, i := range p.own {
		s := &p.t.batch[i]
		for j := range s.Visual {
			v := &s.Visual[j]
			if layer+1 < len(v.Planes) {
				p.c.Add(p.hidden[(base+v.Row)*hidden:(base+v.Row+v.Rows)*hidden], v.Planes[layer+1])
			}
		}
		base += len(s.Tokens)
	}
}

// narrow moves the rows whose logits are wanted to the front of hidden and normed, with their angles and their
// kernel sequences, and forgets the others. Rows are computed independently of each other, so this changes no result.
func (p *part) narrow() {
	hidden, half := p.t.cfg.Hidden, p.t.cfg.HeadDim/2
	to, kept := 0, 0
	for i, k := range p.seqs {
		n := p.t.batch[p.own[i]].wanted()
		if n == 0 {
			continue
		}
		from := k.Row + k.Rows - n
		for r := range n {
			if dst, src := to+r, from+r; dst != src {
				p.c.Copy(p.hidden[dst*hidden:(dst+1)*hidden], p.hidden[src*hidden:(src+1)*hidden])
				p.c.Copy(p.normed[dst*hidden:(dst+1)*hidden], p.normed[src*hidden:(src+1)*hidden])
				copy(p.cos[dst*half:(dst+1)*half], p.cos[src*half:(src+1)*half])
				copy(p.sin[dst*half:(dst+1)*half], p.sin[src*half:(src+1)*half])
			}
		}
		p.seqs[kept] = kernel.Seq{Row: to, Rows: n, Pos: k.Pos + k.Rows - n, Blocks: k.Blocks}
		to += n
		kept++
	}
	p.seqs, p.rows = p.seqs[:kept], to
}
