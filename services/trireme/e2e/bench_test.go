package e2e

import (
	"context"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/openai/openai-go/v3"
)

// BenchmarkServe measures what a client sees of `trireme up` with one encoder, prefill and decoder: median TTFT and
// tokens per second, for one text request, one picture, and 32 requests at once.
func BenchmarkServe(b *testing.B) {
	c := start(b)
	text := openai.ChatCompletionNewParams{
		Model:     "shapes-vl-moe",
		Messages:  []openai.ChatCompletionMessageParamUnion{openai.UserMessage("Count from 3 to 57.")},
		MaxTokens: openai.Int(128),
	}
	picture := openai.ChatCompletionNewParams{
		Model: "shapes-vl-moe",
		Messages: []openai.ChatCompletionMessageParamUnion{openai.UserMessage([]openai.ChatCompletionContentPartUnionParam{
			openai.ImageContentPart(openai.ChatCompletionContentPartImageImageURLParam{URL: dataURL(b, filepath.Join(golden, "case15_0.png"))}),
			openai.TextContentPart("Describe the image."),
		})},
	}
	for name, x := range map[string]struct {
		at     int
		params []openai.ChatCompletionNewParams
	}{
		"text":     {1, []openai.ChatCompletionNewParams{text}},
		"picture":  {1, []openai.ChatCompletionNewParams{picture}},
		"32atonce": {32, []openai.ChatCompletionNewParams{text, picture}},
	} {
		b.Run(name, func(b *testing.B) {
			var first []time.Duration
			tokens := 0
			begin := time.Now()
			for b.Loop() {
				var wg sync.WaitGroup
				var mu sync.Mutex
				for i := range x.at {
					wg.Go(func() {
						s, err := c.stream(context.Background(), x.params[i%len(x.params)], nil)
						mu.Lock()
						defer mu.Unlock()
						if err != nil {
							b.Error(err)
							return
						}
						first = append(first, s.first)
						tokens += int(s.usage.CompletionTokens)
					})
				}
				wg.Wait()
			}
			slices.Sort(first)
			if len(first) == 0 {
				return
			}
			b.ReportMetric(float64(first[len(first)/2].Microseconds())/1000, "ms-TTFT-p50")
			b.ReportMetric(float64(tokens)/time.Since(begin).Seconds(), "tokens/s")
		})
	}
}
