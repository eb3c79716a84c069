package gateway

import (
	"net/http"
	"strings"

	"trireme.dev/services/gateway/openai"
	"trireme.dev/services/gateway/request"
)

// collected is a response in one piece.
type collected struct {
	q       *query
	writer  writer
	chat    bool
	id      string
	choices []collectedChoice // by index; each is touched by its job's goroutine alone
}

type collectedChoice struct {
	text   strings.Builder
	chat   *openai.ChatLogprobs
	plain  *openai.TextLogprobs
	offset int
	finish string
	reason openai.StopReason
}

func newCollected(q *query, w http.ResponseWriter, chat bool, id string) *collected {
	c := &collected{
		q: q, writer: newWriter(w, q.g.cfg.WriteWait), chat: chat, id: id,
		choices: make([]collectedChoice, len(q.jobs)*q.params.N),
	}
	if q.params.Logprobs >= 0 {
		for i := range c.choices {
			c.choices[i].chat = &openai.ChatLogprobs{Content: []openai.ChatLogprob{}}
			c.choices[i].plain = new(openai.TextLogprobs)
		}
	}
	return c
}

func (c *collected) output(j *job, first int) output {
	if c.q.echo {
		for i := range c.q.params.N {
			c.choices[first+i].text.WriteString(j.text)
		}
	}
	return &collectedOutput{collected: c, first: first}
}

// collectedOutput is one job's part of a response.
type collectedOutput struct {
	*collected
	first int
}

func (o *collectedOutput) piece(p *request.Piece) error {
	c := &o.choices[o.first+p.Choice]
	c.text.WriteString(p.Text)
	if c.chat != nil {
		o.q.eachLogprob(p.Tokens, func(t *openai.TokenLogprob) {
			if o.chat {
				c.chat.Append(o.q.g.model.Tokenizer, t)
			} else {
				c.offset = c.plain.Append(o.q.g.model.Tokenizer, t, c.offset)
			}
		})
	}
	if p.Reason != request.ReasonNone {
		c.finish, c.reason = p.Reason.String(), o.q.stopReason(p)
		o.q.g.metrics.finished.WithLabelValues(c.finish).Inc()
	}
	return nil
}

func (c *collected) flush() error { return nil }

func (c *collected) finish(usage *openai.Usage) error {
	var v any
	if c.chat {
		out := &openai.ChatCompletion{ID: c.id, Object: "chat.completion", Created: c.q.began.Unix(), Model: c.q.g.name, Usage: *usage}
		for i := range c.choices {
			k := &c.choices[i]
			out.Choices = append(out.Choices, openai.ChatChoice{
				Index: i, Message: openai.ChatMessage{Role: "assistant", Content: k.text.String()}, Logprobs: k.chat,
				FinishReason: k.finish, StopReason: k.reason,
			})
		}
		v = out
	} else {
		out := &openai.TextCompletion{ID: c.id, Object: "text_completion", Created: c.q.began.Unix(), Model: c.q.g.name, Usage: *usage}
		for i := range c.choices {
			k := &c.choices[i]
			out.Choices = append(out.Choices, openai.TextChoice{
				Index: i, Text: k.text.String(), Logprobs: k.plain, FinishReason: k.finish, StopReason: k.reason,
			})
		}
		v = out
	}
	body, err := openai.Encode(v)
	if err != nil {
		return err
	}
	c.writer.w.Header().Set("Content-Type", "application/json")
	c.writer.w.WriteHeader(http.StatusOK)
	return c.writer.write(body)
}

func (c *collected) fail(*openai.Error) bool { return false }
