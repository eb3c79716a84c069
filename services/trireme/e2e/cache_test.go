package e2e

import (
	"bufio"
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/openai/openai-go/v3"

	"trireme.dev/shared/hbm"
)

// metric is the value of one of the gateway's metrics, of all labels together. They come as plain text: to compress them takes memory that would be
// found in the heap of who is asked, as often as there are processors.
func (c *cluster) metric(tb testing.TB, name string) int {
	tb.Helper()
	req, err := http.NewRequestWithContext(tb.Context(), http.MethodGet, c.url+"/metrics", nil)
	if err != nil {
		tb.Fatal(err)
	}
	req.Header.Set("Accept-Encoding", "identity")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		tb.Fatal(err)
	}
	defer resp.Body.Close()
	sum, found := 0.0, false
	for s := bufio.NewScanner(resp.Body); s.Scan(); {
		rest, ok := strings.CutPrefix(s.Text(), name)
		if !ok || rest == "" || rest[0] != '{' && rest[0] != ' ' {
			continue
		}
		v, err := strconv.ParseFloat(rest[strings.LastIndexByte(rest, ' ')+1:], 64)
		if err != nil {
			tb.Fatalf("metric %q: %v", s.Text(), err)
		}
		sum, found = sum+v, true
	}
	if !found {
		tb.Fatalf("no metric %s", name)
	}
	return int(sum)
}

// ask is a greedy question about pictures of the reference cases.
func ask(tb testing.TB, question string, pictures ...string) openai.ChatCompletionNewParams {
	tb.Helper()
	return openai.ChatCompletionNewParams{
		Model:       "shapes-vl-moe",
		Messages:    []openai.ChatCompletionMessageParamUnion{userMessage(tb, question, pictures...)},
		Temperature: openai.Float(0),
		MaxTokens:   openai.Int(60),
	}
}

func userMessage(tb testing.TB, text string, pictures ...string) openai.ChatCompletionMessageParamUnion {
	tb.Helper()
	var parts []openai.ChatCompletionContentPartUnionParam
	for _, name := range pictures {
		parts = append(parts, openai.ImageContentPart(openai.ChatCompletionContentPartImageImageURLParam{
			URL: dataURL(tb, filepath.Join(golden, name)),
		}))
	}
	return openai.UserMessage(append(parts, openai.TextContentPart(text)))
}

// Fifty requests with one picture at the same moment: it is encoded once, and every answer is the one of a system
// without caches.
func TestOnePictureIsEncodedOnce(t *testing.T) {
	t.Parallel()
	cold := start(t, "--mm-cache", "0", "--kv-cache", "0")
	questions := []string{"Describe the image.", "How many shapes are in the image?", "Where is the star?"}
	want := map[string]string{}
	for _, q := range questions {
		s, err := cold.stream(t.Context(), ask(t, q, "case15_0.png"), nil)
		if err != nil {
			t.Fatal(err)
		}
		want[q] = s.text
	}
	if n := cold.metric(t, "trireme_mm_cache_hits_total"); n != 0 {
		t.Errorf("%d hits without a cache", n)
	}
	if n := cold.metric(t, "trireme_prefix_cache_hits_total"); n != 0 {
		t.Errorf("%d tokens from the prefix cache without one", n)
	}
	cold.expectNoMemory(t)
	if m := cold.memory(t); m.Objects != 0 {
		t.Errorf("without caches %d objects are left", m.Objects)
	}

	c := start(t, "--topology", "2E1P1D")
	var wg sync.WaitGroup
	for i := range 50 {
		q := questions[i%len(questions)]
		p := ask(t, q, "case15_0.png")
		wg.Go(func() {
			s, err := c.stream(context.Background(), p, nil)
			if err != nil || s.text != want[q] {
				t.Errorf("request %d: %q, %v; want %q", i, s.text, err, want[q])
			}
		})
	}
	wg.Wait()
	queries, hits := c.metric(t, "trireme_mm_cache_queries_total"), c.metric(t, "trireme_mm_cache_hits_total")
	if queries != 50 || hits != 49 {
		t.Errorf("%d of %d pictures were not encoded, want 49 of 50", hits, queries)
	}
	c.expectNoMemory(t)
	if m := c.memory(t); m.CachedMM != 1 {
		t.Errorf("%d MM objects are cached, want 1", m.CachedMM)
	}

	// Another salt, another picture: no hits.
	for salt, picture := range map[string]string{"tenant": "case15_0.png", "": "case16_0.png"} {
		p := ask(t, questions[0], picture)
		if salt != "" {
			p.SetExtraFields(map[string]any{"cache_salt": salt})
		}
		s, err := c.stream(t.Context(), p, nil)
		if err != nil {
			t.Fatal(err)
		}
		if salt != "" && s.text != want[questions[0]] {
			t.Errorf("with a salt %q, want %q", s.text, want[questions[0]])
		}
		if n := c.metric(t, "trireme_mm_cache_hits_total"); n != hits {
			t.Errorf("salt %q, %s: a hit", salt, picture)
		}
	}
	if status, body := c.post(t, "/v1/chat/completions", `{"cache_salt":"","messages":[{"role":"user","content":"Hi"}]}`); status != 400 ||
		!strings.Contains(body, "cache_salt") {
		t.Errorf("an empty salt: %d %s", status, body)
	}
}

