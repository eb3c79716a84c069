package gateway

import (
	"crypto/rand"
	"encoding/binary"

	"trireme.dev/services/gateway/openai"
	"trireme.dev/shared/wire"
)

// greedyBelow is the temperature below which sampling is greedy (vLLM's _SAMPLING_EPS).
const greedyBelow = 1e-5

// sampling turns a request's parameters into what the stages get. What the request omits comes from
// generation_config.json as in vLLM (vllm/config/model.py, get_diff_sampling_param: temperature, top_p, top_k, min_p,
// repetition_penalty, max_new_tokens), else from the API's neutral defaults (temperature 1, the rest off). Beyond vLLM,
// which does not read do_sample, a file that says do_sample false makes greedy the default.
//
// param is the name of the prompt in the request ("messages" or "prompt"), for errors.
func (m *Model) sampling(p *openai.Params, prompt int, param string) (wire.Sampling, error) {
	g := &m.Generation
	s := wire.Sampling{
		MinTokens:   p.MinTokens,
		Temperature: 1,
		TopP:        1,
		Repetition:  1,
		Presence:    float32(p.Presence),
		Frequency:   float32(p.Frequency),
		Stop:        m.stopIDs(p),
		Logprobs:    p.Logprobs,
	}
	if g.DoSample != nil && !*g.DoSample {
		s.Temperature = 0
	} else {
		first(&s.Temperature, nil, g.Temperature)
	}
	first(&s.Temperature, p.Temperature, nil)
	first(&s.TopP, p.TopP, g.TopP)
	first(&s.MinP, p.MinP, g.MinP)
	first(&s.Repetition, p.Repetition, g.RepetitionPenalty)
	switch {
	case p.TopK != nil:
		s.TopK = *p.TopK
	case g.TopK != nil:
		s.TopK = max(0, *g.TopK)
	}
	if s.Temperature < greedyBelow {
		s.Temperature, s.TopP, s.TopK, s.MinP = 0, 1, 0, 0
	}
	if p.Seed != nil {
		s.Seed = *p.Seed
	} else {
		var random [8]byte
		_, _ = rand.Read(random[:]) // never fails
		s.Seed = binary.LittleEndian.Uint64(random[:])
	}
	for _, id := range p.StopTokenIDs {
		if int(id) >= m.Config.Text.Vocab {
			return s, openai.Invalid("stop_token_ids", "Token id %d is beyond the vocabulary of %d.", id, m.Config.Text.Vocab)
		}
	}
	return s, m.maxTokens(&s, p, prompt, param)
}

// first sets dst to the first value that is there.
func first(dst *float32, values ...*float64) {
	for _, v := range values {
		if v != nil {
			*dst = float32(*v)
			return
		}
	}
}

// maxTokens decides how many tokens a choice may have and checks that they fit the context.
func (m *Model) maxTokens(s *wire.Sampling, p *openai.Params, prompt int, param string) error {
	context := m.Config.Text.Context
	rest := context - prompt
	if rest < 1 {
		return openai.TooLong(param, "The prompt has %d tokens, but the context of this model is %d tokens, "+
			"prompt and answer together.", prompt, context)
	}
	switch {
	case p.MaxTokens != nil && *p.MaxTokens > rest:
		return openai.TooLong("max_tokens", "The prompt of %d tokens and max_tokens of %d exceed this model's context of %d "+
			"tokens.", prompt, *p.MaxTokens, context)
	case p.MaxTokens != nil:
		s.MaxTokens = *p.MaxTokens
	case m.Generation.MaxNewTokens != nil && *m.Generation.MaxNewTokens > 0:
		s.MaxTokens = min(rest, *m.Generation.MaxNewTokens)
	default:
		s.MaxTokens = rest
	}
	if s.MinTokens > s.MaxTokens {
		return openai.Invalid("min_tokens", "min_tokens of %d is above the %d tokens that the answer may have.", s.MinTokens,
			s.MaxTokens)
	}
	return nil
}
