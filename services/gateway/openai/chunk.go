package openai

import (
	"encoding/json"
	"strconv"
	"unicode/utf8"
)

// Chunk is what one stream chunk says about one choice.
type Chunk struct {
	Index      int
	Role       bool // chat: the chunk that says "assistant"
	Text       string
	Logprobs   any    // *ChatLogprobs or *TextLogprobs; nil: null
	Finish     string // finish_reason, "": null
	StopReason StopReason
}

// Chunks writes the events of one stream. Chunks are put together by hand: there is one for every token, and all but the
// text is the same each time.
type Chunks struct {
	chat  bool
	head  []byte // up to the choices
	usage bool   // the stream ends with usage, so every chunk before has "usage":null
}

// NewChunks makes the writer of a stream of /v1/chat/completions (chat) or /v1/completions.
func NewChunks(chat bool, id, model string, created int64, usage bool) *Chunks {
	c := &Chunks{chat: chat, usage: usage}
	object := "text_completion"
	if chat {
		object = "chat.completion.chunk"
	}
	c.head = append(c.head, `data: {"id":`...)
	c.head = appendString(c.head, id)
	c.head = append(c.head, `,"object":"`...)
	c.head = append(c.head, object...)
	c.head = append(c.head, `","created":`...)
	c.head = strconv.AppendInt(c.head, created, 10)
	c.head = append(c.head, `,"model":`...)
	c.head = appendString(c.head, model)
	c.head = append(c.head, `,"choices":[`...)
	return c
}

// Append appends the event of one chunk to b.
func (c *Chunks) Append(b []byte, k *Chunk) ([]byte, error) {
	b = append(b, c.head...)
	b = append(b, `{"index":`...)
	b = strconv.AppendInt(b, int64(k.Index), 10)
	switch {
	case !c.chat:
		b = append(b, `,"text":`...)
		b = appendString(b, k.Text)
	case k.Role:
		b = append(b, `,"delta":{"role":"assistant","content":""}`...)
	case k.Text == "" && k.Finish != "":
		b = append(b, `,"delta":{}`...)
	default:
		b = append(b, `,"delta":{"content":`...)
		b = appendString(b, k.Text)
		b = append(b, '}')
	}
	b = append(b, `,"logprobs":`...)
	if k.Logprobs == nil {
		b = append(b, "null"...)
	} else {
		raw, err := json.Marshal(k.Logprobs)
		if err != nil {
			return nil, err
		}
		b = append(b, raw...)
	}
	b = append(b, `,"finish_reason":`...)
	if k.Finish == "" {
		b = append(b, "null"...)
	} else {
		b = appendString(b, k.Finish)
		b = append(b, `,"stop_reason":`...)
		b = k.StopReason.append(b)
	}
	b = append(b, `}]`...)
	if c.usage {
		b = append(b, `,"usage":null`...)
	}
	return append(b, "}\n\n"...), nil
}

// AppendUsage appends the last chunk of a stream whose client asked for usage: no choices, the counts.
func (c *Chunks) AppendUsage(b []byte, u *Usage) ([]byte, error) {
	raw, err := json.Marshal(u)
	if err != nil {
		return nil, err
	}
	b = append(b, c.head...)
	b = append(b, `],"usage":`...)
	b = append(b, raw...)
	return append(b, "}\n\n"...), nil
}

// Done ends a stream that ended well.
const Done = "data: [DONE]\n\n"

// AppendError appends the event that ends a stream that failed: an error object as data, which OpenAI's clients raise.
func AppendError(b []byte, e *Error) []byte {
	b = append(b, "event: error\ndata: "...)
	b = append(b, e.JSON()...)
	return append(b, "\n\n"...)
}

func (s StopReason) append(b []byte) []byte {
	switch {
	case s.Word != "":
		return appendString(b, s.Word)
	case s.IsID:
		return strconv.AppendInt(b, int64(s.ID), 10)
	}
	return append(b, "null"...)
}

// appendString appends s as a JSON string. Bytes that are not UTF-8 become U+FFFD.
func appendString(b []byte, s string) []byte {
	const hex = "0123456789abcdef"
	b = append(b, '"')
	for i := 0; i < len(s); {
		c := s[i]
		if c < utf8.RuneSelf {
			switch {
			case c == '"' || c == '\\':
				b = append(b, '\\', c)
			case c == '\n':
				b = append(b, '\\', 'n')
			case c == '\r':
				b = append(b, '\\', 'r')
			case c == '\t':
				b = append(b, '\\', 't')
			case c < ' ' || c == 0x7f:
				b = append(b, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
			default:
				b = append(b, c)
			}
			i++
			continue
		}
		r, n := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && n == 1:
			b = append(b, "\uFFFD"...)
		case r == '\u2028' || r == '\u2029': // end a line in JavaScript and in some readers of events
			b = append(b, '\\', 'u', '2', '0', '2', hex[r&15])
		default:
			b = append(b, s[i:i+n]...)
		}
		i += n
	}
	return append(b, '"')
}
