package gateway_test

import (
	"context"
	"fmt"
	"image/color"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/openai/openai-go/v3"

	"trireme.dev/services/gateway"
	"trireme.dev/shared/wire"
)

func TestLostTokensAreAskedForAgain(t *testing.T) {
	var mu sync.Mutex
	lost := map[string]bool{}
	f := start(t, func(_ *gateway.Config, s *stages) {
		s.answer = func(question) []int32 { return append(s.ids(strings.Repeat("lost and found ", 20)), eos) }
		s.lose = func(r *wire.Run) bool { // every third token, and some of the answers to being asked for it, once
			mu.Lock()
			defer mu.Unlock()
			key := fmt.Sprintf("%s %d %d", r.Request, r.Index, len(r.IDs))
			if lost[key] || r.Index%3 != 0 {
				return false
			}
			lost[key] = true
			return true
		}
	})
	if got, err := f.chat(openai.ChatCompletionNewParams{}); err != nil || got != strings.Repeat("lost and found ", 20) {
		t.Errorf("%q %v", got, err)
	}
	f.settled()
	f.mu.Lock() // one that was asked for in vain may come yet
	defer f.mu.Unlock()
	if len(f.resends) == 0 || f.metric("trireme_token_resends_total") == "0" {
		t.Error("nothing was asked for again")
	}
	if f.resends[0].From != 0 {
		t.Errorf("first question %+v", f.resends[0])
	}
}

// TestResendGoesOnWhileTheGapLasts loses the answers to the first questions too; nothing else comes to wake the request.
func TestResendGoesOnWhileTheGapLasts(t *testing.T) {
	var sends atomic.Int64
	f := start(t, func(_ *gateway.Config, s *stages) {
		s.lose = func(r *wire.Run) bool { return r.Index == 0 && sends.Add(1) < 5 }
		s.decode = func(m *wire.Decode, q question) bool {
			ids := s.all(q)
			s.note(func() { s.logs[part{q.ID, 0}] = ids })
			s.send(q.Gateway, s.run(q, ids, len(ids)-1, len(ids))) // the end, and then silence
			return true
		}
	})
	// What answers the questions does not say that it is the end; the message beyond the gap did.
	if got, err := f.chat(openai.ChatCompletionNewParams{}); err != nil || got != "Hello, world!" {
		t.Errorf("%q %v", got, err)
	}
	f.settled()
	f.mu.Lock() // one that was asked for in vain may come yet
	defer f.mu.Unlock()
	if len(f.resends) < 4 {
		t.Errorf("asked %d times", len(f.resends))
	}
}

func TestStaleWritersAreIgnored(t *testing.T) {
	f := start(t, func(_ *gateway.Config, s *stages) {
		s.decode = func(m *wire.Decode, q question) bool {
			ids := s.all(q)
			send := func(generation uint64, attempt, from, to int, ids []int32) {
				r := s.run(q, ids, from, to)
				r.Generation, r.Attempt = generation, attempt
				s.send(q.Gateway, r)
			}
			wrong := append([]int32(nil), ids...)
			for i := range wrong {
				wrong[i] = 300
			}
			send(7, 1, 1, 2, ids)
			send(6, 1, 2, 3, wrong) // lost its claim
			send(7, 0, 2, 3, wrong) // of another attempt
			send(7, 2, 2, 3, wrong)
			send(7, 1, 0, 2, wrong) // again
			send(8, 1, 1, 3, ids)   // a successor, from further back
			send(7, 1, 3, 4, wrong)
			bad := s.run(q, ids, 2, 3)
			bad.Choice = 9 // nonsense must not harm
			s.send(q.Gateway, bad)
			bad.Choice, bad.Index = 0, -4
			s.send(q.Gateway, bad)
			send(8, 1, 3, len(ids), ids)
			return true
		}
	})
	if got, err := f.chat(openai.ChatCompletionNewParams{}); err != nil || got != "Hello, world!" {
		t.Errorf("%q %v", got, err)
	}
	f.settled()
}

func TestLostAttemptGoesOn(t *testing.T) {
	const text = "a stream that is broken twice and goes on"
	f := start(t, func(_ *gateway.Config, s *stages) {
		s.answer = func(q question) []int32 { return append(s.ids(text), eos) }
		s.decode = func(m *wire.Decode, q question) bool {
			if q.Attempt == 3 {
				return false
			}
			ids, at := s.all(q), 1
			if q.Spec.Resume != nil {
				at += len(q.Spec.Resume[0])
			}
			s.send(q.Gateway, s.run(q, ids, at, at+3))
			s.confirmed(context.Background(), q, ids, at+3)
			s.lostAttempt(q.Request, "KV is gone")
			s.lostAttempt(q.Request, "KV is gone") // twice is once
			return true
		}
	})
	stream := f.client.Chat.Completions.NewStreaming(t.Context(), openai.ChatCompletionNewParams{Model: "shapes", Messages: user("Hi.")})
	var got strings.Builder
	for stream.Next() {
		got.WriteString(stream.Current().Choices[0].Delta.Content)
	}
	if stream.Err() != nil || got.String() != text {
		t.Fatalf("%q %v", got.String(), stream.Err())
	}
	f.settled()
	if len(f.asked) != 3 {
		t.Fatalf("%d attempts", len(f.asked))
	}
	all := f.ids(text)
	for i, n := range []int{0, 4, 8} {
		q := f.asked[i]
		resumed := 0
		if q.Spec.Resume != nil {
			resumed = len(q.Spec.Resume[0])
			if fmt.Sprint(q.Spec.Resume[0]) != fmt.Sprint(all[:n]) {
				t.Errorf("attempt %d resumes with %v", i+1, q.Spec.Resume)
			}
		}
		if q.Attempt != i+1 || resumed != n || q.Spec.Sampling.Seed != f.asked[0].Spec.Sampling.Seed {
			t.Errorf("attempt %d: %+v resumes after %d", i+1, q.Request, resumed)
		}
	}
}

