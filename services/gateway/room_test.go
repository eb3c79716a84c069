package gateway_test

import (
	"context"
	"encoding/json"
	"fmt"
	"image/color"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/openai/openai-go/v3"

	"trireme.dev/services/gateway"
	"trireme.dev/shared/wire"
)

// noRoom says that an attempt has given up its memory.
func (s *stages) noRoom(q question) {
	_ = s.bus.Send(wire.SubjectLost(q.Gateway), &wire.Lost{Request: q.ID, Attempt: q.Attempt, Why: "full", NoRoom: true})
}

// told is the newest attempt of a request that the HMM was told of.
func (s *stages) told(request string) int {
	s.memory.mu.Lock()
	defer s.memory.mu.Unlock()
	return s.memory.newest[request]
}

// An attempt that finds no room is no failure, however often it happens: the answer goes on where it stood.
func TestNoRoomIsNoFailure(t *testing.T) {
	const text = "an answer that makes place for others again and again and is whole nevertheless"
	const times = 5 // more than the attempts that a request has
	f := start(t, func(_ *gateway.Config, s *stages) {
		s.answer = func(question) []int32 { return append(s.ids(text), eos) }
		s.decode = func(_ *wire.Decode, q question) bool {
			if q.Attempt > 1 && s.told(q.ID) != q.Attempt {
				t.Errorf("attempt %d has begun, and the HMM was told of %d", q.Attempt, s.told(q.ID))
			}
			if q.Attempt > times {
				return false
			}
			ids, at := s.all(q), 1
			if q.Spec.Resume != nil {
				at += len(q.Spec.Resume[0])
			}
			s.send(q.Gateway, s.run(q, ids, at, at+2))
			s.confirmed(context.Background(), q, ids, at+2)
			s.noRoom(q)
			s.noRoom(q) // twice is once
			return true
		}
	})
	if got, err := f.chat(openai.ChatCompletionNewParams{}); err != nil || got != text {
		t.Fatalf("%q %v", got, err)
	}
	f.settled()
	if len(f.asked) != times+1 {
		t.Errorf("%d attempts", len(f.asked))
	}
	if got := f.metric("trireme_request_yields_total"); got != fmt.Sprint(times) {
		t.Errorf("%s yields counted", got)
	}
}

// One that found no room lets go of its memory at once and begins again when all that it may need is free.
func TestNoRoomWaitsForAllOfIt(t *testing.T) {
	done := make(chan struct{})
	f := start(t, func(_ *gateway.Config, s *stages) {
		s.memory.capacity = 30 << 20 // a full context of 8192 tokens takes 24 MiB, 2000 tokens 6
		s.decode = func(_ *wire.Decode, q question) bool {
			switch {
			case strings.Contains(q.Text, "short"):
				<-done
			case q.Attempt == 1:
				s.noRoom(q)
				return true
			}
			return false
		}
	})
	answers := make(chan string, 2)
	ask := func(text string, max int) {
		p := openai.ChatCompletionNewParams{Messages: user(text), Model: "shapes"}
		if max > 0 {
			p.MaxTokens = openai.Int(int64(max))
		}
		r, err := f.client.Chat.Completions.New(t.Context(), p)
		if err != nil {
			answers <- err.Error()
			return
		}
		answers <- r.Choices[0].Message.Content
	}
	go ask("short", 2000)
	f.await("the short one is at work", func() bool { return len(f.asked) == 1 })
	go ask("long", 0)
	id := ""
	f.await("the long one is at work", func() bool {
		if len(f.asked) == 2 {
			id = f.asked[1].ID
		}
		return id != ""
	})
	f.await("the HMM was told", func() bool { return f.told(id) == 2 })
	f.await("it waits", func() bool { return f.metric("trireme_num_requests_waiting") == "1" })
	f.mu.Lock()
	if len(f.asked) != 2 {
		t.Error("it began again before there was room")
	}
	f.mu.Unlock()
	close(done)
	for range 2 {
		if got := <-answers; got != "Hello, world!" {
			t.Error(got)
		}
	}
	f.settled()
}

