package gateway_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"image/color"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/packages/param"

	"trireme.dev/services/gateway"
	"trireme.dev/shared/wire"
)

// chat asks once and returns the answer's text.
func (f *fixture) chat(p openai.ChatCompletionNewParams) (string, error) {
	p.Model = "shapes"
	if p.Messages == nil {
		p.Messages = user("Hi.")
	}
	got, err := f.client.Chat.Completions.New(f.t.Context(), p)
	if err != nil {
		return "", err
	}
	return got.Choices[0].Message.Content, nil
}

func TestStopStringEndsTheChoiceEarly(t *testing.T) {
	const long = "one two three STOP four five six seven eight nine ten"
	f := start(t, func(_ *gateway.Config, s *stages) {
		s.answer = func(question) []int32 { return append(s.ids(long+strings.Repeat(" and more", 60)), eos) }
		s.decode = func(m *wire.Decode, q question) bool {
			ids := s.all(q)
			for at := 1; at < len(ids) && !s.isDone(q.ID, q.Choice); at++ { // no faster than the gateway
				s.send(q.Gateway, s.run(q, ids, at, at+1))
				if !s.confirmed(context.Background(), q, ids, at+1) {
					return true
				}
			}
			t.Error("the decoder was not stopped")
			return true
		}
	})
	stream := f.client.Chat.Completions.NewStreaming(t.Context(), openai.ChatCompletionNewParams{
		Model: "shapes", Messages: user("Hi."), N: param.NewOpt(int64(2)),
		Stop:          openai.ChatCompletionNewParamsStopUnion{OfStringArray: []string{"nowhere", "ee STOP f"}},
		StreamOptions: openai.ChatCompletionStreamOptionsParam{IncludeUsage: param.NewOpt(true)},
	})
	var acc openai.ChatCompletionAccumulator
	for stream.Next() {
		acc.AddChunk(stream.Current())
	}
	if err := stream.Err(); err != nil {
		t.Fatal(err)
	}
	for i, c := range acc.Choices {
		if c.Message.Content != "one two thr" || c.FinishReason != "stop" {
			t.Errorf("choice %d: %q %s", i, c.Message.Content, c.FinishReason)
		}
	}
	// Tokens up to the one that completed the stop string, which is what the text before the rest needs.
	n, all := 0, f.ids(long)
	for !strings.Contains(f.text(all[:n]), "ee STOP f") {
		n++
	}
	if int(acc.Usage.CompletionTokens) != 2*n {
		t.Errorf("usage %d, want twice %d", acc.Usage.CompletionTokens, n)
	}
	f.settled()
}

func TestCharactersAreNeverSplit(t *testing.T) {
	const text = "né 世界 👩‍🚀 x"
	f := start(t, func(_ *gateway.Config, s *stages) {
		s.answer = func(question) []int32 { return append(s.ids(text), eos) }
	})
	if n := len(f.ids(text)); n < len([]rune(text))+5 {
		t.Fatalf("only %d tokens: the text does not split characters", n)
	}
	status, _, body := f.post("/v1/chat/completions", `{"messages":[{"role":"user","content":"x"}],"stream":true}`)
	if status != 200 || strings.Contains(body, "\uFFFD") || strings.Contains(body, `\ufffd`) {
		t.Errorf("%d %s", status, body)
	}
	if got, err := f.chat(openai.ChatCompletionNewParams{}); err != nil || got != text {
		t.Errorf("%q %v", got, err)
	}
	// Cut in the middle of a character by max_tokens: what is there is shown as what it is.
	got, err := f.chat(openai.ChatCompletionNewParams{MaxTokens: param.NewOpt(int64(len(f.ids("né ")) + 1))})
	if err != nil || got != "né \uFFFD" {
		t.Errorf("%q %v", got, err)
	}
	f.settled()
}

func (f *fixture) healthy() bool {
	resp, err := f.http.Get(f.url + "/health")
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode == http.StatusOK
}

