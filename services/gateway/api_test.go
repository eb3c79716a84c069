package gateway_test

import (
	"encoding/json"
	"image/color"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/packages/param"

	"trireme.dev/services/gateway"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/wire"
)

func TestChat(t *testing.T) {
	f := start(t, nil)
	got, err := f.client.Chat.Completions.New(t.Context(), openai.ChatCompletionNewParams{Model: "shapes", Messages: user("Hi.")})
	if err != nil {
		t.Fatal(err)
	}
	f.settled()
	prompt := f.ids("<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n")
	answer := f.ids("Hello, world!")
	choice := got.Choices[0]
	if choice.Message.Content != "Hello, world!" || choice.Message.Role != "assistant" || choice.FinishReason != "stop" ||
		got.Model != "shapes" || got.Object != "chat.completion" || !strings.HasPrefix(got.ID, "chatcmpl-") || got.Created == 0 {
		t.Errorf("got %s", got.RawJSON())
	}
	u := got.Usage
	if int(u.PromptTokens) != len(prompt) || int(u.CompletionTokens) != len(answer)+1 ||
		u.TotalTokens != u.PromptTokens+u.CompletionTokens || u.PromptTokensDetails.CachedTokens != 3 {
		t.Errorf("usage %s", u.RawJSON())
	}
	q := f.asked[0]
	if diff := cmp.Diff(prompt, q.Spec.Prompt); diff != "" {
		t.Errorf("prompt %q: %s", q.Text, diff)
	}
	want := wire.Sampling{MaxTokens: 8192 - len(prompt), TopP: 1, Repetition: 1, Stop: []int32{619, 621}, Logprobs: -1, Seed: q.Spec.Sampling.Seed}
	if diff := cmp.Diff(want, q.Spec.Sampling, cmp.AllowUnexported(wire.Sampling{})); diff != "" {
		t.Errorf("sampling: %s", diff)
	}
	if q.Spec.Model != f.model.Config.Digest || q.Spec.Choices != 1 || q.Gateway != "gateway-test" || q.Attempt != 1 || len(q.ID) != 22 || q.Left <= 0 {
		t.Errorf("request %+v", q.Request)
	}
	if f.metric("trireme_prefill_computed_tokens_total") != json.Number(itoa(len(prompt)-3)).String() {
		t.Errorf("computed tokens: %q", f.metric("trireme_prefill_computed_tokens_total"))
	}
}

func itoa(n int) string {
	b, _ := json.Marshal(n)
	return string(b)
}

func TestStream(t *testing.T) {
	f := start(t, nil)
	stream := f.client.Chat.Completions.NewStreaming(t.Context(), openai.ChatCompletionNewParams{
		Model: "shapes", Messages: user("Hi."), StreamOptions: openai.ChatCompletionStreamOptionsParam{IncludeUsage: param.NewOpt(true)},
	})
	var acc openai.ChatCompletionAccumulator
	for stream.Next() {
		acc.AddChunk(stream.Current())
	}
	if err := stream.Err(); err != nil {
		t.Fatal(err)
	}
	if acc.Choices[0].Message.Content != "Hello, world!" || acc.Choices[0].FinishReason != "stop" || acc.Usage.CompletionTokens == 0 {
		t.Errorf("got %+v", acc.ChatCompletion)
	}

	status, header, body := f.post("/v1/chat/completions",
		`{"model":"shapes","messages":[{"role":"user","content":"Hi."}],"stream":true,"stream_options":{"include_usage":true}}`)
	if status != 200 || !strings.HasPrefix(header.Get("Content-Type"), "text/event-stream") {
		t.Fatalf("%d %v", status, header)
	}
	type chunk struct {
		Object  string
		Choices []struct {
			Delta        map[string]string
			FinishReason *string `json:"finish_reason"`
		}
		Usage map[string]any
	}
	all := events(body)
	var text strings.Builder
	for i, e := range all {
		data, ok := strings.CutPrefix(e, "data: ")
		if !ok {
			t.Fatalf("event %q", e)
		}
		if i == len(all)-1 {
			if data != "[DONE]" {
				t.Errorf("last event %q", e)
			}
			continue
		}
		var c chunk
		if err := json.Unmarshal([]byte(data), &c); err != nil {
			t.Fatal(err)
		}
		switch {
		case i == 0:
			if diff := cmp.Diff(map[string]string{"role": "assistant", "content": ""}, c.Choices[0].Delta); diff != "" {
				t.Error(diff)
			}
		case i == len(all)-2:
			if len(c.Choices) != 0 || c.Usage["completion_tokens"] == nil {
				t.Errorf("usage chunk %q", data)
			}
		case i == len(all)-3:
			if c.Choices[0].FinishReason == nil || *c.Choices[0].FinishReason != "stop" {
				t.Errorf("finish chunk %q", data)
			}
		default:
			text.WriteString(c.Choices[0].Delta["content"])
		}
		if i < len(all)-2 && !strings.Contains(data, `"usage":null`) {
			t.Errorf("chunk without usage null: %q", data)
		}
	}
	if text.String() != "Hello, world!" {
		t.Errorf("text %q", text.String())
	}
	f.settled()
}