func TestAttemptsRunOut(t *testing.T) {
	f := start(t, func(_ *gateway.Config, s *stages) {
		s.prefill = func(m *wire.Prefill, q question) bool {
			if q.Attempt == 2 && strings.Contains(q.Text, "stream") { // the header is out
				s.send(q.Gateway, s.run(q, s.ids("Half an answer"), 0, 3))
			}
			s.lostAttempt(q.Request, "the node burns")
			return true
		}
	})
	status, _, body := f.post("/v1/chat/completions", `{"messages":[{"role":"user","content":"x"}]}`)
	if e := parseError(t, body); status != 503 || e.Error.Type != "server_error" || !strings.Contains(e.Error.Message, "the node burns") {
		t.Errorf("%d %s", status, body)
	}
	stream := f.client.Chat.Completions.NewStreaming(t.Context(), openai.ChatCompletionNewParams{Model: "shapes", Messages: user("stream")})
	chunks := 0
	for stream.Next() {
		chunks++
	}
	if err := stream.Err(); err == nil || chunks == 0 || !strings.Contains(err.Error(), "the node burns") {
		t.Errorf("%d chunks, %v", chunks, err)
	}
	f.settled()
	if len(f.asked) != 6 {
		t.Errorf("%d attempts of two requests", len(f.asked))
	}
}

// TestDamagedPictureIsStillA400 has the fault found behind the gateway, in a stream.
func TestDamagedPictureIsStillA400(t *testing.T) {
	f := start(t, nil)
	whole := pngOf(t, 64, 64, color.White)
	part := func(data []byte) string { return `{"type":"image_url","image_url":{"url":"` + dataURL(data) + `"}}` }
	body := `{"stream":true,"messages":[{"role":"system","content":"hi"},{"role":"user","content":[` +
		part(whole) + `,{"type":"text","text":"and"},` + part(whole) + `,` + part(whole[:len(whole)-20]) + `]}]}`
	status, header, answer := f.post("/v1/chat/completions", body)
	if e := parseError(t, answer); status != 400 || e.Error.Type != "invalid_request_error" || *e.Error.Param != "messages[1].content[3].image_url.url" ||
		*e.Error.Code != "invalid_image" || header.Get("Content-Type") != "application/json" {
		t.Errorf("%d %s", status, answer)
	}
	f.settled()
}

func TestHMMIsLost(t *testing.T) {
	started := make(chan struct{}, 8)
	f := start(t, func(cfg *gateway.Config, s *stages) {
		s.prefill = func(m *wire.Prefill, q question) bool {
			if q.Attempt > 1 {
				return false
			}
			ids := s.all(q)
			s.send(q.Gateway, s.run(q, ids, 0, 2))
			s.confirmed(context.Background(), q, ids, 2)
			started <- struct{}{}
			return true // and then the memory is gone
		}
	})
	answer := make(chan string, 1)
	go func() {
		got, err := f.chat(openai.ChatCompletionNewParams{Messages: []openai.ChatCompletionMessageParamUnion{
			openai.UserMessage([]openai.ChatCompletionContentPartUnionParam{openai.ImageContentPart(
				openai.ChatCompletionContentPartImageImageURLParam{URL: dataURL(pngOf(t, 64, 64, color.White))})})}})
		answer <- fmt.Sprint(got, err)
	}()
	<-started
	f.memory.set(func() { f.memory.down = true })
	f.memory.lose()
	f.await("unhealthy", func() bool { return !f.healthy() })
	f.memory.set(func() { f.memory.down = false })
	if got := <-answer; got != "Hello, world!<nil>" {
		t.Errorf("got %s", got)
	}
	f.settled()
	if len(f.asked) != 2 || len(f.asked[1].Spec.Resume[0]) != 2 || len(f.encodes) != 2 || f.encodes[0].Pixels.Object == f.encodes[1].Pixels.Object {
		t.Errorf("%d attempts, %d encodes", len(f.asked), len(f.encodes))
	}
}

