package e2e

import (
	"fmt"
	"sync"
	"testing"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
)

// Answers of unbounded length that cannot all fit to their ends: each is the one that it is alone, and none is refused.
// An NPU of 4 MiB holds 5 slabs of 256 tokens; each answer grows to all of them, and six are let in as they come.
func TestMoreAnswersThanRoom(t *testing.T) {
	c := start(t, "--npu-memory", "4MiB")
	client := c.client()
	ask := func(i int) (string, int64, error) {
		p := openai.ChatCompletionNewParams{
			Model:       "shapes-vl-moe",
			Messages:    []openai.ChatCompletionMessageParamUnion{openai.UserMessage(fmt.Sprintf("Count from 3 to %d.", 9+i))},
			Temperature: openai.Float(0),
		}
		r, err := client.Chat.Completions.New(t.Context(), p, option.WithJSONSet("ignore_eos", true))
		if err != nil {
			return "", 0, err
		}
		return r.Choices[0].Message.Content, r.Usage.CompletionTokens, nil
	}
	const requests = 6
	var alone [requests]string
	for i := range alone {
		text, tokens, err := ask(i)
		if err != nil {
			t.Fatal(err)
		}
		if alone[i] = text; tokens < 1000 {
			t.Fatalf("answer %d has %d tokens only", i, tokens)
		}
	}
	var wg sync.WaitGroup
	for i, want := range alone {
		wg.Go(func() {
			if got, _, err := ask(i); err != nil || got != want {
				t.Errorf("answer %d: %v; %d bytes, alone %d", i, err, len(got), len(want))
			}
		})
	}
	wg.Wait()
}
