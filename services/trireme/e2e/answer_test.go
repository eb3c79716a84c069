package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
)

// Every reference case, asked through all stages with the official client, gives the reference answer.
func TestGoldenAnswers(t *testing.T) {
	t.Parallel()
	c := start(t)
	client := c.client()
	for _, g := range loadGoldens(t) {
		t.Run(g.Name, func(t *testing.T) {
			p := g.params(t)
			p.MaxTokens = openai.Int(320) // as the references were made
			resp, err := client.Chat.Completions.New(t.Context(), p)
			if err != nil {
				t.Fatal(err)
			}
			if got := resp.Choices[0].Message.Content; got != g.Output {
				t.Errorf("answer %q, want %q", got, g.Output)
			}
			if resp.Usage.PromptTokens != int64(len(g.InputIDs)) || resp.Usage.CompletionTokens != int64(len(g.OutputIDs)) {
				t.Errorf("usage %d+%d tokens, want %d+%d", resp.Usage.PromptTokens, resp.Usage.CompletionTokens,
					len(g.InputIDs), len(g.OutputIDs))
			}
			s, err := c.stream(t.Context(), p, nil)
			if err != nil {
				t.Fatal(err)
			}
			if s.text != g.Output || s.usage.CompletionTokens != int64(len(g.OutputIDs)) {
				t.Errorf("streamed %q, %d tokens; want %q, %d", s.text, s.usage.CompletionTokens, g.Output, len(g.OutputIDs))
			}
		})
	}
}

// mixed makes request number i of a mixed load: 0 to 4 pictures, greedy or seeded sampling, one or two choices.
func mixed(tb testing.TB, i int) openai.ChatCompletionNewParams {
	tb.Helper()
	rng := rand.New(rand.NewPCG(1, uint64(i)))
	pictures := i % 5
	var parts []openai.ChatCompletionContentPartUnionParam
	for range pictures {
		url := dataURL(tb, filepath.Join(golden, fmt.Sprintf("case23_%d.png", rng.IntN(10))))
		parts = append(parts, openai.ImageContentPart(openai.ChatCompletionContentPartImageImageURLParam{URL: url}))
	}
	question := []string{"Describe the image.", "How many shapes are in the image?", "Where is the star?", "Describe each image."}[rng.IntN(4)]
	if pictures == 0 {
		question = fmt.Sprintf("Count from %d to %d.", rng.IntN(20), 20+rng.IntN(30))
	}
	p := openai.ChatCompletionNewParams{
		Model:     "shapes-vl-moe",
		Messages:  []openai.ChatCompletionMessageParamUnion{openai.UserMessage(append(parts, openai.TextContentPart(question)))},
		MaxTokens: openai.Int(int64(20 + rng.IntN(60))),
	}
	if i%2 == 1 {
		p.Temperature = openai.Float(0.5 + rng.Float64())
		p.TopP = openai.Float(0.9)
		p.Seed = openai.Int(int64(rng.Uint32()))
	}
	if i%8 == 3 {
		p.FrequencyPenalty = openai.Float(0.4)
	}
	return p
}

// 200 streams at once, mixed 0 to 4 pictures, greedy and seeded: each answer is the one that it gets alone.
func TestTwoHundredStreamsAtOnce(t *testing.T) {
	t.Parallel()
	c := start(t, "--topology", "2E1P2D")
	manyAtOnce(t, c, c, 200)
}

// manyAtOnce asks one cluster for mixed answers one after the other, and then another, or the same one, for all at once.
func manyAtOnce(t *testing.T, first, c *cluster, streams int) {
	t.Helper()
	alone := make([]streamed, streams)
	for i := range streams {
		s, err := first.stream(t.Context(), mixed(t, i), nil)
		if err != nil {
			t.Fatalf("request %d alone: %v", i, err)
		}
		alone[i] = s
	}
	distinct := map[string]bool{}
	var wg sync.WaitGroup
	gate := make(chan struct{})
	got := make([]streamed, streams)
	errs := make([]error, streams)
	for i := range streams {
		distinct[alone[i].text] = true
		p := mixed(t, i)
		wg.Go(func() {
			<-gate
			got[i], errs[i] = c.stream(context.Background(), p, nil)
		})
	}
	close(gate)
	wg.Wait()
	for i := range streams {
		switch {
		case errs[i] != nil:
			t.Errorf("request %d: %v", i, errs[i])
		case got[i].text != alone[i].text || got[i].finish != alone[i].finish || got[i].usage.TotalTokens != alone[i].usage.TotalTokens:
			t.Errorf("request %d: %q (%s, %d tokens) among others, %q (%s, %d tokens) alone", i, got[i].text, got[i].finish,
				got[i].usage.TotalTokens, alone[i].text, alone[i].finish, alone[i].usage.TotalTokens)
		}
	}
	if len(distinct) < streams/4 {
		t.Errorf("only %d different answers among %d: the load is not mixed", len(distinct), streams)
	}
	c.expectNoMemory(t)
}

