package gateway

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"trireme.dev/services/gateway/admission"
	"trireme.dev/services/gateway/media"
	"trireme.dev/services/gateway/openai"
	"trireme.dev/shared/chat"
	"trireme.dev/shared/token"
	"trireme.dev/shared/wire"
)

// picture is one distinct picture of a request. It does not change once measured.
type picture struct {
	param   string // where it stands first in the request
	url     string // of a data: URL "" once it has been read
	data    []byte // encoded
	content [32]byte
	grid    [3]int
	tokens  int
}

// job is one prompt, ready to be sent to the stages.
type job struct {
	spec     wire.Spec
	pictures []*picture // in the order of spec.Pictures; the same picture may be there more than once
	fetched  []*picture // those that were fetched from elsewhere, by URL, in the order of their first mention
	text     string     // of the prompt, if the answer begins with it
	expected int        // tokens of each choice that credits are taken for
	arrival  *arrival   // what demand knows of it
}

// typicalAnswer is how many tokens an answer is expected to have whose client does not bound it. Credits for all of the
// context would let in a handful of requests where hundreds fit; an answer that gets longer takes more as it grows, and
// when too many do, the youngest wait for the others (room.go).
const typicalAnswer = 1024

// maxFetches is how many pictures of one request are fetched at the same time.
const maxFetches = 8

// chatJob makes the job of a chat request. Its error is an *openai.Error or ctx's.
func (g *Gateway) chatJob(ctx context.Context, c *openai.Chat) (*job, error) {
	m := g.model
	if m.Template == nil {
		return nil, openai.Invalid("model", "This model has no chat template; use /v1/completions.")
	}
	pictures, fetched, err := g.pictures(ctx, c)
	if err != nil {
		return nil, err
	}
	prompt, err := m.render(c)
	if err != nil {
		return nil, err
	}
	ids, err := m.encode(prompt, "messages")
	if err != nil {
		return nil, err
	}
	j := &job{pictures: pictures, fetched: fetched}
	if j.spec.Prompt, j.spec.Pictures, err = m.expand(ids, pictures, "messages"); err != nil {
		return nil, err
	}
	return j, g.finish(j, &c.Params, "messages")
}

// completionJob makes the job of one prompt of a completions request.
func (g *Gateway) completionJob(c *openai.Completion, p *openai.Prompt) (*job, error) {
	m := g.model
	ids := p.IDs
	if ids == nil {
		var err error
		if ids, err = m.encode(p.Text, "prompt"); err != nil {
			return nil, err
		}
	}
	if len(ids) == 0 {
		return nil, openai.Invalid("prompt", "The prompt is empty.")
	}
	for _, id := range ids {
		if int(id) >= m.Config.Text.Vocab {
			return nil, openai.Invalid("prompt", "Token id %d is beyond the vocabulary of %d.", id, m.Config.Text.Vocab)
		}
	}
	j := &job{text: p.Text}
	var err error
	if j.spec.Prompt, _, err = m.expand(ids, nil, "prompt"); err != nil {
		return nil, err
	}
	if c.Echo && p.IDs != nil {
		all := make([]int, len(ids))
		for i, id := range ids {
			all[i] = int(id)
		}
		j.text = m.Tokenizer.Decode(all, c.SkipSpecial)
	}
	return j, g.finish(j, &c.Params, "prompt")
}

// finish fills in what does not depend on the kind of request.
func (g *Gateway) finish(j *job, p *openai.Params, param string) error {
	var err error
	j.spec.Sampling, err = g.model.sampling(p, len(j.spec.Prompt), param)
	j.expected = j.spec.Sampling.MaxTokens
	if p.MaxTokens == nil {
		j.expected = min(j.expected, max(typicalAnswer, p.MinTokens))
	}
	j.spec.Choices = p.N
	j.spec.Model = g.model.Config.Digest
	j.spec.Salt = p.CacheSalt
	return err
}

