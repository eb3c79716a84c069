package benchcmd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

// streamer opens streams and notes when their events come, with as little work for each as can be: it shares the cores with
// what it measures.
type streamer struct {
	http *http.Client
	url  string
}

func newStreamer(url string) *streamer {
	return &streamer{url: url + "/v1/chat/completions", http: &http.Client{Transport: &http.Transport{
		DialContext: (&net.Dialer{Timeout: 10 * time.Second}).DialContext, MaxIdleConnsPerHost: 4096, MaxIdleConns: 4096,
		DisableCompression: true, ReadBufferSize: 4 << 10,
	}}}
}

// streamed is one answer as it came.
type streamed struct {
	id     string  // of the request
	sent   int64   // Unix time in nanoseconds
	tokens []int64 // when each came
}

var (
	eventEnd  = []byte("\n\n")
	idBefore  = []byte(`"id":"chatcmpl-`)
	textField = []byte(`"delta":{"content":"`)
	doneEvent = []byte("data: [DONE]")
)

// ask sends a request and reads its stream to the end; first is called when the first token came.
func (c *streamer) ask(ctx context.Context, body []byte, tokens int, first func()) (*streamed, error) {
	s := &streamed{sent: time.Now().UnixNano(), tokens: make([]int64, 0, tokens)}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		return nil, fmt.Errorf("status %d: %s", resp.StatusCode, text)
	}
	buf := make([]byte, 4<<10)
	have := 0
	ended := false
	for {
		n, err := resp.Body.Read(buf[have:])
		now := time.Now().UnixNano()
		have += n
		rest := buf[:have]
		for {
			event, after, whole := bytes.Cut(rest, eventEnd)
			if !whole {
				break
			}
			rest = after
			ended = ended || bytes.Equal(event, doneEvent)
			if s.id == "" {
				if _, id, ok := bytes.Cut(event, idBefore); ok {
					id, _, _ = bytes.Cut(id, []byte(`"`))
					s.id = string(id)
				}
			}
			if at := bytes.Index(event, textField); at >= 0 && event[at+len(textField)] != '"' {
				if s.tokens = append(s.tokens, now); len(s.tokens) == 1 && first != nil {
					first()
				}
			}
		}
		have = copy(buf, rest)
		switch {
		case errors.Is(err, io.EOF) && ended && len(s.tokens) == tokens:
			return s, nil
		case errors.Is(err, io.EOF):
			return nil, fmt.Errorf("a stream of %d tokens ended after %d, whole: %v", tokens, len(s.tokens), ended)
		case err != nil:
			return nil, err
		case have == len(buf):
			return nil, errors.New("an event is too long")
		}
	}
}
