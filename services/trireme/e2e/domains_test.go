package e2e

import (
	"context"
	"sync"
	"testing"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"

	"trireme.dev/shared/hbm"
)

// Each NPU a memory domain of its own: what changes hands is copied, and everything is as with one domain. All other tests
// run this way with TRIREME_E2E_DOMAINS=per-npu.
func TestDomainsPerNPU(t *testing.T) {
	t.Parallel()
	c := start(t, append(eachStep(t, 2), "--topology", "2E1P2D", "--domains", "per-npu")...)
	goldens := loadGoldens(t)

	t.Run("goldens", func(t *testing.T) { // with ten pictures, too
		var wg sync.WaitGroup
		for _, g := range goldens {
			p := g.params(t)
			p.MaxTokens = openai.Int(320)
			wg.Go(func() {
				s, err := c.stream(t.Context(), p, nil)
				if err != nil || s.text != g.Output || s.usage.CompletionTokens != int64(len(g.OutputIDs)) {
					t.Errorf("%s: %q, %v; want %q", g.Name, s.text, err, g.Output)
				}
			})
		}
		wg.Wait()
		if n := c.memory(t).Copied; n == 0 {
			t.Error("nothing was copied between domains")
		}
		c.expectNoMemory(t)
	})

	t.Run("choices", func(t *testing.T) {
		p := mixed(t, 3)
		p.N = openai.Int(4)
		client := c.client()
		resp, err := client.Chat.Completions.New(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		p.N = openai.Int(1)
		one, err := client.Chat.Completions.New(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		texts := map[string]bool{}
		for _, ch := range resp.Choices {
			texts[ch.Message.Content] = true
		}
		if len(texts) < 2 || resp.Choices[0].Message.Content != one.Choices[0].Message.Content {
			t.Errorf("n=1 gives %q, n=4 %v", one.Choices[0].Message.Content, texts)
		}
		c.expectNoMemory(t)
	})

	p := mixed(t, 4)
	p.MaxTokens = openai.Int(400)
	p.SetExtraFields(map[string]any{"ignore_eos": true})
	want, err := c.stream(t.Context(), p, nil)
	if err != nil {
		t.Fatal(err)
	}

	// In the middle of an answer its KV lies in one place, the decoder's, but for what prefill's cache keeps; what prefill
	// has had is free, and a successor, in whatever domain, goes on without a prompt token computed again.
	c.during(t, p, func() {
		c.expectMemory(t, "the KV in one domain only", func(s hbm.Stats) bool { return domainsWithKV(s) == 1 })
	})
	c.expectNoMemory(t)
	t.Run("decoder killed", func(t *testing.T) {
		before := c.metric(t, "trireme_prefill_computed_tokens_total")
		got, err := c.stream(t.Context(), p, func(n int) {
			switch n {
			case 30, 90, 150:
				kill(t, c.pid(t, "decoder"))
			}
		})
		if err != nil || got.text != want.text || got.usage.TotalTokens != want.usage.TotalTokens {
			t.Errorf("after kills %q, %v; undisturbed %q", got.text, err, want.text)
		}
		if n := c.metric(t, "trireme_prefill_computed_tokens_total") - before; n != int(got.usage.PromptTokens-got.usage.PromptTokensDetails.CachedTokens) {
			t.Errorf("%d prompt tokens were computed, %d are in the prompt and not cached", n, got.usage.PromptTokens)
		}
	})
	for _, role := range []string{"encoder", "prefill"} {
		t.Run(role+" killed", func(t *testing.T) {
			c.waitReady(t)
			kill(t, c.pid(t, role))
			q := p
			q.SetExtraFields(map[string]any{"ignore_eos": true, "cache_salt": role}) // nothing cached
			got, err := c.stream(t.Context(), q, nil)
			if err != nil || got.text != want.text {
				t.Errorf("after the kill %q, %v; undisturbed %q", got.text, err, want.text)
			}
		})
	}
	c.waitReady(t)
	c.expectNoMemory(t)
}

// during asks for a long answer, calls f in the middle of it and leaves.
func (c *cluster) during(tb testing.TB, p openai.ChatCompletionNewParams, f func()) {
	tb.Helper()
	p.MaxTokens = openai.Int(4000) // not over before f is: 8 s, where a step takes 2 ms at the least
	ctx, cancel := context.WithCancel(tb.Context())
	defer cancel()
	called := false
	_, err := c.stream(ctx, p, func(n int) {
		if n == 20 {
			called = true
			f()
			cancel()
		}
	})
	if !called {
		tb.Errorf("the answer ended before its middle: %v", err)
	}
}

// domainsWithKV is the number of NPUs with KV that somebody holds.
func domainsWithKV(s hbm.Stats) int {
	n := 0
	for _, m := range s.Memory {
		if kv := m.Kinds["kv"]; kv.Used+kv.Padded > kv.Cached {
			n++
		}
	}
	return n
}

// A conversation in domains of their own: prefill copies the blocks that a decoder has filled, and computes only what is
// new.
func TestConversationAcrossDomains(t *testing.T) {
	t.Parallel()
	cold := start(t, "--mm-cache", "0", "--kv-cache", "0")
	c := start(t, "--topology", "1E1P1D", "--domains", "per-npu", "--kv-cache", "256MiB")
	p := openai.ChatCompletionNewParams{Model: "shapes-vl-moe", Temperature: openai.Float(0), MaxTokens: openai.Int(200)}
	before := 0
	for i, turn := range []openai.ChatCompletionMessageParamUnion{
		userMessage(t, "Describe the image.", "case15_0.png"),
		userMessage(t, "How many shapes are in the image?", "case16_0.png"),
		userMessage(t, "Where is the star?"),
	} {
		p.Messages = append(p.Messages, turn)
		client, coldClient := c.client(), cold.client()
		got, err := client.Chat.Completions.New(t.Context(), p, option.WithMaxRetries(0))
		if err != nil {
			t.Fatal(err)
		}
		want, err := coldClient.Chat.Completions.New(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		text := got.Choices[0].Message.Content
		if text != want.Choices[0].Message.Content {
			t.Errorf("turn %d: %q, without caches %q", i+1, text, want.Choices[0].Message.Content)
		}
		if cached := int(got.Usage.PromptTokensDetails.CachedTokens); cached != before/16*16 {
			t.Errorf("turn %d: %d tokens cached, %d were there", i+1, cached, before)
		}
		before = int(got.Usage.TotalTokens) - 1
		c.expectNoMemory(t) // so the turn's blocks are in the cache
		p.Messages = append(p.Messages, openai.AssistantMessage(text))
	}
}
