package e2e

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/openai/openai-go/v3"
)

// Every reference case gives the reference answer in any topology, all of them at once: in instances with all roles prompts are
// computed beside sequences that decode, and pictures between their steps.
func TestGoldenAnswersInAnyTopology(t *testing.T) {
	t.Parallel()
	for _, topology := range []string{"1EPD", "2EPD", "1E1PD", "1EP1D", "1ED1P", "1EPD1E1P1D", "1EPD1E1P1D --domains per-npu"} {
		t.Run(topology, func(t *testing.T) {
			t.Parallel()
			c := start(t, append([]string{"--threads", "1", "--topology"}, strings.Fields(topology)...)...)
			var wg sync.WaitGroup
			for _, g := range loadGoldens(t) {
				p := g.params(t)
				p.MaxTokens = openai.Int(320) // as the references were made
				wg.Go(func() {
					s, err := c.stream(context.Background(), p, nil)
					if err != nil || s.text != g.Output || s.usage.CompletionTokens != int64(len(g.OutputIDs)) {
						t.Errorf("%s: %v, %q, %d tokens; want %q, %d", g.Name, err, s.text, s.usage.CompletionTokens, g.Output, len(g.OutputIDs))
					}
				})
			}
			wg.Wait()
			c.expectNoMemory(t)
		})
	}
}

// 200 streams at once on instances with all roles: each answer is the one that separate instances give to it alone.
func TestTwoHundredStreamsOnSeveralRoles(t *testing.T) {
	t.Parallel()
	manyAtOnce(t, start(t), start(t, "--topology", "2EPD"), 200)
}

// One NPU holds MM objects, KV of prompts and KV of answers at once, and is full of them. What it will hold is counted before a
// request is let in, so that nobody has to give up what it has, whatever waits for what; and the answers are those that there
// are without haste.
func TestSeveralRolesOnAnNPUThatIsFull(t *testing.T) {
	t.Parallel()
	for _, topology := range []string{"1EPD", "1EP1D", "1E1PD"} {
		t.Run(topology, func(t *testing.T) {
			t.Parallel()
			if yields := fullNPU(t, topology, "4MiB", 8, func(i int, p *openai.ChatCompletionNewParams) {
				p.MaxTokens = openai.Int(int64(20 + i))
			}); yields != 0 {
				t.Errorf("%d requests gave up their memory: what they need was not counted", yields)
			}
		})
	}
}

// salted is a request that shares no cached pictures and no cached KV with others, and gets an answer of full length.
func salted(salt string, p openai.ChatCompletionNewParams) openai.ChatCompletionNewParams {
	p.SetExtraFields(map[string]any{"ignore_eos": true, "cache_salt": salt})
	return p
}

// eightPictures asks about pictures whose MM objects take 1.5 MiB, and the KV 1.6 MiB.
func eightPictures(tb testing.TB, i int) openai.ChatCompletionNewParams {
	tb.Helper()
	var parts []openai.ChatCompletionContentPartUnionParam
	for n := range 8 {
		url := dataURL(tb, filepath.Join(golden, fmt.Sprintf("case23_%d.png", (i+n)%10)))
		parts = append(parts, openai.ImageContentPart(openai.ChatCompletionContentPartImageImageURLParam{URL: url}))
	}
	return openai.ChatCompletionNewParams{
		Model:    "shapes-vl-moe",
		Messages: []openai.ChatCompletionMessageParamUnion{openai.UserMessage(append(parts, openai.TextContentPart("Describe each image.")))},
	}
}

// fullNPU asks for answers about eight pictures each, first one after the other, then all at once, on NPUs that have room for
// one or two of them. It returns how often requests gave their memory up.
func fullNPU(t *testing.T, topology, memory string, requests int, change func(int, *openai.ChatCompletionNewParams)) int {
	c := start(t, "--topology", topology, "--npu-memory", memory, "--threads", "1")
	ask := make([]openai.ChatCompletionNewParams, requests)
	alone := make([]streamed, requests)
	for i := range ask {
		ask[i] = eightPictures(t, i)
		change(i, &ask[i])
		var err error
		if alone[i], err = c.stream(t.Context(), salted("alone", ask[i]), nil); err != nil {
			t.Fatalf("request %d alone: %v", i, err)
		}
	}
	var wg sync.WaitGroup
	for i, p := range ask {
		wg.Go(func() {
			got, err := c.stream(context.Background(), salted(fmt.Sprint(i), p), nil)
			if want := alone[i]; err != nil || got.text != want.text || got.finish != want.finish {
				t.Errorf("request %d: %v, %d bytes (%s), alone %d (%s)", i, err, len(got.text), got.finish, len(want.text), want.finish)
			}
		})
	}
	wg.Wait()
	if n := c.metric(t, "trireme_request_restarts_total"); n != 0 {
		t.Errorf("%d requests were started again as if something had failed", n)
	}
	c.expectNoMemory(t)
	return c.metric(t, "trireme_request_yields_total")
}

// An instance with several roles is one process with one NPU and one heartbeat, and is shown as such.
func TestStatusOfSeveralRoles(t *testing.T) {
	t.Parallel()
	c := start(t, "--topology", "1EPD")
	var stages []string
	for _, i := range c.status(t)["instances"].([]any) {
		i := i.(map[string]any)
		if i["role"] != "gateway" {
			stages = append(stages, fmt.Sprint(i["role"], " ", i["npus"], " ", i["ready"]))
		}
	}
	if got := strings.Join(stages, "; "); got != "encode+prefill+decode [0] true" {
		t.Errorf("status shows %s", got)
	}
	if memory := c.memory(t); len(memory.Memory) != 2 { // of the host, and of the one NPU
		t.Errorf("there are %d NPUs", len(memory.Memory))
	}
}
