package openai

import (
	"fmt"
	"math"
)

// Bounds on parameters that OpenAI or vLLM bound as well.
const (
	MaxChoices  = 128 // n (OpenAI)
	MaxLogprobs = 20  // top_logprobs (OpenAI), logprobs of completions (vLLM's --max-logprobs)
	MaxStops    = 64  // stop strings; OpenAI takes 4
	maxStopSize = 1 << 10
	maxStopIDs  = 256
	maxSaltSize = 256
)

// Params are the parameters that both endpoints share. A nil pointer was not given: generation_config.json or the
// default of the API decides.
type Params struct {
	Model string

	MaxTokens   *int // of each choice
	MinTokens   int
	Temperature *float64 // 0 to 2
	TopP        *float64 // above 0, at most 1
	TopK        *int     // 0: off
	MinP        *float64
	Repetition  *float64
	Presence    float64
	Frequency   float64
	Seed        *uint64
	N           int

	Stop         []string
	StopTokenIDs []int32
	IgnoreEOS    bool
	IncludeStop  bool // the stop string stays in the text
	SkipSpecial  bool // special tokens leave no text; true unless asked otherwise

	Logprobs int // alternatives to report for each token, -1: no logprobs

	Priority *int   // lower ones go first (vLLM); nil: that of its class
	Tier     string // service_tier (OpenAI): the name of a class, "": none
	User     string // for whom it is (OpenAI), "": not said

	CacheSalt string // keeps the tenant's cached pictures and prompts apart from others'

	Stream       bool
	IncludeUsage bool
}

// params reads what both endpoints share.
func (o *object) params() Params {
	p := Params{SkipSpecial: o.bool("skip_special_tokens", true), N: 1, Logprobs: -1}
	p.Model, _ = o.string("model")
	p.Temperature = o.float("temperature", 0, 2)
	if p.TopP = o.float("top_p", 0, 1); p.TopP != nil && *p.TopP == 0 {
		o.wrongValue("top_p", "it must be above 0.")
	}
	if k := o.int("top_k", -1, math.MaxInt32); k != nil {
		top := max(0, int(*k))
		p.TopK = &top
	}
	p.MinP = o.float("min_p", 0, 1)
	if p.Repetition = o.float("repetition_penalty", 0, 100); p.Repetition != nil && *p.Repetition == 0 {
		o.wrongValue("repetition_penalty", "it must be above 0.")
	}
	if v := o.float("presence_penalty", -2, 2); v != nil {
		p.Presence = *v
	}
	if v := o.float("frequency_penalty", -2, 2); v != nil {
		p.Frequency = *v
	}
	if v := o.int("seed", math.MinInt64, math.MaxInt64); v != nil {
		seed := uint64(*v)
		p.Seed = &seed
	}
	if v := o.int("n", 1, MaxChoices); v != nil {
		p.N = int(*v)
	}
	for _, name := range []string{"max_tokens", "max_completion_tokens"} { // the newer name wins
		if v := o.int(name, 1, math.MaxInt32); v != nil {
			most := int(*v)
			p.MaxTokens = &most
		}
	}
	if v := o.int("min_tokens", 0, math.MaxInt32); v != nil {
		p.MinTokens = int(*v)
		if p.MaxTokens != nil && p.MinTokens > *p.MaxTokens {
			o.wrongValue("min_tokens", "%d is above max_tokens of %d.", p.MinTokens, *p.MaxTokens)
		}
	}
	if salt, ok := o.string("cache_salt"); ok {
		if salt == "" || len(salt) > maxSaltSize {
			o.wrongValue("cache_salt", "it must have 1 to %d bytes.", maxSaltSize)
		}
		p.CacheSalt = salt
	}
	if v := o.int("priority", math.MinInt32, math.MaxInt32); v != nil {
		priority := int(*v)
		p.Priority = &priority
	}
	p.Tier, _ = o.string("service_tier")
	p.User, _ = o.string("user")
	p.IgnoreEOS = o.bool("ignore_eos", false)
	p.IncludeStop = o.bool("include_stop_str_in_output", false)
	o.stop(&p)
	p.Stream = o.bool("stream", false)
	if _, ok := o.get("stream_options"); ok && !p.Stream {
		o.fail(Invalid("stream_options", "'stream_options' is only allowed when 'stream' is true."))
	}
	if s := o.within("stream_options"); s != nil {
		p.IncludeUsage = s.bool("include_usage", false)
		if s.err != nil {
			o.fail(s.err)
		}
	}
	o.refuse()
	return p
}

// stop reads stop and stop_token_ids.
func (o *object) stop(p *Params) {
	if raw, ok := o.get("stop"); ok {
		switch raw[0] {
		case '"':
			p.Stop = []string{text(raw)}
		case '[':
			for i, e := range elements(raw) {
				if e[0] != '"' {
					o.wrongType(fmt.Sprintf("stop[%d]", i), "a string", e)
					return
				}
				p.Stop = append(p.Stop, text(e))
			}
		default:
			o.wrongType("stop", "a string or an array of strings", raw)
		}
	}
	if len(p.Stop) > MaxStops {
		o.wrongValue("stop", "at most %d stop strings are allowed, there are %d.", MaxStops, len(p.Stop))
	}
	for _, s := range p.Stop {
		switch {
		case s == "":
			o.wrongValue("stop", "a stop string must not be empty.")
		case len(s) > maxStopSize:
			o.wrongValue("stop", "a stop string may have at most %d bytes.", maxStopSize)
		}
	}
	if raw, ok := o.get("stop_token_ids"); ok {
		if raw[0] != '[' {
			o.wrongType("stop_token_ids", "an array of token ids", raw)
			return
		}
		p.StopTokenIDs = o.ids("stop_token_ids", raw)
		if len(p.StopTokenIDs) > maxStopIDs {
			o.wrongValue("stop_token_ids", "at most %d ids are allowed, there are %d.", maxStopIDs, len(p.StopTokenIDs))
		}
	}
}

// refused are members that would change the answer and are not supported, with the values that change nothing.
var refused = map[string][]string{
	"logit_bias":         {"{}"},
	"best_of":            {"1"},
	"suffix":             {`""`},
	"use_beam_search":    {"false"},
	"prompt_logprobs":    {},
	"response_format":    {`{"type":"text"}`},
	"guided_json":        {},
	"guided_regex":       {},
	"guided_choice":      {},
	"guided_grammar":     {},
	"structured_outputs": {},
	"chat_template":      {},
	"functions":          {"[]"},
	"function_call":      {`"none"`, `"auto"`},
	"audio":              {},
	"logits_processors":  {"[]"},
	"allowed_token_ids":  {},
	"bad_words":          {"[]"},
}

// refuse reports members that are not supported.
func (o *object) refuse() {
	for name, raw := range o.values {
		harmless, known := refused[name]
		if !known || raw[0] == 'n' {
			continue
		}
		fine := false
		for _, h := range harmless {
			fine = fine || compact(raw) == h
		}
		if !fine {
			e := Invalid(name, "'%s' is not supported by this server.", name)
			e.Code = "unsupported_parameter"
			o.fail(e)
		}
	}
	if raw, ok := o.get("modalities"); ok && compact(raw) != `["text"]` {
		o.fail(Invalid("modalities", "This server answers with text only."))
	}
}
