package e2e

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
)

// Answers of unbounded length that cannot all fit to their ends: each is the one that it is alone, and none is refused.
// Each grows to all of the NPU. Half of them begin alike with more than a slab of 256 tokens, which they share when it is
// in the cache, in the memory that they grow into.
func TestMoreAnswersThanRoom(t *testing.T) {
	t.Parallel()
	t.Run("for one", func(t *testing.T) { moreThanRoom(t, "1E1P1D", "4MiB", 1200, 4, 2) }) // 5 slabs
	t.Run("for two at first", func(t *testing.T) { moreThanRoom(t, "1E1P1D", "9MiB", 2500, 5, 3) })
	// Prompts that wait for room wait for the very memory that the answers grow into.
	t.Run("for two at first, prompts included", func(t *testing.T) { moreThanRoom(t, "1EPD", "9MiB", 2500, 5, 3) })
}

// moreThanRoom asks for answers that fill an NPU with so many tokens, first alone, then at once.
func moreThanRoom(t *testing.T, topology, memory string, fill int64, requests, alike int) {
	t.Parallel()
	patient := []string{"TRIREME_QUEUE_WAIT=20m"} // a slow machine is no reason to refuse
	c := startWith(t, patient, "--topology", topology, "--npu-memory", memory)
	client := c.client()
	ask := func(i int) (string, int64, error) {
		p := openai.ChatCompletionNewParams{
			Model:       "shapes-vl-moe",
			Messages:    []openai.ChatCompletionMessageParamUnion{openai.UserMessage(fmt.Sprintf("Count from 3 to %d.", 9+i))},
			Temperature: openai.Float(0),
		}
		if i < alike {
			text := strings.Repeat("Count from 3 to 57. ", 40)
			p.Messages = append([]openai.ChatCompletionMessageParamUnion{openai.SystemMessage(text)}, p.Messages...)
		}
		r, err := client.Chat.Completions.New(t.Context(), p, option.WithJSONSet("ignore_eos", true))
		if err != nil {
			return "", 0, err
		}
		if all := r.Usage.TotalTokens; all < fill {
			err = fmt.Errorf("%d tokens do not fill the NPU", all)
		}
		return r.Choices[0].Message.Content, r.Usage.PromptTokens, err
	}
	alone := make([]string, requests)
	for i := range alone {
		text, prompt, err := ask(i)
		if err != nil {
			t.Fatal(err)
		}
		if alone[i] = text; i < alike && prompt < 300 {
			t.Fatalf("prompt %d has %d tokens only", i, prompt)
		}
	}
	if n := c.metric(t, "trireme_prefix_cache_hits_total"); n < (alike-1)*256 {
		t.Errorf("%d tokens came from the cache, a slab of each prompt that begins like the one before was there", n)
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
	t.Logf("%d tokens from the cache, %d yields", c.metric(t, "trireme_prefix_cache_hits_total"), c.metric(t, "trireme_request_yields_total"))
}
