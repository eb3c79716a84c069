// Package sched decides what goes next: which request is let in (Queue), how long that will take (Rate, Line), and what an
// instance computes in its next step (Step). It is arithmetic on what waits: no clock, goroutine, logger, bus or
// device, so the same decisions can be replayed from a script (testdata) and by a simulator.
package sched

import "trireme.dev/shared/model"

// Limits bound the steps of an instance.
type Limits struct {
	Seqs   int // sequences of any step, as the engine's buffers have room for
	Rows   int // new tokens of any step, likewise
	Prompt int // of them prompt tokens; 0: as many as Rows
	Mixed
}

// Mixed bounds the steps in which sequences decode and prompts are computed beside them. Everybody who decodes waits for
// such a step, so prompts get what the decoding tokens leave of Tokens and of Blocks, and in any case Least tokens, lest
// they never end. Steps without decoding tokens keep nobody waiting and have no such bounds.
type Mixed struct {
	Tokens int // new tokens of all sequences; 0: as many as Rows
	Blocks int // KV blocks that these tokens attend to, each those up to its own (attention's work); 0: not counted
	Least  int // prompt tokens of a step at least, if there are so many
}

// Step is one step while it is formed: first every sequence that decodes asks for its token, then prompts ask for chunks.
// It grants what the limits allow; who is granted something takes it. It is used again and again and allocates nothing.
type Step struct {
	limits   Limits
	seqs     int
	decoding int // tokens
	prompt   int // tokens
	blocks   int // attended to
}

// NewStep returns an empty step.
func NewStep(l Limits) Step {
	if l.Tokens == 0 {
		l.Tokens = l.Rows
	}
	if l.Prompt == 0 {
		l.Prompt = l.Rows
	}
	return Step{limits: l}
}

// Begin empties the step.
func (s *Step) Begin() { *s = Step{limits: s.limits} }

// Tokens is the number of new tokens so far.
func (s *Step) Tokens() int { return s.decoding + s.prompt }

// Token grants a decoding sequence its next token, at position pos, or says that the step is full.
func (s *Step) Token(pos int) bool {
	if s.prompt > 0 {
		panic("BUG: a sequence asks for its token after prompts were given theirs")
	}
	if s.seqs >= s.limits.Seqs || s.decoding >= s.limits.Rows {
		return false
	}
	s.seqs++
	s.decoding++
	s.blocks += attended(pos)
	return true
}

// Chunk grants a prompt of which left tokens from position pos on are to be computed as many of them as there is room
// for, in one piece; 0: none.
func (s *Step) Chunk(pos, left int) int {
	if s.seqs >= s.limits.Seqs {
		return 0
	}
	n := min(left, s.limits.Rows-s.Tokens(), s.limits.Prompt-s.prompt)
	if s.decoding > 0 {
		n = min(n, max(s.affordable(pos, s.limits.Tokens-s.Tokens()), s.limits.Least-s.prompt))
	}
	if n <= 0 {
		return 0
	}
	s.seqs++
	s.prompt += n
	for i := range n {
		s.blocks += attended(pos + i)
	}
	return n
}

// affordable is how many of the next most tokens from position pos on the block budget allows.
func (s *Step) affordable(pos, most int) int {
	if s.limits.Blocks == 0 {
		return most
	}
	left := s.limits.Blocks - s.blocks
	for n := range max(most, 0) {
		if left -= attended(pos + n); left < 0 {
			return n
		}
	}
	return most
}

// attended is the number of KV blocks that the token at position pos attends to: all up to its own.
func attended(pos int) int { return pos/model.BlockTokens + 1 }