func TestCompletions(t *testing.T) {
	f := start(t, func(_ *gateway.Config, s *stages) {
		s.answer = func(q question) []int32 { return append(s.ids("<"+q.Text+">"), eos) }
	})
	f.stages.t = t
	for _, test := range []struct {
		name, body string
		texts      []string
		prompt     int
	}{
		{"text", `{"model":"shapes","prompt":"one"}`, []string{"<one>"}, len(f.ids("one"))},
		{"texts", `{"model":"shapes","prompt":["one","two"],"n":2}`, []string{"<one>", "<one>", "<two>", "<two>"}, len(f.ids("one")) + len(f.ids("two"))},
		{"ids", `{"model":"shapes","prompt":` + ids(f, "one") + `}`, []string{"<one>"}, len(f.ids("one"))},
		{"lists of ids", `{"model":"shapes","prompt":[` + ids(f, "one") + `,` + ids(f, "two") + `]}`, []string{"<one>", "<two>"}, len(f.ids("one")) + len(f.ids("two"))},
		{"echo", `{"model":"shapes","prompt":"one","echo":true}`, []string{"one<one>"}, len(f.ids("one"))},
		{"echo of ids", `{"model":"shapes","prompt":` + ids(f, "one") + `,"echo":true}`, []string{"one<one>"}, len(f.ids("one"))},
		{"no model", `{"prompt":"one"}`, []string{"<one>"}, len(f.ids("one"))},
	} {
		t.Run(test.name, func(t *testing.T) {
			status, _, body := f.post("/v1/completions", test.body)
			var got openai.Completion
			if err := json.Unmarshal([]byte(body), &got); err != nil || status != 200 {
				t.Fatalf("%d %s", status, body)
			}
			var texts []string
			for i, c := range got.Choices {
				if int(c.Index) != i || c.FinishReason != "stop" {
					t.Errorf("choice %d: %s", i, c.RawJSON())
				}
				texts = append(texts, c.Text)
			}
			if diff := cmp.Diff(test.texts, texts); diff != "" {
				t.Error(diff)
			}
			if int(got.Usage.PromptTokens) != test.prompt || got.Object != "text_completion" {
				t.Errorf("%s", body)
			}
			// The same streamed.
			status, _, body = f.post("/v1/completions", strings.TrimSuffix(test.body, "}")+`,"stream":true}`)
			streamed := make([]string, len(test.texts))
			for _, e := range events(body) {
				var c openai.Completion
				if data := strings.TrimPrefix(e, "data: "); data != "[DONE]" {
					if err := json.Unmarshal([]byte(data), &c); err != nil {
						t.Fatalf("%d %q: %v", status, e, err)
					}
					streamed[c.Choices[0].Index] += c.Choices[0].Text
				}
			}
			if diff := cmp.Diff(test.texts, streamed); diff != "" || !strings.HasSuffix(body, "data: [DONE]\n\n") {
				t.Errorf("streamed: %s", diff)
			}
		})
	}
	f.settled()
}

// ids is text as a JSON array of token ids.
func ids(f *fixture, text string) string {
	b, _ := json.Marshal(f.ids(text))
	return string(b)
}

