package e2e

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/openai/openai-go/v3"

	"trireme.dev/shared/wire"
)

// Instances of several NPUs, with experts spread over them, give every reference answer, all at once: in one memory domain, and
// with a domain for each NPU, where an NPU has the memory of no other one.
func TestGoldenAnswersOnSeveralNPUs(t *testing.T) {
	t.Parallel()
	for _, x := range []struct{ topology, domains string }{
		{"1E1P1Dx4", "node"}, {"1Ex2,1Px2,1Dx3", "per-npu"}, {"1EPDx5", "per-npu"},
	} {
		t.Run(x.topology+" "+x.domains, func(t *testing.T) {
			t.Parallel()
			c := start(t, "--topology", x.topology, "--domains", x.domains, "--threads", "1")
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

// A decoder goes from one NPU to 64, more than a layer has experts, and through numbers that do not divide them, each NPU a memory domain, while
// reference answers are given.
func TestAnyNumberOfNPUs(t *testing.T) {
	t.Parallel()
	c := start(t, "--topology", "1E1P1D+63", "--domains", "per-npu", "--npu-memory", "64MiB", "--threads", "1")
	goldens := loadGoldens(t)
	var stop atomic.Bool
	var asking sync.WaitGroup
	for i := range 4 {
		asking.Go(func() {
			for n := i; !stop.Load() || n == i; n += 4 {
				g := goldens[n%len(goldens)]
				p := g.params(t)
				p.MaxTokens = openai.Int(320) // as the references were made
				if s, err := c.stream(context.Background(), p, nil); err != nil || s.text != g.Output {
					t.Errorf("%s: %v, %q; want %q", g.Name, err, s.text, g.Output)
				}
			}
		})
	}
	for _, npus := range []int{64, 7, 63, 13, 64, 1} {
		r, err := c.change(t, "scale", "decoder", fmt.Sprint(npus), "--timeout", "5m")
		if err != nil || !r.Committed || r.Why != "" || wire.NPUCount(r.Plan.After) != npus {
			t.Errorf("%d NPUs: %+v, %v", npus, r, err)
		}
	}
	stop.Store(true)
	asking.Wait()
	c.expectNoMemory(t)
}

// 200 streams at once on a decoder of three NPUs, each a memory domain: each answer is the one that one NPU gives to it alone.
// Every NPU has a part of them.
func TestTwoHundredStreamsOnSeveralNPUs(t *testing.T) {
	t.Parallel()
	c := start(t, "--topology", "1E1P1Dx3", "--domains", "per-npu")
	manyAtOnce(t, start(t), c, 200)
	decoders := 0
	for _, m := range c.memory(t).Memory {
		if strings.HasPrefix(m.Instance, "decode") {
			decoders++
			if m.Kinds["kv"].Peak == 0 {
				t.Errorf("NPU %d of the decoder never had any KV", m.NPU)
			}
		}
	}
	if decoders != 3 {
		t.Errorf("the decoder has %d NPUs", decoders)
	}
}

// A decoder of three NPUs that is killed in the middle of answers is succeeded, and nobody sees it; memory is where it was.
func TestSeveralNPUsKilled(t *testing.T) {
	t.Parallel()
	c := start(t, "--topology", "1E1P1Dx3")
	const streams = 9
	var want [streams]streamed
	ask := func(i int) openai.ChatCompletionNewParams {
		p := mixed(t, i)
		p.MaxTokens = openai.Int(200)
		p.SetExtraFields(map[string]any{"ignore_eos": true, "cache_salt": fmt.Sprint(i)})
		return p
	}
	for i := range want {
		var err error
		if want[i], err = c.stream(t.Context(), ask(i), nil); err != nil {
			t.Fatal(err)
		}
	}
	var wg sync.WaitGroup
	for i := range want {
		p := ask(i)
		wg.Go(func() {
			got, err := c.stream(context.Background(), p, func(n int) {
				if i == 0 && (n == 30 || n == 90) {
					kill(t, c.pid(t, "decoder"))
				}
			})
			if err != nil || got.text != want[i].text {
				t.Errorf("stream %d after kills %q, %v; undisturbed %q", i, got.text, err, want[i].text)
			}
		})
	}
	wg.Wait()
	c.waitReady(t)
	c.expectNoMemory(t)
}
