package e2e

import (
	"context"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/openai/openai-go/v3"
)

// BenchmarkServe measures what a client sees of `trireme up` with one encoder, prefill and decoder: median TTFT and
// tokens per second, for one text request, one picture, one that is cached, and 32 requests at once, half of them with a
// new picture.
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
	salt := 0
	fresh := func() openai.ChatCompletionNewParams { // a picture that is in no cache under this name
		p := picture
		salt++
		p.SetExtraFields(map[string]any{"cache_salt": strconv.Itoa(salt)})
		return p
	}
	same := func(p openai.ChatCompletionNewParams) func(int) openai.ChatCompletionNewParams {
		return func(int) openai.ChatCompletionNewParams { return p }
	}
	for _, x := range []struct {
		name   string
		at     int
		params func(i int) openai.ChatCompletionNewParams
	}{
		{"text", 1, same(text)},
		{"picture", 1, func(int) openai.ChatCompletionNewParams { return fresh() }},
		{"cached picture", 1, same(picture)},
		{"32 at once", 32, func(i int) openai.ChatCompletionNewParams {
			if i%2 == 0 {
				return text
			}
			return fresh()
		}},
	} {
		b.Run(x.name, func(b *testing.B) {
			var first []time.Duration
			tokens := 0
			begin := time.Now()
			for b.Loop() {
				var wg sync.WaitGroup
				var mu sync.Mutex
				for i := range x.at {
					params := x.params(i)
					wg.Go(func() {
						s, err := c.stream(context.Background(), params, nil)
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
