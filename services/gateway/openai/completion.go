package openai

import "fmt"

// MaxPrompts is the most prompts of one request to /v1/completions.
const MaxPrompts = 256

// Completion is a request to /v1/completions.
type Completion struct {
	Params
	Prompts []Prompt
	Echo    bool // the answer begins with the prompt
}

// Prompt is text or token ids.
type Prompt struct {
	Text string
	IDs  []int32 // not nil: used instead of Text
}

// DecodeCompletion reads and checks a body. Its error is always an *Error.
func DecodeCompletion(body []byte) (*Completion, error) {
	o, e := parse(body)
	if e != nil {
		return nil, e
	}
	c := &Completion{Params: o.params(), Echo: o.bool("echo", false)}
	if v := o.int("logprobs", 0, MaxLogprobs); v != nil {
		c.Logprobs = int(*v)
	}
	if c.Echo && c.Logprobs >= 0 {
		o.fail(Invalid("echo", "'echo' together with 'logprobs' is not supported: prompts have no log probabilities here."))
	}
	c.Prompts = o.prompts()
	if len(c.Prompts) > MaxPrompts {
		o.wrongValue("prompt", "at most %d prompts are allowed, there are %d.", MaxPrompts, len(c.Prompts))
	}
	if o.err != nil {
		return nil, o.err
	}
	return c, nil
}

// prompts reads prompt: a text, token ids, a list of texts or a list of lists of token ids.
func (o *object) prompts() []Prompt {
	raw, ok := o.get("prompt")
	switch {
	case !ok:
		o.fail(Invalid("prompt", "'prompt' is required."))
		return nil
	case raw[0] == '"':
		return []Prompt{{Text: text(raw)}}
	case raw[0] != '[':
		o.wrongType("prompt", "a string, an array of strings, an array of token ids or an array of such arrays", raw)
		return nil
	}
	var out []Prompt
	for i, e := range elements(raw) {
		name := fmt.Sprintf("prompt[%d]", i)
		if first := out; len(first) > 0 && (first[0].IDs != nil) != (e[0] == '[') {
			o.wrongType(name, "the same as the first element", e)
			return nil
		}
		switch {
		case e[0] == '"':
			out = append(out, Prompt{Text: text(e)})
		case e[0] == '[':
			out = append(out, Prompt{IDs: o.ids(name, e)})
		case i == 0 && kind(e) == "a number":
			return []Prompt{{IDs: o.ids("prompt", raw)}}
		default:
			o.wrongType(name, "a string or an array of token ids", e)
			return nil
		}
	}
	if len(out) == 0 {
		o.wrongValue("prompt", "it must not be empty.")
	}
	return out
}