// Several choices share the prompt's KV and differ only by their draws; each equals the answer at n=1 of its draw, which
// the first one shows.
func TestChoices(t *testing.T) {
	t.Parallel()
	c := start(t)
	client := c.client()
	p := mixed(t, 3)
	p.N = openai.Int(4)
	p.Logprobs = openai.Bool(true)
	p.TopLogprobs = openai.Int(3)
	first, err := client.Chat.Completions.New(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	again, err := client.Chat.Completions.New(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	texts := map[string]bool{}
	for i, ch := range first.Choices {
		if ch.Message.Content != again.Choices[i].Message.Content {
			t.Errorf("choice %d: %q, then with the same seed %q", i, ch.Message.Content, again.Choices[i].Message.Content)
		}
		if len(ch.Logprobs.Content) == 0 || len(ch.Logprobs.Content[0].TopLogprobs) != 3 {
			t.Errorf("choice %d has logprobs for %d tokens", i, len(ch.Logprobs.Content))
		}
		texts[ch.Message.Content] = true
	}
	if len(first.Choices) != 4 || len(texts) < 2 {
		t.Errorf("%d choices, %d different", len(first.Choices), len(texts))
	}
	p.N = openai.Int(1)
	one, err := client.Chat.Completions.New(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	if one.Choices[0].Message.Content != first.Choices[0].Message.Content {
		t.Errorf("n=1 gives %q, the first of n=4 %q", one.Choices[0].Message.Content, first.Choices[0].Message.Content)
	}
	c.expectNoMemory(t)
}

// A long answer passes the window of unconfirmed tokens and several KV slabs.
func TestLongAnswer(t *testing.T) {
	t.Parallel()
	c := start(t)
	p := openai.ChatCompletionNewParams{
		Model:     "shapes-vl-moe",
		Messages:  []openai.ChatCompletionMessageParamUnion{openai.UserMessage("Count from 1 to 90.")},
		MaxTokens: openai.Int(1500),
	}
	client := c.client()
	resp, err := client.Chat.Completions.New(t.Context(), p, option.WithJSONSet("ignore_eos", true))
	if err != nil {
		t.Fatal(err)
	}
	if resp.Usage.CompletionTokens != 1500 || resp.Choices[0].FinishReason != "length" {
		t.Errorf("%d tokens, finish %q", resp.Usage.CompletionTokens, resp.Choices[0].FinishReason)
	}
	if !strings.HasPrefix(resp.Choices[0].Message.Content, "1 2 3 4 5 6 7 8 9 10 11") {
		t.Errorf("answer begins %.60q", resp.Choices[0].Message.Content)
	}
	c.expectNoMemory(t)
}

func TestCompletionsTakeTextAndIDs(t *testing.T) {
	t.Parallel()
	c := start(t)
	g := loadGoldens(t)[1] // text only
	client := c.client()
	for name, prompt := range map[string]openai.CompletionNewParamsPromptUnion{
		"ids":  {OfArrayOfTokens: g.InputIDs},
		"text": {OfString: openai.String("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nCount from 3 to 57.<|im_end|>\n<|im_start|>assistant\n")},
	} {
		resp, err := client.Completions.New(t.Context(), openai.CompletionNewParams{
			Model: "shapes-vl-moe", Prompt: prompt, MaxTokens: openai.Int(320),
		})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if resp.Choices[0].Text != g.Output || resp.Usage.PromptTokens != int64(len(g.InputIDs)) {
			t.Errorf("%s: %q with %d prompt tokens, want %q with %d", name, resp.Choices[0].Text, resp.Usage.PromptTokens,
				g.Output, len(g.InputIDs))
		}
	}
}
