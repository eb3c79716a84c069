// Package sample chooses the next token from logits: penalties, temperature, truncation, the random draw and the
// logprobs that are reported. It is pure and deterministic: a choice depends on the logits, the parameters, the prompt
// and the tokens so far, on no clock, thread or processor type, so a sampler can be rebuilt from the token log by any
// process and goes on bit for bit. It does not detokenise, match stop strings or end an answer.
//
// The semantics are vLLM's (v1/sample/sampler.py, ops/penalties.py, ops/topk_topp_sampler.py, logits_processor): first
// the reported logprobs are taken from the raw logits; then stop tokens are masked until MinTokens, biases added, the
// repetition, frequency and presence penalties applied; then the temperature, min-p, top-k and top-p in this order.
// vLLM draws with exponential noise from PyTorch's generator; here the draw is the inverse of the cumulative
// distribution in the order of token ids at Uniform(seed, choice, index).
package sample

// GreedyBelow is the temperature under which the most likely token is taken (_SAMPLING_EPS in vLLM).
const GreedyBelow = 1e-5

// Params are the sampling parameters of one choice of a request. They are assumed to be in the ranges given here;
// whoever takes requests in checks that. The zero value is greedy and reports the logprob of the chosen token.
type Params struct {
	Temperature float32 // at least 0; under GreedyBelow: the token of the largest logit, the lowest id among equals
	TopK        int     // only the k largest, and what equals the k-th; 0 and less: all
	TopP        float32 // only the most likely that reach this probability together, in (0, 1]; 0 and 1: all
	MinP        float32 // only those at least this times as likely as the most likely, in [0, 1]; 0: all

	Seed   uint64 // of the request; fixed before the first token is sampled
	Choice uint32 // which of the request's n answers; draws of different choices are independent

	Presence   float32           // subtracted once from the logit of every token in the output
	Frequency  float32           // subtracted for each time a token is in the output
	Repetition float32           // divides positive logits, multiplies negative ones, of tokens in prompt or output; 0 and 1: none
	Bias       map[int32]float32 // added to logits (OpenAI's logit_bias); ids outside the vocabulary are ignored

	MinTokens int     // tokens before any of Stop may be chosen
	Stop      []int32 // end-of-sequence and stop ids; masked until MinTokens, else no different from others

	TopLogprobs int // the n most likely tokens are reported; 0: the chosen one's logprob only; negative: no logprobs
}

// penalised says whether logits depend on the tokens seen.
func (p *Params) penalised() bool {
	return p.Presence != 0 || p.Frequency != 0 || (p.Repetition != 0 && p.Repetition != 1)
}

// TokenLogprob is a token with the natural logarithm of its probability, from the raw logits.
type TokenLogprob struct {
	Token   int32
	Logprob float32
}
