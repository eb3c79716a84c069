package composetest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

const golden = root + "/shared/testdata/golden/shapes-vl-moe"

// question is a request with the one answer that it must get.
type question struct {
	name, body, want string
}

// questions are the reference cases with at most two pictures, as streaming requests.
func questions(t *testing.T) []question {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(golden, "cases.json"))
	if err != nil {
		t.Fatal(err)
	}
	var cases []struct {
		Name     string
		Images   []string
		Messages []struct {
			Role    string `json:"role"`
			Content any    `json:"content"`
		}
		Output string `json:"output_text"`
	}
	if err := json.Unmarshal(data, &cases); err != nil {
		t.Fatal(err)
	}
	var all []question
	for _, c := range cases {
		if len(c.Images) > 2 {
			continue
		}
		next := 0
		for _, m := range c.Messages {
			parts, _ := m.Content.([]any)
			for i, p := range parts {
				if p.(map[string]any)["type"] == "image" {
					parts[i] = picture(t, filepath.Join(golden, c.Images[next]))
					next++
				}
			}
		}
		body, err := json.Marshal(map[string]any{"messages": c.Messages, "max_tokens": 320, "stream": true})
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, question{c.Name, string(body), c.Output})
	}
	if len(all) < 5 {
		t.Fatalf("only %d reference cases", len(all))
	}
	return all
}

// picture is a message part with the picture inside.
func picture(t *testing.T, path string) map[string]any {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	url := "data:image/png;base64," + base64.StdEncoding.EncodeToString(data)
	return map[string]any{"type": "image_url", "image_url": map[string]any{"url": url}}
}

// ask sends a streaming request and returns the whole answer.
func (s *stack) ask(ctx context.Context, body string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url+"/v1/chat/completions", strings.NewReader(body))
	if err != nil {
		return "", err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		why, _ := io.ReadAll(resp.Body)
		return "", fmt.Errorf("%s: %s", resp.Status, bytes.TrimSpace(why))
	}
	var answer strings.Builder
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		data, ok := strings.CutPrefix(lines.Text(), "data: ")
		if !ok {
			continue
		}
		if data == "[DONE]" {
			return answer.String(), nil
		}
		var chunk struct {
			Error   json.RawMessage
			Choices []struct {
				Delta struct{ Content string }
			}
		}
		if err := json.Unmarshal([]byte(data), &chunk); err != nil || chunk.Error != nil {
			return answer.String(), fmt.Errorf("in the stream: %s: %w", data, err)
		}
		for _, c := range chunk.Choices {
			answer.WriteString(c.Delta.Content)
		}
	}
	return answer.String(), errors.Join(lines.Err(), errors.New("the stream ended before [DONE]"))
}

// load asks reference questions without a pause, many at once, until it is stopped.
type load struct {
	answered atomic.Int64
	quit     chan struct{}
	wg       sync.WaitGroup

	mu      sync.Mutex
	failed  []string
	slow    []string // answered, but after more than slowAfter
	slowest time.Duration
}

// slowAfter is far above what an answer takes on a busy machine: what takes longer waited for JetStream's AckWait.
const slowAfter = 10 * time.Second

// start begins a load of so many clients. A client's request that has no answer after a minute counts as lost.
func (s *stack) start(t *testing.T, clients int) *load {
	t.Helper()
	all := questions(t)
	l := &load{quit: make(chan struct{})}
	for i := range clients {
		l.wg.Go(func() {
			for n := i; ; n++ {
				select {
				case <-l.quit:
					return
				default:
				}
				q := all[n%len(all)]
				ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
				begin := time.Now()
				got, err := s.ask(ctx, q.body)
				cancel()
				l.mu.Lock()
				took := time.Since(begin)
				l.slowest = max(l.slowest, took)
				if err == nil && took > slowAfter {
					l.slow = append(l.slow, fmt.Sprintf("%s at %s took %.1f s", q.name, begin.Format("15:04:05.000"), took.Seconds()))
				}
				switch {
				case err != nil:
					l.failed = append(l.failed, fmt.Sprintf("%s at %s: %v (so far %q)", q.name, begin.Format("15:04:05.000"), err, got))
				case got != q.want:
					l.failed = append(l.failed, fmt.Sprintf("%s at %s: %q, want %q", q.name, begin.Format("15:04:05.000"), got, q.want))
				}
				l.mu.Unlock()
				l.answered.Add(1)
			}
		})
	}
	return l
}

// more waits until so many further requests have ended.
func (l *load) more(t *testing.T, n int64) {
	t.Helper()
	from := l.answered.Load()
	await(t, fmt.Sprintf("%d more answers", n), 2*time.Minute, func() bool { return l.answered.Load() >= from+n })
}

// stop ends the load, and the test fails for every request that was lost or answered wrongly.
func (l *load) stop(t *testing.T) {
	t.Helper()
	close(l.quit)
	l.wg.Wait()
	t.Logf("%d requests, %d failed, the slowest took %.1f s", l.answered.Load(), len(l.failed), l.slowest.Seconds())
	for _, slow := range l.slow {
		t.Log(slow)
	}
	for i, f := range l.failed {
		if i == 10 {
			t.Errorf("and %d more", len(l.failed)-i)
			break
		}
		t.Error(f)
	}
}