func TestChoicesAndLogprobs(t *testing.T) {
	f := start(t, func(_ *gateway.Config, s *stages) {
		s.answer = func(q question) []int32 { return append(s.ids([]string{"zero", "first", "é"}[q.Choice]), eos) }
	})
	got, err := f.client.Chat.Completions.New(t.Context(), openai.ChatCompletionNewParams{
		Model: "shapes", Messages: user("Hi."), N: param.NewOpt(int64(3)), Logprobs: param.NewOpt(true),
		TopLogprobs: param.NewOpt(int64(2)), Seed: param.NewOpt(int64(7)), Temperature: param.NewOpt(0.5),
	})
	if err != nil {
		t.Fatal(err)
	}
	total := 0
	for i, want := range []string{"zero", "first", "é"} {
		c := got.Choices[i]
		if int(c.Index) != i || c.Message.Content != want {
			t.Errorf("choice %d: %s", i, c.RawJSON())
		}
		tokens := f.ids(want)
		total += len(tokens) + 1
		if len(c.Logprobs.Content) != len(tokens)+1 { // the stop id is a token, too
			t.Fatalf("choice %d has %d logprobs for %d tokens", i, len(c.Logprobs.Content), len(tokens)+1)
		}
		var raw []byte
		for k, l := range c.Logprobs.Content {
			if l.Logprob != -0.25 || len(l.TopLogprobs) != 2 || l.TopLogprobs[1].Logprob != -2 {
				t.Errorf("token %d: %s", k, l.RawJSON())
			}
			if k < len(tokens) {
				for _, b := range l.Bytes {
					raw = append(raw, byte(b))
				}
			}
		}
		if string(raw) != want {
			t.Errorf("bytes of choice %d: %q", i, raw)
		}
	}
	if int(got.Usage.CompletionTokens) != total {
		t.Errorf("usage: %s, want %d tokens", got.Usage.RawJSON(), total)
	}
	if s := f.asked[0].Spec.Sampling; s.Seed != 7 || s.Temperature != 0.5 || s.Logprobs != 2 {
		t.Errorf("sampling %+v", s)
	}

	old, err := f.client.Completions.New(t.Context(), openai.CompletionNewParams{
		Model: "shapes", Prompt: openai.CompletionNewParamsPromptUnion{OfString: param.NewOpt("x")}, Logprobs: param.NewOpt(int64(1)),
	})
	if err != nil {
		t.Fatal(err)
	}
	l := old.Choices[0].Logprobs
	if strings.Join(l.Tokens[:len(l.Tokens)-1], "") != "zero" || l.TextOffset[0] != 0 || len(l.TopLogprobs) != len(l.Tokens) || l.TokenLogprobs[0] != -0.25 {
		t.Errorf("logprobs of completions: %s", l.RawJSON())
	}
	f.settled()
}

func TestPictures(t *testing.T) {
	f := start(t, nil)
	red, blue := pngOf(t, 64, 96, color.RGBA{255, 0, 0, 255}), pngOf(t, 128, 64, color.RGBA{0, 0, 255, 255})
	part := func(b []byte) openai.ChatCompletionContentPartUnionParam {
		return openai.ImageContentPart(openai.ChatCompletionContentPartImageImageURLParam{URL: dataURL(b)})
	}
	_, err := f.client.Chat.Completions.New(t.Context(), openai.ChatCompletionNewParams{Model: "shapes",
		Messages: []openai.ChatCompletionMessageParamUnion{openai.UserMessage([]openai.ChatCompletionContentPartUnionParam{
			part(red), part(blue), openai.TextContentPart("What?"), part(red),
		})},
	})
	if err != nil {
		t.Fatal(err)
	}
	f.settled()
	pad := func(n int) string { return "<|vision_start|>" + strings.Repeat("<|image_pad|>", n) + "<|vision_end|>" }
	want := "<|im_start|>user\n" + pad(6) + pad(8) + "What?" + pad(6) + "<|im_end|>\n<|im_start|>assistant\n"
	q := f.asked[0]
	if diff := cmp.Diff(f.ids(want), q.Spec.Prompt); diff != "" {
		t.Errorf("prompt %q: %s", q.Text, diff)
	}
	grids := [][3]int{{1, 6, 4}, {1, 4, 8}, {1, 6, 4}}
	for i, p := range q.Spec.Pictures {
		if p.Grid != grids[i] || int(q.Spec.Prompt[p.Offset]) != f.model.Config.Vision.ImageToken ||
			int(q.Spec.Prompt[p.Offset-1]) != f.model.Config.Vision.VisionStart {
			t.Errorf("picture %d: %+v", i, p)
		}
	}
	if q.Spec.Pictures[0].Content != q.Spec.Pictures[2].Content || q.Spec.Pictures[0].Content == q.Spec.Pictures[1].Content {
		t.Error("content digests are wrong")
	}
	if len(f.encodes) != 3 {
		t.Fatalf("%d encode messages", len(f.encodes))
	}
	seen := map[int]wire.Encode{}
	for _, e := range f.encodes {
		seen[e.Part] = e
		if e.Pixels.Kind != mem.KindPixels || e.Model != f.model.Config.Digest {
			t.Errorf("encode %+v", e)
		}
	}
	if seen[0].Pixels.Object != seen[2].Pixels.Object || seen[0].Pixels.Object == seen[1].Pixels.Object {
		t.Error("the same picture should be one object, another one another")
	}
	if got := f.metric("trireme_pictures_total"); got != "3" {
		t.Errorf("pictures: %s", got)
	}
}

