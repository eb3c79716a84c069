package openai

import (
	"bytes"
	"encoding/json"
	"fmt"
)

// Chat is a request to /v1/chat/completions.
type Chat struct {
	Params
	Messages            []Message
	Tools               []byte // JSON array for the template, nil: none
	Kwargs              []byte // JSON object: chat_template_kwargs, nil: none
	AddGenerationPrompt bool   // the template opens the assistant's turn; true unless asked otherwise
}

// Message is one turn of a conversation.
type Message struct {
	Role    string // system, user, assistant or tool; developer counts as system
	Content []Part
	Extra   map[string][]byte // JSON of other members for the template: name, tool_calls, tool_call_id
}

// Part is one part of a message: text, or a picture by URL.
type Part struct {
	Text  string
	URL   string // data:, http: or https:; "" for text
	Param string // name of the URL in the request, for errors
}

// DecodeChat reads and checks a body. Its error is always an *Error.
func DecodeChat(body []byte) (*Chat, error) {
	o, e := parse(body)
	if e != nil {
		return nil, e
	}
	c := &Chat{Params: o.params(), AddGenerationPrompt: o.bool("add_generation_prompt", true)}
	if o.bool("logprobs", false) {
		c.Logprobs = 0
	}
	if v := o.int("top_logprobs", 0, MaxLogprobs); v != nil && *v > 0 {
		if c.Logprobs < 0 {
			o.fail(Invalid("top_logprobs", "'top_logprobs' needs 'logprobs' to be true."))
		}
		c.Logprobs = int(*v)
	}
	o.tools(c)
	if raw, ok := o.get("chat_template_kwargs"); ok {
		if raw[0] != '{' {
			o.wrongType("chat_template_kwargs", "an object", raw)
		}
		c.Kwargs = raw
	}
	switch raw, ok := o.get("messages"); {
	case !ok:
		o.fail(Invalid("messages", "'messages' is required."))
	case raw[0] != '[':
		o.wrongType("messages", "an array of messages", raw)
	default:
		for i, m := range elements(raw) {
			c.Messages = append(c.Messages, o.message(fmt.Sprintf("messages[%d]", i), m))
		}
		if len(c.Messages) == 0 {
			o.wrongValue("messages", "there must be at least one message.")
		}
	}
	if o.err != nil {
		return nil, o.err
	}
	return c, nil
}

// tools reads tools and tool_choice. Which tool is called, if any, is the model's choice alone.
func (o *object) tools(c *Chat) {
	if raw, ok := o.get("tools"); ok {
		if raw[0] != '[' {
			o.wrongType("tools", "an array", raw)
			return
		}
		for i, t := range elements(raw) {
			if t[0] != '{' {
				o.wrongType(fmt.Sprintf("tools[%d]", i), "an object", t)
				return
			}
			c.Tools = raw
		}
	}
	raw, ok := o.get("tool_choice")
	switch {
	case !ok || compact(raw) == `"auto"`:
	case compact(raw) == `"none"`:
		c.Tools = nil
	default:
		o.fail(Invalid("tool_choice", "'tool_choice' can only be \"auto\" or \"none\" here."))
	}
}

// message reads one message.
func (o *object) message(path string, raw []byte) Message {
	if raw[0] != '{' {
		o.wrongType(path, "an object", raw)
		return Message{}
	}
	m := newObject(path, raw)
	var out Message
	role, ok := m.string("role")
	switch role {
	case "system", "user", "assistant", "tool":
		out.Role = role
	case "developer":
		out.Role = "system"
	default:
		if ok {
			m.wrongValue("role", "%q is not a role; roles are system, developer, user, assistant and tool.", role)
		} else {
			m.fail(Invalid(m.param("role"), "'%s' is required.", m.param("role")))
		}
	}
	for _, name := range []string{"name", "tool_calls", "tool_call_id"} {
		if raw, ok := m.get(name); ok {
			if out.Extra == nil {
				out.Extra = make(map[string][]byte)
			}
			out.Extra[name] = raw
		}
	}
	content, ok := m.get("content")
	switch {
	case !ok && role != "assistant":
		m.fail(Invalid(m.param("content"), "'%s' is required.", m.param("content")))
	case !ok:
	case content[0] == '"':
		out.Content = []Part{{Text: text(content)}}
	case content[0] == '[':
		for i, p := range elements(content) {
			out.Content = append(out.Content, m.part(fmt.Sprintf("%s[%d]", m.param("content"), i), p))
		}
	default:
		m.wrongType(m.param("content"), "a string or an array of parts", content)
	}
	if m.err != nil {
		o.fail(m.err)
	}
	return out
}

// part reads one part of a message's content.
func (o *object) part(path string, raw []byte) Part {
	if raw[0] != '{' {
		o.wrongType(path, "an object", raw)
		return Part{}
	}
	p := newObject(path, raw)
	out := Part{}
	switch typ, ok := p.string("type"); {
	case typ == "text":
		if out.Text, ok = p.string("text"); !ok {
			p.fail(Invalid(p.param("text"), "'%s' is required.", p.param("text")))
		}
	case typ == "image_url":
		out = p.picture()
	case ok:
		p.wrongValue("type", "parts of type %q are not supported; types are text and image_url.", typ)
	default:
		p.fail(Invalid(p.param("type"), "'%s' is required.", p.param("type")))
	}
	if p.err != nil {
		o.fail(p.err)
	}
	return out
}

// picture reads image_url: {"url": ...}, or the URL alone as vLLM takes it.
func (o *object) picture() Part {
	raw, _ := o.get("image_url")
	if raw != nil && raw[0] == '"' {
		return o.url(text(raw), o.param("image_url"))
	}
	image := o.within("image_url")
	if image == nil {
		o.fail(Invalid(o.param("image_url"), "'%s' is required.", o.param("image_url")))
		return Part{}
	}
	url, ok := image.string("url")
	if !ok {
		image.fail(Invalid(image.param("url"), "'%s' is required.", image.param("url")))
	}
	if image.err != nil {
		o.fail(image.err)
		return Part{}
	}
	return o.url(url, image.param("url"))
}

func (o *object) url(url, param string) Part {
	if url == "" {
		o.fail(Invalid(param, "'%s' is empty.", param))
	}
	return Part{URL: url, Param: param}
}

// compact is JSON without white space.
func compact(raw []byte) string {
	var b bytes.Buffer
	if err := json.Compact(&b, raw); err != nil {
		panic("BUG: valid JSON does not compact: " + err.Error())
	}
	return b.String()
}