// An encoder that dies while others wait for its picture keeps nobody waiting.
func TestEncoderDiesWhileOthersWait(t *testing.T) {
	t.Parallel()
	c := start(t, "--topology", "2E1P1D")
	p := mixed(t, 4)
	p.Temperature = openai.Float(0)
	want, err := c.stream(t.Context(), p, nil)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 20 {
		p := p
		p.SetExtraFields(map[string]any{"cache_salt": fmt.Sprint("round", i/10)}) // not in the cache
		wg.Go(func() {
			s, err := c.stream(context.Background(), p, nil)
			if err != nil || s.text != want.text {
				t.Errorf("request %d: %q, %v; want %q", i, s.text, err, want.text)
			}
		})
	}
	for range 2 {
		kill(t, c.pid(t, "encoder"))
	}
	wg.Wait()
	c.waitReady(t)
	c.expectNoMemory(t)
}

// A conversation of three turns with pictures: each turn computes only what is new, whoever decoded the turn before, and
// says what a system without caches says.
func TestConversationIsCached(t *testing.T) {
	t.Parallel()
	cold := start(t, "--mm-cache", "0", "--kv-cache", "0")
	c := start(t, "--topology", "1E2P2D")
	turns := []openai.ChatCompletionMessageParamUnion{
		userMessage(t, "Describe the image.", "case15_0.png"),
		userMessage(t, "How many shapes are in the image?", "case16_0.png"),
		userMessage(t, "Where is the star?"),
	}
	p := openai.ChatCompletionNewParams{Model: "shapes-vl-moe", Temperature: openai.Float(0), MaxTokens: openai.Int(200)}
	before := 0 // tokens whose KV the turn before has left
	for i, turn := range turns {
		p.Messages = append(p.Messages, turn)
		want, err := cold.stream(t.Context(), p, nil)
		if err != nil {
			t.Fatal(err)
		}
		computed, tokens := c.metric(t, "trireme_prefill_computed_tokens_total"), 0
		got, err := c.stream(t.Context(), p, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got.text != want.text || got.finish != want.finish || got.usage.CompletionTokens != want.usage.CompletionTokens {
			t.Errorf("turn %d: %q, without caches %q", i+1, got.text, want.text)
		}
		tokens = int(got.usage.PromptTokens)
		cached := int(got.usage.PromptTokensDetails.CachedTokens)
		if want := before / 16 * 16; cached != want {
			t.Errorf("turn %d: %d tokens cached of %d, %d were there", i+1, cached, tokens, before)
		}
		if n := c.metric(t, "trireme_prefill_computed_tokens_total") - computed; n != tokens-cached {
			t.Errorf("turn %d: %d tokens computed, %d of %d were cached", i+1, n, cached, tokens)
		}
		t.Logf("turn %d: %d of %d prompt tokens cached, %d answered", i+1, cached, tokens, got.usage.CompletionTokens)
		before = tokens + int(got.usage.CompletionTokens) - 1
		c.expectMemory(t, "the turn's blocks cached", func(s hbm.Stats) bool {
			if os.Getenv(domainsVariable) == "per-npu" { // some in two domains
				return s.CachedBlocks >= before/16 && s.Claims == 0
			}
			return s.CachedBlocks == before/16
		})
		p.Messages = append(p.Messages, openai.AssistantMessage(got.text))
	}
	if n := c.metric(t, "trireme_mm_cache_hits_total"); n != 3 {
		t.Errorf("%d pictures were not encoded, want 3: one in the second turn, two in the third", n)
	}

	// The same text with another picture shares no more than what stands before it.
	p.Messages = []openai.ChatCompletionMessageParamUnion{userMessage(t, "Describe the image.", "case14_0.png")}
	other, err := c.stream(t.Context(), p, nil)
	if err != nil {
		t.Fatal(err)
	}
	want, err := cold.stream(t.Context(), p, nil)
	if err != nil {
		t.Fatal(err)
	}
	if other.text != want.text || other.usage.PromptTokensDetails.CachedTokens > 16 {
		t.Errorf("another picture: %d tokens cached, %q, without caches %q", other.usage.PromptTokensDetails.CachedTokens, other.text, want.text)
	}
	// Another tenant's salt shares nothing.
	p.Messages = []openai.ChatCompletionMessageParamUnion{turns[0]}
	p.SetExtraFields(map[string]any{"cache_salt": "tenant"})
	salted, err := c.stream(t.Context(), p, nil)
	if err != nil {
		t.Fatal(err)
	}
	if n := salted.usage.PromptTokensDetails.CachedTokens; n != 0 {
		t.Errorf("with a salt %d tokens cached", n)
	}
	c.expectNoMemory(t)
	cold.expectNoMemory(t)
}

// A prompt that is in the cache as a whole still has its last token computed, and answers of many at once that share
// it, by pictures that are cut by a block's end too, are those of a system without caches.
func TestSharedPrefixesAtOnce(t *testing.T) {
	t.Parallel()
	cold := start(t, "--mm-cache", "0", "--kv-cache", "0")
	c := start(t, "--topology", "1E2P2D", "--npu-memory", "12MiB")
	var wg sync.WaitGroup
	const requests = 20
	want := make([]streamed, requests)
	for i := range want {
		p := mixed(t, i)
		wg.Go(func() {
			var err error
			if want[i], err = cold.stream(context.Background(), p, nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for round := range 3 { // in little memory: slabs are evicted while others are taken
		for i := range want {
			p := mixed(t, i)
			wg.Go(func() {
				got, err := c.stream(context.Background(), p, nil)
				if err != nil || got.text != want[i].text {
					t.Errorf("round %d, request %d: %q, %v; want %q", round, i, got.text, err, want[i].text)
				}
			})
		}
		wg.Wait()
	}
	if n := c.metric(t, "trireme_prefix_cache_hits_total"); n == 0 {
		t.Error("nothing was taken from the prefix cache")
	}
	c.expectNoMemory(t)
}

// Usage says what came from the caches, on each endpoint, streaming or not, and the answer is the same with it.
func TestUsageTellsWhatWasCached(t *testing.T) {
	t.Parallel()
	c := start(t)
	client := c.client()
	type answer struct {
		text  string
		usage openai.CompletionUsage
	}
	chat := func(salt string, pictures ...string) openai.ChatCompletionNewParams {
		p := ask(t, "Describe the image. Where is the star? How many shapes are in the image?", pictures...)
		if salt != "" {
			p.SetExtraFields(map[string]any{"cache_salt": salt})
		}
		return p
	}
	text := func(salt string) openai.CompletionNewParams {
		p := openai.CompletionNewParams{
			Model: "shapes-vl-moe", Temperature: openai.Float(0), MaxTokens: openai.Int(30),
			Prompt: openai.CompletionNewParamsPromptUnion{OfString: openai.String("Count from 1 to 20. " + strings.Repeat("1 2 3 4 5 6 ", 9))},
		}
		if salt != "" {
			p.SetExtraFields(map[string]any{"cache_salt": salt})
		}
		return p
	}
	for _, x := range []struct {
		name   string
		images int // of the prompt
		ask    func(salt string) (answer, error)
	}{
		{"chat", 0, func(salt string) (answer, error) {
			r, err := client.Chat.Completions.New(t.Context(), chat(salt))
			if err != nil {
				return answer{}, err
			}
			return answer{r.Choices[0].Message.Content, r.Usage}, nil
		}},
		{"chat with pictures", 2, func(salt string) (answer, error) {
			r, err := client.Chat.Completions.New(t.Context(), chat(salt, "case15_0.png", "case16_0.png"))
			if err != nil {
				return answer{}, err
			}
			return answer{r.Choices[0].Message.Content, r.Usage}, nil
		}},
		{"chat with pictures, streaming", 1, func(salt string) (answer, error) {
			s, err := c.stream(t.Context(), chat(salt, "case14_0.png"), nil)
			return answer{s.text, s.usage}, err
		}},
		{"completions", 0, func(salt string) (answer, error) {
			r, err := client.Completions.New(t.Context(), text(salt))
			if err != nil {
				return answer{}, err
			}
			return answer{r.Choices[0].Text, r.Usage}, nil
		}},
		{"completions, streaming", 0, func(salt string) (a answer, err error) {
			p := text(salt + " streaming")
			p.StreamOptions.IncludeUsage = openai.Bool(true)
			s := client.Completions.NewStreaming(t.Context(), p)
			defer s.Close()
			for s.Next() {
				chunk := s.Current()
				if chunk.Usage.TotalTokens > 0 {
					a.usage = chunk.Usage
				}
				for _, ch := range chunk.Choices {
					a.text += ch.Text
				}
			}
			return a, s.Err()
		}},
	} {
		t.Run(x.name, func(t *testing.T) {
			var first answer
			for i, salt := range []string{"", "", "tenant", "tenant", "another"} {
				a, err := x.ask(salt)
				if err != nil {
					t.Fatal(err)
				}
				if i == 0 {
					first = a
				}
				tokens, images := 0, 0
				if i == 1 || i == 3 { // the same prompt and salt once more: all but the block of the last token
					tokens, images = int(a.usage.PromptTokens-1)/16*16, x.images
				}
				if got := int(a.usage.PromptTokensDetails.CachedTokens); got != tokens || a.usage.PromptTokens < 17 {
					t.Errorf("request %d with salt %q: %d of %d tokens cached, want %d", i, salt, got, a.usage.PromptTokens, tokens)
				}
				got, want := a.usage.PromptTokensDetails.JSON.ExtraFields["cached_images"].Raw(), ""
				if x.images > 0 {
					want = strconv.Itoa(images)
				}
				if got != want {
					t.Errorf("request %d with salt %q: %q pictures cached, want %q", i, salt, got, want)
				}
				if a.text != first.text {
					t.Errorf("request %d with salt %q: %q, at first %q", i, salt, a.text, first.text)
				}
			}
		})
	}
}

// A picture whose KV is in the cache is not encoded, even when its MM object is not there.
func TestPictureInCachedPrefixIsNotEncoded(t *testing.T) {
	t.Parallel()
	c := start(t, "--mm-cache", "0")
	p := ask(t, "Describe each image. How many shapes are in the image?", "case15_0.png", "case16_0.png")
	want, err := c.stream(t.Context(), p, nil)
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.stream(t.Context(), p, nil)
	if err != nil || got.text != want.text {
		t.Errorf("%q, %v; at first %q", got.text, err, want.text)
	}
	if n := c.metric(t, "trireme_mm_cache_hits_total"); n != 2 {
		t.Errorf("%d of two pictures were not encoded", n)
	}
	if n := c.metric(t, "trireme_request_restarts_total"); n != 0 {
		t.Errorf("%d restarts", n)
	}

	// The third picture is new, and the second turn has an answer before it.
	p.Messages = append(p.Messages, openai.AssistantMessage(got.text), userMessage(t, "Describe the image.", "case14_0.png"))
	if got, err = c.stream(t.Context(), p, nil); err != nil {
		t.Fatal(err)
	}
	if n := c.metric(t, "trireme_mm_cache_hits_total"); n != 4 {
		t.Errorf("%d pictures were not encoded, want the two of the turn before", n-2)
	}
	cold := start(t, "--mm-cache", "0", "--kv-cache", "0")
	if want, err := cold.stream(t.Context(), p, nil); err != nil || got.text != want.text {
		t.Errorf("%q, without caches %q, %v", got.text, want.text, err)
	}
	c.expectNoMemory(t)
}