// need is the device memory that the job is expected to use.
func (g *Gateway) need(j *job) admission.Bytes {
	return admission.Bytes{KV: g.kv(j, j.expected), MM: g.mm(j)}
}

// kv is the device memory for KV and token logs of the job when each choice gets that many tokens, in bytes.
func (g *Gateway) kv(j *job, tokens int) int64 {
	s, prompt := &j.spec, len(j.spec.Prompt)
	return g.model.need(prompt, tokens, s.Choices) + g.model.logs(prompt, s.Sampling.MaxTokens, s.Choices, s.Sampling.Logprobs)
}

// mm is the device memory of the job's pictures, in bytes: each is an object of its own, unless it is cached.
func (g *Gateway) mm(j *job) (bytes int64) {
	for _, p := range j.pictures {
		bytes += g.model.mm(p.tokens)
	}
	return bytes
}

// render runs the chat template.
func (m *Model) render(c *openai.Chat) (string, error) {
	messages := make([]chat.Message, len(c.Messages))
	for i := range c.Messages {
		from, to := &c.Messages[i], &messages[i]
		to.Role = from.Role
		to.ToolCalls = from.Extra["tool_calls"]
		to.Name = plainString(from.Extra["name"])
		to.ToolCallID = plainString(from.Extra["tool_call_id"])
		for _, p := range from.Content {
			part := chat.Part{Type: "text", Text: p.Text}
			if p.URL != "" {
				part = chat.Part{Type: "image"}
			}
			to.Content = append(to.Content, part)
		}
	}
	opts := chat.Options{AddGenerationPrompt: c.AddGenerationPrompt, Tools: c.Tools, BOS: m.bos, EOS: m.eos}
	if c.Kwargs != nil {
		if err := json.Unmarshal(c.Kwargs, &opts.Kwargs); err != nil {
			return "", openai.Invalid("chat_template_kwargs", "chat_template_kwargs cannot be used: %v.", err)
		}
	}
	prompt, err := m.Template.Render(messages, opts)
	switch {
	case errors.Is(err, chat.ErrRaised), errors.Is(err, chat.ErrMessages):
		return "", openai.Invalid("messages", "%v.", err)
	case err != nil:
		return "", openai.Server(http.StatusInternalServerError, "The chat template failed: %v.", err)
	}
	return prompt, nil
}

// plainString is the value of a JSON string, "" for anything else.
func plainString(raw []byte) string {
	var s string
	if raw == nil || json.Unmarshal(raw, &s) != nil {
		return ""
	}
	return s
}

// encode turns a prompt into ids, special tokens in it recognised, as vLLM does: what the template wrote cannot be told
// from what the client did.
func (m *Model) encode(prompt, param string) ([]int32, error) {
	if m.tooLong(prompt) {
		return nil, openai.TooLong(param, "The prompt has %d bytes, which is more than this model's context of %d tokens "+
			"can hold.", len(prompt), m.Config.Text.Context)
	}
	ids, err := m.Tokenizer.Encode(prompt)
	if errors.Is(err, token.ErrNotUTF8) {
		return nil, openai.Invalid(param, "The prompt is not valid UTF-8.")
	}
	if err != nil {
		return nil, openai.Server(http.StatusInternalServerError, "The prompt cannot be cut into tokens: %v.", err)
	}
	out := make([]int32, len(ids))
	for i, id := range ids {
		out[i] = int32(id)
	}
	return out, nil
}