// TestDoneComesAfterTheConfirmation has the client read its whole answer before the decoder asks whether it arrived.
func TestDoneComesAfterTheConfirmation(t *testing.T) {
	ask := make(chan struct{})
	f := start(t, func(cfg *gateway.Config, s *stages) {
		cfg.ConfirmWait = time.Minute
		s.decode = func(m *wire.Decode, q question) bool {
			ids := s.all(q)
			s.send(q.Gateway, s.run(q, ids, 1, len(ids)))
			<-ask
			if s.isDone(q.ID, 0) {
				t.Error("the request was done before its decoder knew that the end had arrived")
			}
			s.confirmed(context.Background(), q, ids, len(ids))
			return true
		}
	})
	if got, err := f.chat(openai.ChatCompletionNewParams{}); err != nil || got != "Hello, world!" {
		t.Errorf("%q %v", got, err)
	}
	close(ask)
	f.settled()
}

func TestClientLeaves(t *testing.T) {
	f := start(t, func(_ *gateway.Config, s *stages) {
		s.prefill = func(m *wire.Prefill, q question) bool {
			s.send(q.Gateway, s.run(q, s.all(q), 0, 1))
			return true // and no more
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	stream := f.client.Chat.Completions.NewStreaming(ctx, openai.ChatCompletionNewParams{Model: "shapes", Messages: user("Hi.")})
	for range 2 {
		if !stream.Next() {
			t.Fatal(stream.Err())
		}
	}
	if f.isDone(f.asked[0].ID, -1) {
		t.Fatal("done while the client reads")
	}
	cancel()
	f.settled()
	f.await("counted", func() bool {
		return f.metricOf(`trireme_request_failure_total{model_name="shapes",status="499"}`) == "1"
	})

	// Before the first token, too.
	f.stages.prefill = func(*wire.Prefill, question) bool { return true }
	ctx, cancel = context.WithCancel(t.Context())
	failed := make(chan error)
	go func() {
		_, err := f.client.Chat.Completions.New(ctx, openai.ChatCompletionNewParams{Model: "shapes", Messages: user("Hi.")})
		failed <- err
	}()
	f.await("asked", func() bool { return len(f.asked) == 2 })
	cancel()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	f.settled()
}

// metricOf is the value of a metric by its full name.
func (f *fixture) metricOf(name string) string {
	resp, err := f.http.Get(f.url + "/metrics")
	if err != nil {
		return ""
	}
	defer resp.Body.Close()
	for s := bufio.NewScanner(resp.Body); s.Scan(); {
		if rest, ok := strings.CutPrefix(s.Text(), name+" "); ok {
			return rest
		}
	}
	return ""
}

// A client that goes away at any moment of a request's start leaves no join record: one that is being made is deleted after
// it was made.
func TestCancelLeavesNoJoinRecord(t *testing.T) {
	f := start(t, func(_ *gateway.Config, s *stages) { s.prefill = func(*wire.Prefill, question) bool { return true } })
	picture := dataURL(pngOf(t, 64, 64, color.White))
	var wg sync.WaitGroup
	for worker := range 8 {
		wg.Go(func() {
			for i := range 40 {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(500+(i*8+worker)*20)*time.Microsecond)
				_, _ = f.client.Chat.Completions.New(ctx, openai.ChatCompletionNewParams{Messages: []openai.ChatCompletionMessageParamUnion{
					openai.UserMessage([]openai.ChatCompletionContentPartUnionParam{
						openai.ImageContentPart(openai.ChatCompletionContentPartImageImageURLParam{URL: picture}),
					}),
				}}) // that it fails is the point
				cancel()
			}
		})
	}
	wg.Wait()
	f.settled()
	joins, err := f.bus.JetStream().KeyValue(t.Context(), wire.BucketJoin)
	if err != nil {
		t.Fatal(err)
	}
	f.await("no join record", func() bool {
		_, err := joins.Keys(t.Context())
		return errors.Is(err, jetstream.ErrNoKeysFound)
	})
}

func TestClientDoesNotRead(t *testing.T) {
	f := start(t, func(cfg *gateway.Config, s *stages) {
		cfg.WriteWait = 100 * time.Millisecond
		s.each = 32
		s.answer = func(question) []int32 { return append(s.ids(strings.Repeat("a flood of words ", 1200)), eos) }
	})
	var conns []net.Conn
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	body := `{"messages":[{"role":"user","content":"x"}],"stream":true,"n":32,"logprobs":true,"top_logprobs":20}`
	c, err := net.Dial("tcp", strings.TrimPrefix(f.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	conns = append(conns, c)
	_ = c.(*net.TCPConn).SetReadBuffer(4 << 10)
	fmt.Fprintf(c, "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	f.await("asked", func() bool { return len(f.asked) == 1 })
	f.settled()
	f.await("counted", func() bool {
		return f.metricOf(`trireme_request_failure_total{model_name="shapes",status="499"}`) == "1"
	})
}

func TestDeadline(t *testing.T) {
	f := start(t, func(cfg *gateway.Config, s *stages) {
		cfg.Deadline = 150 * time.Millisecond
		s.prefill = func(*wire.Prefill, question) bool { return true }
	})
	status, _, body := f.post("/v1/chat/completions", `{"messages":[{"role":"user","content":"x"}]}`)
	if e := parseError(t, body); status != 504 || e.Error.Type != "server_error" {
		t.Errorf("%d %s", status, body)
	}
	f.settled()
}

func TestStopping(t *testing.T) {
	f := start(t, func(cfg *gateway.Config, s *stages) {
		s.prefill = func(*wire.Prefill, question) bool { return true }
	})
	answer := make(chan string)
	go func() {
		status, _, body := f.post("/v1/chat/completions", `{"messages":[{"role":"user","content":"x"}]}`)
		answer <- fmt.Sprint(status, body)
	}()
	f.await("asked", func() bool { return len(f.asked) == 1 })
	go f.stop()
	if got := <-answer; !strings.HasPrefix(got, "503") || !strings.Contains(got, "stopping") {
		t.Errorf("got %s", got)
	}
	f.await("told", func() bool { return f.done[part{f.asked[0].ID, -1}] })
	f.stop()
}

func TestNoCapacity(t *testing.T) {
	release := make(chan struct{})
	f := start(t, func(cfg *gateway.Config, s *stages) {
		cfg.MaxOpen, cfg.MaxQueue, cfg.QueueWait = 1, 1, 150*time.Millisecond
		s.prefill = func(*wire.Prefill, question) bool { <-release; return false }
	})
	body := `{"messages":[{"role":"user","content":"x"}],"max_tokens":5}`
	first := make(chan int)
	go func() {
		status, _, _ := f.post("/v1/chat/completions", body)
		first <- status
	}()
	f.await("asked", func() bool { return len(f.asked) == 1 })
	status, header, answer := f.post("/v1/chat/completions", body) // waits in vain
	if e := parseError(t, answer); status != 429 || e.Error.Type != "rate_limit_error" || header.Get("Retry-After") == "" || header.Get("Retry-After") == "0" {
		t.Errorf("%d %v %s", status, header, answer)
	}
	close(release)
	if got := <-first; got != 200 {
		t.Errorf("the one with the credit got %d", got)
	}
	f.settled() // its credit is back
	if status, _, _ := f.post("/v1/chat/completions", body); status != 200 {
		t.Errorf("after that: %d", status)
	}
	f.settled()

	f.memory.set(func() { f.memory.full = true })
	picture := `{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"` + dataURL(pngOf(t, 64, 64, color.White)) + `"}}]}]}`
	if status, _, answer := f.post("/v1/chat/completions", picture); status != 429 {
		t.Errorf("host memory is full: %d %s", status, answer)
	}
	f.settled()
}

// TestCreditGrowsWithTheAnswer has an answer outgrow what was expected of it and fill the memory: who comes then waits.
func TestCreditGrowsWithTheAnswer(t *testing.T) {
	const slab = 786432 // 256 positions of this model
	grown, release := make(chan struct{}), make(chan struct{})
	f := start(t, func(cfg *gateway.Config, s *stages) {
		s.memory.capacity = 11 * slab
		s.answer = func(q question) []int32 {
			ids := make([]int32, min(3000, q.Spec.Sampling.MaxTokens))
			for i := range ids {
				ids[i] = 300
			}
			return ids
		}
		s.decode = func(m *wire.Decode, q question) bool {
			ids := s.all(q)
			if len(ids) < 2000 { // the second
				return false
			}
			most := len(ids) - 100 // bounded by what fits: the memory is as good as full then
			for at := 1; at < most; at += 100 {
				s.send(q.Gateway, s.run(q, ids, at, min(at+100, most)))
			}
			s.confirmed(context.Background(), q, ids, most)
			close(grown)
			<-release
			s.send(q.Gateway, s.run(q, ids, most, len(ids)))
			s.confirmed(context.Background(), q, ids, len(ids))
			return true
		}
	})
	answers := make(chan int, 2)
	ask := func(more string) {
		status, _, _ := f.post("/v1/chat/completions", `{"messages":[{"role":"user","content":"x"}]`+more+`}`)
		answers <- status
	}
	f.await("the capacity is known", f.healthy)
	go ask("")
	<-grown
	go ask(`,"max_tokens":100`)
	f.await("the second waits", func() bool { return f.metric("trireme_num_requests_waiting") == "1" })
	close(release)
	if a, b := <-answers, <-answers; a != 200 || b != 200 {
		t.Errorf("%d %d", a, b)
	}
	f.settled()
}

func TestHealth(t *testing.T) {
	f := start(t, nil)
	f.await("healthy", f.healthy)
	resp, err := f.http.Get(f.url + "/live")
	if err != nil || resp.StatusCode != 200 {
		t.Fatal(err)
	}
	resp.Body.Close()
	for _, path := range []string{"/live", "/health"} {
		resp, err := f.http.Head(f.url + path)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != 200 || len(body) > 0 || resp.ContentLength <= 0 {
			t.Errorf("HEAD %s: %d, %d bytes of %d", path, resp.StatusCode, len(body), resp.ContentLength)
		}
	}
	f.await("announced", func() bool { return f.announced("gateway-test") })
	f.memory.set(func() { f.memory.down = true })
	f.memory.lose()
	f.await("unhealthy", func() bool { return !f.healthy() })
	resp, err = f.http.Get(f.url + "/health")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != 503 || !strings.Contains(string(body), `"missing":["no connection to the HMM"]`) {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
}

func (f *fixture) announced(id string) bool {
	kv, err := f.bus.JetStream().KeyValue(f.t.Context(), wire.BucketInstances)
	if err != nil {
		return false
	}
	_, err = kv.Get(f.t.Context(), wire.InstanceKey(&wire.Instance{ID: id, Role: "gateway"}))
	return err == nil
}

// TestManyStreams runs 200 streams at once; each answer must be its own.
func TestManyStreams(t *testing.T) {
	f := start(t, func(cfg *gateway.Config, s *stages) {
		cfg.QueueWait, cfg.StoreWait = 5*time.Minute, 5*time.Minute // for a busy machine, where NATS is slow with so many at once
		s.answer = func(q question) []int32 {
			return append(s.ids(fmt.Sprintf("%d: %s", q.Choice, strings.Repeat(q.Text[len(q.Text)-60:], 2))), eos)
		}
	})
	transport := &http.Transport{MaxIdleConnsPerHost: 200}
	defer transport.CloseIdleConnections()
	f.http.Transport = transport
	picture := dataURL(pngOf(t, 64, 64, color.White))
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			content := []openai.ChatCompletionContentPartUnionParam{openai.TextContentPart(fmt.Sprintf("question %d", i))}
			for range i % 5 {
				content = append(content, openai.ImageContentPart(openai.ChatCompletionContentPartImageImageURLParam{URL: picture}))
			}
			content = append(content, openai.TextContentPart(fmt.Sprintf("number %03d", i)))
			stream := f.client.Chat.Completions.NewStreaming(t.Context(), openai.ChatCompletionNewParams{
				Model: "shapes", Messages: []openai.ChatCompletionMessageParamUnion{openai.UserMessage(content)}, MaxTokens: param.NewOpt(int64(400)),
			})
			var got strings.Builder
			for stream.Next() {
				got.WriteString(stream.Current().Choices[0].Delta.Content)
			}
			tail := fmt.Sprintf("number %03d", i)
			if stream.Err() != nil || strings.Count(got.String(), tail) != 2 || !strings.HasPrefix(got.String(), "0: ") {
				var e *openai.Error
				if errors.As(stream.Err(), &e) {
					t.Errorf("stream %d: %s", i, e.Message)
				}
				t.Errorf("stream %d: %q %v", i, got.String(), stream.Err())
			}
		})
	}
	wg.Wait()
	f.settled()
}