func TestNATSIsLost(t *testing.T) {
	first := make(chan struct{})
	var once sync.Once
	var back atomic.Bool
	f := start(t, func(_ *gateway.Config, s *stages) {
		s.answer = func(question) []int32 { return append(s.ids(strings.Repeat("word ", 30)), eos) }
		// The answer ends behind the outage: that a request is done is told once, and must not be lost with the server.
		s.lose = func(r *wire.Run) bool { return r.Finish != 0 && !back.Load() }
		s.decode = func(m *wire.Decode, q question) bool {
			once.Do(func() { close(first) })
			return false
		}
	})
	f.await("healthy", f.healthy)
	answer := make(chan string, 1)
	go func() {
		got, err := f.chat(openai.ChatCompletionNewParams{})
		answer <- fmt.Sprint(got, err)
	}()
	<-first
	f.nats.Stop()
	f.nats.Start()
	back.Store(true)
	if got := <-answer; got != strings.Repeat("word ", 30)+"<nil>" {
		t.Errorf("got %s", got)
	}
	f.settled()
}

// Join records that a server brings back after they were deleted are deleted again, and no others: neither those of requests
// that are open, nor another gateway's.
func TestJoinRecordsAreSwept(t *testing.T) {
	f := start(t, func(_ *gateway.Config, s *stages) { s.prefill = func(*wire.Prefill, question) bool { return true } })
	joins := func() map[string]bool {
		keys, err := f.bus.JoinKeys(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		is := make(map[string]bool)
		for _, k := range keys {
			is[k] = true
		}
		return is
	}
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	left := make(chan struct{})
	go func() {
		defer close(left)
		_, _ = f.client.Chat.Completions.New(ctx, openai.ChatCompletionNewParams{Messages: []openai.ChatCompletionMessageParamUnion{
			openai.UserMessage([]openai.ChatCompletionContentPartUnionParam{
				openai.ImageContentPart(openai.ChatCompletionContentPartImageImageURLParam{URL: dataURL(pngOf(t, 64, 64, color.White))}),
			}),
		}}) // it is left
	}()
	f.await("the open request's record", func() bool { return len(joins()) == 1 })
	for _, x := range []struct{ request, gateway string }{{"past", "gateway-test"}, {"theirs", "gateway-other"}} {
		record := &wire.Join{Prefill: wire.Prefill{Request: wire.Request{ID: x.request, Gateway: x.gateway, Attempt: 1}}}
		if err := f.bus.CreateJoin(t.Context(), wire.JoinKey(x.request, 1), record); err != nil {
			t.Fatal(err)
		}
	}
	f.nats.Stop()
	f.nats.Start()
	f.await("the past record is deleted", func() bool { return !joins()[wire.JoinKey("past", 1)] })
	if is := joins(); len(is) != 2 || !is[wire.JoinKey("theirs", 1)] {
		t.Errorf("the records %v are left", is)
	}
	leave()
	<-left
	f.await("the left request's record is deleted", func() bool { return len(joins()) == 1 })
}

// A gateway that does not read as fast as tokens come loses messages to its own NATS client, and its clients nothing: what is
// missing is asked for again, and so is what stages asked. It does read slower: all messages of an answer come at once, each beside many runs of
// requests that are nobody's, which take longer to decode than to receive.
func TestSlowConsumer(t *testing.T) {
	text := strings.Repeat("far too much to read ", 20)
	f := start(t, func(cfg *gateway.Config, s *stages) {
		cfg.Inbox = 1
		s.answer = func(question) []int32 { return append(s.ids(text), eos) }
		strangers := make([]wire.Run, 500)
		for i := range strangers {
			strangers[i] = wire.Run{Request: "nobody's", Index: i * 16, IDs: make([]int32, 16)}
		}
		s.decode = func(_ *wire.Decode, q question) bool {
			ids := s.all(q)
			s.note(func() { s.logs[part{q.ID, q.Choice}] = ids })
			var commands []byte
			for at := 1; at < len(ids); at++ {
				data, err := wire.Marshal(&wire.Tokens{Instance: "stages", Items: append(strangers[:len(strangers):len(strangers)], *s.run(q, ids, at, at+1))})
				if err != nil {
					t.Error(err)
					return true
				}
				commands = fmt.Appendf(commands, "PUB %s %d\r\n%s\r\n", wire.SubjectTokens(q.Gateway), len(data), data)
			}
			if err := s.raw(commands); err != nil {
				t.Error(err)
			}
			s.confirmed(t.Context(), q, ids, len(ids))
			return true
		}
	})
	const clients = 4
	answers := make(chan string, clients)
	for range clients {
		go func() {
			status, _, body := f.post("/v1/chat/completions", `{"messages":[{"role":"user","content":"x"}],"max_tokens":4000}`)
			answers <- fmt.Sprint(status, body)
		}()
	}
	for range clients {
		if got := <-answers; !strings.HasPrefix(got, "200") || !strings.Contains(got, text) {
			t.Errorf("got %s", got)
		}
	}
	f.await("settled", func() bool { return len(f.resends) > 0 }) // or nothing was lost, and the test shows nothing
	if f.metric("trireme_token_resends_total") == "0" {
		t.Error("no token was asked for again")
	}
}