// TestNothingLargeOnTheBus sends what is larger than a message may be.
func TestNothingLargeOnTheBus(t *testing.T) {
	f := start(t, nil)
	noise := pngOf(t, 256, 256, color.White)
	noise = append(noise, make([]byte, 300<<10)...) // what comes after a PNG's end is ignored
	content := make([]map[string]any, 0, 11)
	for range 10 {
		content = append(content, map[string]any{"type": "image_url", "image_url": map[string]any{"url": dataURL(noise)}})
		noise[len(noise)-1]++
	}
	content = append(content, map[string]any{"type": "text", "text": strings.Repeat("many words ", 1500)})
	body, _ := json.Marshal(map[string]any{"model": "shapes", "messages": []any{map[string]any{"role": "user", "content": content}}})
	if status, _, answer := f.post("/v1/chat/completions", string(body)); status != 200 {
		t.Fatalf("%d %s", status, answer)
	}
	f.settled()
	if len(f.asked[0].Spec.Prompt) < 4000 || len(f.asked[0].Spec.Pictures) != 10 {
		t.Errorf("%d tokens, %d pictures", len(f.asked[0].Spec.Prompt), len(f.asked[0].Spec.Pictures))
	}
	f.mu.Lock() // heartbeats go on
	largest := f.largest
	f.mu.Unlock()
	if largest == 0 || largest > wire.MaxMessage {
		t.Errorf("the largest message has %d bytes", largest)
	}
}

func TestModelsAndMetrics(t *testing.T) {
	f := start(t, nil)
	page, err := f.client.Models.List(t.Context())
	if err != nil || len(page.Data) != 1 || page.Data[0].ID != "shapes" {
		t.Fatalf("%+v %v", page, err)
	}
	if m, err := f.client.Models.Get(t.Context(), "shapes"); err != nil || m.OwnedBy != "trireme" {
		t.Errorf("%+v %v", m, err)
	}
	if _, err := f.client.Models.Get(t.Context(), "other"); err == nil {
		t.Error("got a model that is not there")
	}
	if _, err := f.client.Chat.Completions.New(t.Context(), openai.ChatCompletionNewParams{Model: "shapes", Messages: user("Hi.")}); err != nil {
		t.Fatal(err)
	}
	f.settled()
	resp, err := f.http.Get(f.url + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	for name, want := range map[string]string{
		"trireme_time_to_first_token_seconds_count": "1", "trireme_e2e_request_latency_seconds_count": "1",
		"trireme_generation_tokens_total": itoa(len(f.ids("Hello, world!")) + 1), "trireme_prefix_cache_hits_total": "3",
		"trireme_num_requests_waiting":              "0",
		"trireme_inter_token_latency_seconds_count": itoa(len(f.ids("Hello, world!"))),
	} {
		if got := f.metric(name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if got := f.series("trireme_request_queue_time_seconds_count", `class="default",model_name="shapes"`); got != "1" {
		t.Errorf("the queue time was counted %q times", got)
	}
	if resp.StatusCode != http.StatusOK {
		t.Errorf("/metrics: %d", resp.StatusCode)
	}
}

// A model's name may have a slash, as those of Hugging Face have, which clients escape in a path, or do not.
func TestModelWithASlash(t *testing.T) {
	const name = "Qwen/Qwen3-VL-30B-A3B-Instruct"
	f := start(t, func(cfg *gateway.Config, _ *stages) { cfg.ModelName = name })
	m, err := f.client.Models.Get(t.Context(), name)
	if err != nil || m.ID != name {
		t.Errorf("the official client: %v, %v", m, err)
	}
	for path, want := range map[string]int{
		name: 200, "Qwen%2FQwen3-VL-30B-A3B-Instruct": 200, "Qwen%2fQwen3-VL-30B-A3B-Instruct": 200, "Qwen%2FQwen4": 404, "Qwen": 404,
	} {
		resp, err := f.http.Get(f.url + "/v1/models/" + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%s: %s, want %d", path, resp.Status, want)
		}
	}
}