// expand puts as many placeholders for each picture as it has tokens.
func (m *Model) expand(ids []int32, pictures []*picture, param string) ([]int32, []wire.Picture, error) {
	v := m.Config.Vision
	if v == nil {
		return ids, nil, nil
	}
	placeholders, total := 0, len(ids)
	for _, id := range ids {
		if int(id) == v.ImageToken {
			placeholders++
		}
	}
	if placeholders != len(pictures) {
		return nil, nil, openai.Invalid(param, "The prompt has %s for %s; text must not contain the model's picture token.",
			count(placeholders, "picture placeholder"), count(len(pictures), "picture"))
	}
	for _, p := range pictures {
		total += p.tokens - 1
	}
	if len(pictures) == 0 {
		return ids, nil, nil
	}
	if total >= m.Config.Text.Context {
		return nil, nil, openai.TooLong(param, "The prompt has %d tokens with its %d pictures, but the context of this model "+
			"is %d tokens, prompt and answer together.", total, len(pictures), m.Config.Text.Context)
	}
	out := make([]int32, 0, total)
	at := make([]wire.Picture, 0, len(pictures))
	for _, id := range ids {
		if int(id) != v.ImageToken {
			out = append(out, id)
			continue
		}
		p := pictures[len(at)]
		at = append(at, wire.Picture{Offset: len(out), Grid: p.grid, Content: p.content})
		out = append(out, slices.Repeat([]int32{id}, p.tokens)...)
	}
	return out, at, nil
}

// count is a number of things in words, such as "1 picture".
func count(n int, thing string) string {
	if n != 1 {
		thing += "s"
	}
	return fmt.Sprintf("%d %s", n, thing)
}

// pictures gets and measures the pictures of a conversation, in order. The same URL is fetched once, and the same
// content is one picture. fetched are those that came from elsewhere, in the order of their first mention.
func (g *Gateway) pictures(ctx context.Context, c *openai.Chat) (order, fetched []*picture, err error) {
	byURL := make(map[string]*picture)
	for i := range c.Messages {
		for _, part := range c.Messages[i].Content {
			if part.URL == "" {
				continue
			}
			p := byURL[part.URL]
			if p == nil {
				p = &picture{param: part.Param, url: part.URL}
				byURL[part.URL] = p
				if !media.IsData(part.URL) {
					fetched = append(fetched, p)
				}
			}
			order = append(order, p)
		}
	}
	if len(order) == 0 {
		return nil, nil, nil
	}
	if g.model.Measure == nil {
		return nil, nil, openai.Invalid(order[0].param, "This model takes text only.")
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(maxFetches)
	var total atomic.Int64
	for _, p := range byURL {
		group.Go(func() error { return g.picture(ctx, p, &total) })
	}
	if err := group.Wait(); err != nil {
		return nil, nil, err
	}
	byContent := make(map[[32]byte]*picture)
	for i, p := range order {
		if same := byContent[p.content]; same != nil {
			order[i] = same
		}
		byContent[p.content] = order[i]
	}
	return order, fetched, nil
}

// picture gets and measures one picture. total counts the bytes of all pictures of the request.
func (g *Gateway) picture(ctx context.Context, p *picture, total *atomic.Int64) (err error) {
	p.data, err = g.media.Get(ctx, p.url)
	if media.IsData(p.url) {
		p.url = "" // it is as long as the picture
	}
	if err == nil && total.Add(int64(len(p.data))) > g.cfg.MaxBody {
		err = fmt.Errorf("%w: the pictures of one request have more than %d together", media.ErrTooLarge, g.cfg.MaxBody)
	}
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case err != nil:
		e := openai.Invalid(p.param, "%s.", sentence(err))
		e.Code = "invalid_image_url"
		if errors.Is(err, media.ErrTooLarge) {
			e.Code = "image_too_large"
		}
		return e
	}
	if p.grid, p.tokens, err = g.model.Measure(p.data); err != nil {
		e := openai.Invalid(p.param, "The picture cannot be used: %v.", err)
		e.Code = codeBadPicture
		return e
	}
	p.content = sha256.Sum256(p.data)
	return nil
}

// sentence is what an error says, with a capital letter. A way around is told of what only an operator can allow.
func sentence(err error) string {
	s := err.Error()
	if errors.Is(err, media.ErrAddress) {
		s += ": loopback, private and metadata addresses are not, unless the server was started with --allow-media-host"
	}
	return strings.ToUpper(s[:1]) + s[1:]
}
