// Package sched decides what goes next: which request is let in (Queue), how long that will take (Rate, Line), and what an
// instance computes in its next step (Step). It is arithmetic on what waits: no clock, goroutine, logger, bus or
// device, so the same decisions can be replayed from a script (testdata) and by a simulator.
package sched

import (
	"trireme.dev/shared/model"
	"trireme.dev/shared/sched/placement"
)

// Limits bound what a step of an instance has on each of its NPUs.
type Limits struct {
	Seqs   int // sequences of any step, as the engine's buffers have room for
	Rows   int // new tokens of any step, likewise
	Prompt int // of them prompt tokens; 0: as many as Rows
	Mixed
}

// Mixed bounds the steps in which sequences decode and prompts are computed beside them, on the same NPU or another one of the
// instance, as NPUs compute a step together. Everybody who decodes waits for such a step, so prompts get what the decoding tokens
// of their NPU leave of Tokens and of Blocks, and in any case Least tokens, lest they never end. Steps without decoding tokens keep
// nobody waiting and have no such bounds.
type Mixed struct {
	Tokens int // new tokens of all sequences; 0: as many as Rows
	Blocks int // KV blocks that these tokens attend to, each those up to its own (attention's work); 0: not counted
	Least  int // prompt tokens of a step at least, if there are so many
}

// Step is one step while it is formed: first every sequence that decodes asks for its token, then prompts ask for chunks.
// It grants what the limits allow; who is granted something takes it. It is used again and again and allocates nothing.
type Step struct {
	limits   Limits
	npus     placement.Set
	parts    []part // by NPU
	decoding int    // tokens, on all NPUs
	prompt   int    // likewise
}

// part is what a step has on one NPU.
type part struct {
	seqs     int
	decoding int // tokens
	prompt   int // tokens
	blocks   int // attended to
}

// NewStep returns an empty step of an instance with these NPUs.
func NewStep(l Limits, npus placement.Set) Step {
	if l.Tokens == 0 {
		l.Tokens = l.Rows
	}
	if l.Prompt == 0 {
		l.Prompt = l.Rows
	}
	return Step{limits: l, npus: npus, parts: make([]part, npus.Slots())}
}

// Begin empties the step.
func (s *Step) Begin() {
	clear(s.parts)
	s.decoding, s.prompt = 0, 0
}

// NPUs are the instance's NPUs.
func (s *Step) NPUs() placement.Set { return s.npus }

// Tokens is the number of new tokens so far.
func (s *Step) Tokens() int { return s.decoding + s.prompt }

// Token grants a decoding sequence of an NPU its next token, at position pos, or says that the NPU has no room in the step.
func (s *Step) Token(npu, pos int) bool {
	if s.prompt > 0 {
		panic("BUG: a sequence asks for its token after prompts were given theirs")
	}
	p := &s.parts[npu]
	if p.seqs >= s.limits.Seqs || p.decoding >= s.limits.Rows {
		return false
	}
	p.seqs++
	p.decoding++
	s.decoding++
	p.blocks += attended(pos)
	return true
}

// Chunk grants a prompt of an NPU, of which left tokens from position pos on are to be computed, as many of them as there is room
// for, in one piece; 0: none.
func (s *Step) Chunk(npu, pos, left int) int {
	p := &s.parts[npu]
	if p.seqs >= s.limits.Seqs {
		return 0
	}
	n := min(left, s.limits.Rows-p.decoding-p.prompt, s.limits.Prompt-p.prompt)
	if s.decoding > 0 {
		n = min(n, max(s.affordable(p, pos, s.limits.Tokens-p.decoding-p.prompt), s.limits.Least-p.prompt))
	}
	if n <= 0 {
		return 0
	}
	p.seqs++
	p.prompt += n
	s.prompt += n
	for i := range n {
		p.blocks += attended(pos + i)
	}
	return n
}

// affordable is how many of the next most tokens from position pos on the block budget of an NPU allows.
func (s *Step) affordable(p *part, pos, most int) int {
	if s.limits.Blocks == 0 {
		return most
	}
	left := s.limits.Blocks - p.blocks
	for n := range max(most, 0) {
		if left -= attended(pos + n); left < 0 {
			return n
		}
	}
	return most
}

// attended is the number of KV blocks that the token at position pos attends to: all up to its own.
func attended(pos int) int { return pos/model.BlockTokens + 1 }
