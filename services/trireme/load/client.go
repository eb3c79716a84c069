package load

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"net/http"
	"strings"
	"time"
)

// Sample is what one client saw.
type Sample struct {
	Number int // of the request: with the same seed and shape it is the same one in each run
	Sent   time.Time
	Late   time.Duration   // that the request was sent after its time: the load generator had no time, or too many were open
	TTFT   time.Duration   // from sending to the first piece of the answer
	E2EL   time.Duration   // from sending to the end of the stream
	ITLs   []time.Duration // between pieces of the answer
	Last   time.Duration   // from sending to the last piece
	Input  int             // tokens, by the server's usage
	Output int             // tokens, by the server's usage, or pieces when it tells none
	Cached int             // tokens of the input that the server did not compute, by its usage
	Err    error           // why there is no whole answer
	Status int             // HTTP status; 0: none came
	Finish string          // finish_reason
	Said   uint64          // of what was said: equal answers have equal ones (FNV-1a)
	Pieces []time.Time     // when the pieces of the answer came
}

// TPOT is the time for each token after the first: (E2EL - TTFT) / (output - 1), as vllm bench serve has it.
func (s *Sample) TPOT() (time.Duration, bool) {
	if s.Output < 2 {
		return 0, false
	}
	return (s.E2EL - s.TTFT) / time.Duration(s.Output-1), true
}

// ErrEmpty is the error of a request that was answered without a single piece of text.
var ErrEmpty = errors.New("the answer is empty")

// client sends requests.
type client struct {
	http    *http.Client
	url     string
	header  http.Header
	timeout time.Duration
}

func newClient(cfg *Config) *client {
	h := http.Header{"Content-Type": {"application/json"}, "Accept": {"text/event-stream"}}
	if cfg.Key != "" {
		h.Set("Authorization", "Bearer "+cfg.Key)
	}
	for k, v := range cfg.Header {
		h.Set(k, v)
	}
	return &client{
		http: &http.Client{Transport: transport()}, url: Base(cfg.URL) + "/v1/chat/completions",
		header: h, timeout: cfg.Timeout,
	}
}

func (c *client) close() { c.http.CloseIdleConnections() }

// ask sends one request and reads its stream.
func (c *client) ask(ctx context.Context, body []byte) Sample {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	s := Sample{Sent: time.Now()}
	s.Err = c.stream(ctx, body, &s)
	s.E2EL = time.Since(s.Sent)
	if s.Err == nil && len(s.Pieces) == 0 {
		s.Err = ErrEmpty
	}
	if n := len(s.Pieces); n > 0 {
		s.TTFT, s.Last = s.Pieces[0].Sub(s.Sent), s.Pieces[n-1].Sub(s.Sent)
		for i := 1; i < n; i++ {
			s.ITLs = append(s.ITLs, s.Pieces[i].Sub(s.Pieces[i-1]))
		}
		if s.Output == 0 {
			s.Output = n
		}
	}
	return s
}

func (c *client) stream(ctx context.Context, body []byte, s *Sample) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header = c.header
	resp, err := c.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if s.Status = resp.StatusCode; s.Status != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
		return refusal(s.Status, text)
	}
	return readEvents(resp.Body, s)
}

// refusal is the server's error object as an error.
func refusal(status int, text []byte) error {
	var e struct {
		Error struct{ Message string }
	}
	if json.Unmarshal(text, &e) == nil && e.Error.Message != "" {
		return fmt.Errorf("%d: %s", status, e.Error.Message)
	}
	return fmt.Errorf("%d: %.200q", status, text)
}

// chunk is what is read of an event.
type chunk struct {
	Choices []struct {
		Delta struct {
			Content   string
			Reasoning string `json:"reasoning_content"`
		}
		Finish string `json:"finish_reason"`
	}
	Usage *struct {
		Prompt     int `json:"prompt_tokens"`
		Completion int `json:"completion_tokens"`
		Details    *struct {
			Cached int `json:"cached_tokens"`
		} `json:"prompt_tokens_details"`
	}
	Error *struct{ Message string }
}

var done = []byte("[DONE]")

// readEvents reads a stream of server-sent events to its [DONE].
func readEvents(r io.Reader, s *Sample) error {
	lines := bufio.NewReaderSize(r, 16<<10)
	said := fnv.New64a()
	var long []byte
	for {
		line, more, err := lines.ReadLine()
		if err == io.EOF {
			return errors.New("the stream ended without [DONE]")
		}
		if err != nil {
			return err
		}
		if more || len(long) > 0 {
			long = append(long, line...)
			if more {
				continue
			}
			line, long = long, nil
		}
		data, ok := bytes.CutPrefix(line, []byte("data:"))
		if !ok {
			continue // the end of an event, or a comment that keeps the connection alive
		}
		if data = bytes.TrimSpace(data); bytes.Equal(data, done) {
			return nil
		}
		now := time.Now()
		var c chunk
		if err := json.Unmarshal(data, &c); err != nil {
			return fmt.Errorf("an event that is no JSON, %.80q: %w", data, err)
		}
		if c.Error != nil {
			return errors.New(c.Error.Message)
		}
		if u := c.Usage; u != nil {
			s.Input, s.Output = u.Prompt, u.Completion
			if u.Details != nil {
				s.Cached = u.Details.Cached
			}
		}
		for i := range c.Choices {
			ch := &c.Choices[i]
			if ch.Delta.Content != "" || ch.Delta.Reasoning != "" {
				s.Pieces = append(s.Pieces, now)
				_, _ = io.WriteString(said, ch.Delta.Content) // a hash takes everything
				_, _ = io.WriteString(said, ch.Delta.Reasoning)
				s.Said = said.Sum64()
			}
			if ch.Finish != "" {
				s.Finish = ch.Finish
			}
		}
	}
}

// Base is the URL of a server as it is, or with the /v1 behind it that OpenAI's clients want: without that.
func Base(url string) string {
	return strings.TrimSuffix(strings.TrimSuffix(strings.TrimSuffix(url, "/"), "/v1"), "/")
}
