package sample

import (
	"cmp"
	"fmt"
	"math"
	"slices"
)

// Sampler chooses the tokens of one answer, one after the other. Its state is what penalties need of the prompt and of
// the tokens so far, so New with the same arguments continues where another one stopped. It is used by one goroutine
// at a time.
type Sampler struct {
	p     Params
	sp    *Space
	bias  []biased
	seen  []seenToken // by rising id; empty unless penalised
	count int         // tokens of the answer so far
}

type biased struct {
	id   int32
	bias float32
}

// seenToken counts how often a token is in the answer; with none it is in the prompt.
type seenToken struct{ id, output int32 }

// New returns a sampler that chooses the token behind output, which may be empty. Neither slice is kept. space is
// shared with other samplers of the goroutine; nil makes one at the first call of Next.
func New(p Params, space *Space, prompt, output []int32) *Sampler {
	s := &Sampler{p: p, sp: space}
	for id, b := range p.Bias {
		s.bias = append(s.bias, biased{id, b})
	}
	slices.SortFunc(s.bias, func(a, b biased) int { return cmp.Compare(a.id, b.id) })
	if p.penalised() {
		s.remember(prompt)
	}
	for _, id := range output {
		s.accept(id)
	}
	return s
}

// remember notes the distinct tokens of the prompt.
func (s *Sampler) remember(prompt []int32) {
	ids := slices.Clone(prompt)
	slices.Sort(ids)
	ids = slices.Compact(ids)
	s.seen = make([]seenToken, 0, len(ids)+256)
	for _, id := range ids {
		s.seen = append(s.seen, seenToken{id: id})
	}
}

// accept notes a token of the answer.
func (s *Sampler) accept(id int32) {
	s.count++
	if !s.p.penalised() {
		return
	}
	at, found := slices.BinarySearchFunc(s.seen, id, func(t seenToken, id int32) int { return cmp.Compare(t.id, id) })
	if !found {
		s.seen = slices.Insert(s.seen, at, seenToken{id: id})
	}
	s.seen[at].output++
}

// Len is the number of tokens of the answer so far, and the index that Next expects.
func (s *Sampler) Len() int { return s.count }

// Next chooses token index of the answer from logits [vocab] (host, not changed, not kept) and counts it as part of
// the answer. logprob is the token's log-probability from the raw logits and top the TopLogprobs most likely tokens,
// most likely first, valid until the next call with the same Space; without logprobs they are 0 and nil. NaN is never
// chosen while any logit is a number. index must be Len.
func (s *Sampler) Next(logits []float32, index int) (token int32, logprob float32, top []TokenLogprob) {
	if index != s.count {
		panic(fmt.Sprintf("BUG: token %d is sampled after %d tokens", index, s.count))
	}
	if s.sp == nil {
		s.sp = NewSpace(len(logits))
	}
	if len(logits) != len(s.sp.scores) {
		panic(fmt.Sprintf("BUG: %d logits in a sampling space for %d", len(logits), len(s.sp.scores)))
	}
	scores := s.adjust(logits)
	if s.p.Temperature < GreedyBelow {
		token = argmax(scores)
	} else {
		token = s.sp.draw(scores, &s.p, Uniform(s.p.Seed, s.p.Choice, uint32(index)))
	}
	if s.p.TopLogprobs >= 0 {
		norm := logSum(logits)
		logprob = float32(float64(logits[token]) - norm)
		if s.p.TopLogprobs > 0 {
			top = s.sp.mostLikely(logits, s.p.TopLogprobs, norm)
		}
	}
	s.accept(token)
	return token, logprob, top
}

// adjust returns logits with masks, biases and penalties applied: in the space's scores, or logits itself where there
// is nothing to apply. Float32 conversions keep products unfused, so that bits are the same on every processor.
func (s *Sampler) adjust(logits []float32) []float32 {
	mask := s.count < s.p.MinTokens && len(s.p.Stop) > 0
	if !mask && len(s.bias) == 0 && !s.p.penalised() {
		return logits
	}
	scores := s.sp.scores
	copy(scores, logits)
	if mask {
		for _, id := range s.p.Stop {
			if id >= 0 && int(id) < len(scores) {
				scores[id] = float32(math.Inf(-1))
			}
		}
	}
	for _, b := range s.bias {
		if b.id >= 0 && int(b.id) < len(scores) {
			scores[b.id] += b.bias
		}
	}
	repetition := s.p.Repetition
	if repetition == 0 {
		repetition = 1
	}
	for _, t := range s.seen {
		if t.id < 0 || int(t.id) >= len(scores) {
			continue
		}
		v := scores[t.id]
		if v > 0 {
			v /= repetition
		} else {
			v = float32(v * repetition)
		}
		if t.output > 0 {
			v -= float32(s.p.Frequency * float32(t.output))
			v -= s.p.Presence
		}
		scores[t.id] = v
	}
	return scores
}
