package gateway

import (
	"net/http"
	"sync"

	"trireme.dev/services/gateway/openai"
	"trireme.dev/services/gateway/request"
)

// stream is a response of server-sent events. Nothing is written, not even a header, before the first piece.
type stream struct {
	q      *query
	writer writer
	chunks *openai.Chunks
	chat   bool

	mu      sync.Mutex // jobs of one request stream at the same time
	buf     []byte
	begun   bool
	ended   bool
	started []bool // by index: the first chunk is out
}

func newStream(q *query, w http.ResponseWriter, chat bool, id string) *stream {
	return &stream{
		q: q, writer: newWriter(w, q.g.cfg.WriteWait), chat: chat,
		chunks:  openai.NewChunks(chat, id, q.g.name, q.began.Unix(), q.params.IncludeUsage),
		started: make([]bool, len(q.jobs)*q.params.N),
	}
}

func (s *stream) output(j *job, first int) output {
	return &streamOutput{stream: s, job: j, first: first, offsets: make([]int, s.q.params.N)}
}

// streamOutput is one job's part of a stream.
type streamOutput struct {
	*stream
	job     *job
	first   int
	offsets []int // by choice: characters of tokens reported with logprobs
}

func (o *streamOutput) piece(p *request.Piece) error {
	k := openai.Chunk{Index: o.first + p.Choice, Text: p.Text, Finish: p.Reason.String(), StopReason: o.q.stopReason(p)}
	k.Logprobs = o.q.logprobs(o.chat, p.Tokens, &o.offsets[p.Choice])
	o.mu.Lock()
	defer o.mu.Unlock()
	var err error
	if !o.started[k.Index] {
		o.started[k.Index] = true
		if o.chat {
			if o.buf, err = o.chunks.Append(o.buf, &openai.Chunk{Index: k.Index, Role: true}); err != nil {
				return err
			}
		} else if o.q.echo {
			k.Text = o.job.text + k.Text
		}
	}
	o.buf, err = o.chunks.Append(o.buf, &k)
	if k.Finish != "" {
		o.q.g.metrics.finished.WithLabelValues(k.Finish).Inc()
	}
	return err
}

func (s *stream) flush() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.send()
}

// send writes what is buffered. The caller holds mu.
func (s *stream) send() error {
	if len(s.buf) == 0 || s.ended {
		return nil
	}
	if !s.begun {
		s.begun = true
		h := s.writer.w.Header()
		h.Set("Content-Type", "text/event-stream; charset=utf-8")
		h.Set("Cache-Control", "no-cache")
		h.Set("X-Accel-Buffering", "no") // nginx would hold events back
		s.writer.w.WriteHeader(http.StatusOK)
	}
	err := s.writer.write(s.buf)
	s.buf = s.buf[:0]
	return err
}

func (s *stream) finish(usage *openai.Usage) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.q.params.IncludeUsage {
		var err error
		if s.buf, err = s.chunks.AppendUsage(s.buf, usage); err != nil {
			return err
		}
	}
	s.buf = append(s.buf, openai.Done...)
	return s.send()
}

func (s *stream) fail(e *openai.Error) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.begun || s.ended {
		return s.begun
	}
	s.buf = openai.AppendError(s.buf, e)
	_ = s.send() // who does not read it is gone
	s.ended = true
	return true
}

// stopReason is what ended a choice, for clients that want to know which of several.
func (q *query) stopReason(p *request.Piece) openai.StopReason {
	if p.StopID < 0 {
		return openai.StopReason{Word: p.Word}
	}
	for _, id := range q.params.StopTokenIDs {
		if id == p.StopID {
			return openai.StopReason{ID: id, IsID: true}
		}
	}
	return openai.StopReason{}
}

// logprobs shapes the log probabilities of tokens; nil when none were asked for. offset is the number of characters of
// the tokens before, and is moved on.
func (q *query) logprobs(chat bool, tokens []request.Token, offset *int) any {
	if q.params.Logprobs < 0 {
		return nil
	}
	if chat {
		out := &openai.ChatLogprobs{Content: []openai.ChatLogprob{}}
		q.eachLogprob(tokens, func(t *openai.TokenLogprob) { out.Append(q.g.model.Tokenizer, t) })
		return out
	}
	out := new(openai.TextLogprobs)
	q.eachLogprob(tokens, func(t *openai.TokenLogprob) { *offset = out.Append(q.g.model.Tokenizer, t, *offset) })
	return out
}

func (q *query) eachLogprob(tokens []request.Token, f func(*openai.TokenLogprob)) {
	for i := range tokens {
		t := openai.TokenLogprob{ID: tokens[i].ID}
		if l := tokens[i].Logprob; l != nil {
			n := min(len(l.IDs), len(l.Top), q.params.Logprobs)
			t.Logprob, t.TopIDs, t.Top = l.Own, l.IDs[:n], l.Top[:n]
		}
		f(&t)
	}
}