// What no NPU can hold is refused at once; an answer whose length is left open is bounded by what fits.
func TestWhatNeverFits(t *testing.T) {
	f := start(t, func(_ *gateway.Config, s *stages) { s.memory.capacity = 5 << 20 })
	for name, body := range map[string]string{
		"max_tokens": `{"messages":[{"role":"user","content":"x"}],"max_tokens":4000}`,
		"choices":    `{"messages":[{"role":"user","content":"x"}],"max_tokens":500,"n":8}`,
		"min_tokens": `{"messages":[{"role":"user","content":"x"}],"min_tokens":4000}`,
		"prompt":     `{"messages":[{"role":"user","content":"` + strings.Repeat("x ", 3000) + `"}]}`,
	} {
		status, _, answer := f.post("/v1/chat/completions", body)
		var e struct {
			Error struct{ Code, Message string }
		}
		if err := json.Unmarshal([]byte(answer), &e); err != nil || status != http.StatusBadRequest ||
			e.Error.Code != "context_length_exceeded" || !strings.Contains(e.Error.Message, "5 MiB") ||
			!strings.Contains(e.Error.Message, "--npu-memory") {
			t.Errorf("%s: %d %s", name, status, answer)
		}
	}
	if got, err := f.chat(openai.ChatCompletionNewParams{}); err != nil || got != "Hello, world!" {
		t.Fatalf("%q %v", got, err)
	}
	f.settled()
	if n := f.asked[0].Spec.Sampling.MaxTokens; n < 1000 || n > 1600 { // 6 slabs of 256 tokens and a log
		t.Errorf("an answer of unbounded length was bounded to %d tokens", n)
	}
}

// withPictures is the body of a request with so many different pictures of 256x256: 64 tokens, 256 KiB each.
func withPictures(t *testing.T, n, first int) string {
	t.Helper()
	var parts []string
	for i := range n {
		parts = append(parts, `{"type":"image_url","image_url":{"url":"`+dataURL(pngOf(t, 256, 256, color.Gray{Y: uint8(first + i)}))+`"}}`)
	}
	return `{"max_tokens":20,"messages":[{"role":"user","content":[` + strings.Join(parts, ",") + `]}]}`
}

// Pictures take credit of their own kind: too many for an NPU are refused at once with the sizes, and those that would fit
// if others had ended wait for it, in vain with a 429 that has the sizes, while requests without pictures go on.
func TestRoomForPictures(t *testing.T) {
	release := make(chan struct{})
	f := start(t, func(cfg *gateway.Config, s *stages) {
		cfg.QueueWait = 100 * time.Millisecond
		s.memory.capacity = 16 << 20
		s.prefill = func(m *wire.Prefill, _ question) bool {
			if len(m.MM) > 0 {
				<-release
			}
			return false
		}
	})
	f.await("the capacity is known", f.healthy)
	status, _, answer := f.post("/v1/chat/completions", withPictures(t, 65, 0))
	if e := parseError(t, answer); status != http.StatusBadRequest || e.Error.Code == nil || *e.Error.Code != "context_length_exceeded" ||
		!strings.Contains(e.Error.Message, "65 pictures") || !strings.Contains(e.Error.Message, "has 16 MiB") {
		t.Errorf("more pictures than fit: %d %s", status, answer)
	}
	first := make(chan int)
	go func() {
		status, _, _ := f.post("/v1/chat/completions", withPictures(t, 33, 0))
		first <- status
	}()
	f.await("it is at work", func() bool { return len(f.asked) == 1 })
	status, header, answer := f.post("/v1/chat/completions", withPictures(t, 33, 100))
	if e := parseError(t, answer); status != http.StatusTooManyRequests || header.Get("Retry-After") == "" ||
		!strings.Contains(e.Error.Message, "8.2 MiB for pictures (8.2 MiB of 16 MiB are taken)") {
		t.Errorf("no room for pictures: %d %s", status, answer)
	}
	if got, err := f.chat(openai.ChatCompletionNewParams{MaxTokens: openai.Int(20)}); err != nil || got != "Hello, world!" {
		t.Errorf("without pictures: %q %v", got, err)
	}
	close(release)
	if got := <-first; got != http.StatusOK {
		t.Errorf("the first got %d", got)
	}
	f.settled()
}
