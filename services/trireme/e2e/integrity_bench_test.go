package e2e

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/openai/openai-go/v3"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/hf"
	"trireme.dev/shared/kv"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/wire"
)

// BenchmarkChecksums measures what checksums cost a request with a prompt of 4,096 tokens and ten pictures, none of it in
// a cache: the time of all of its checksums, done again on the objects that it has left, against its TTFT in the same run.
// Counted are both ends of each hand-over, though only what comes before the first token is part of the TTFT: pictures
// and MM objects sealed and verified, KV blocks sealed by prefill and verified, with the log, by the decoder.
func BenchmarkChecksums(b *testing.B) {
	c := inProcess(b, false)
	r := newRogue(b, c)
	f, err := hf.Open(filepath.Join(root, "models/shapes-vl-moe"))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	text := &f.Config.Text
	parts := []openai.ChatCompletionContentPartUnionParam{openai.TextContentPart(strings.Repeat("Count from 3 to 57. ", 372))}
	for i := range 10 {
		parts = append(parts, openai.ImageContentPart(openai.ChatCompletionContentPartImageImageURLParam{
			URL: dataURL(b, filepath.Join(golden, fmt.Sprintf("case23_%d.png", i))),
		}))
	}
	p := openai.ChatCompletionNewParams{
		Model: "shapes-vl-moe", Messages: []openai.ChatCompletionMessageParamUnion{openai.UserMessage(parts)},
		Temperature: openai.Float(0), MaxTokens: openai.Int(2),
	}
	timed := func(f func()) time.Duration {
		begin := time.Now()
		f()
		return time.Since(begin)
	}
	var ttft, sums, kvs, mms, pixels []time.Duration
	tokens := 0
	run := func(salt string) {
		p := p
		p.SetExtraFields(map[string]any{"ignore_eos": true, "cache_salt": salt})
		release := r.hold(stage.Decode)
		done := make(chan streamed, 1)
		go func() {
			s, err := c.stream(b.Context(), p, nil)
			if err != nil {
				b.Error(err)
			}
			done <- s
		}()
		d := decoded[wire.Decode](r, r.message(stage.Decode, nil))
		log := r.attach(d.Log)
		l, err := kv.OpenLog(log.Bytes())
		r.must(err)
		var slabs []kv.Slab
		for i := range l.SlabCount() {
			h, _, err := l.Slab(i)
			r.must(err)
			h.Node = d.Log.Node
			slabs = append(slabs, r.attach(h))
		}
		tokens = l.Shape().Prompt
		var seq *kv.Sequence
		open := timed(func() { seq, err = kv.OpenSequence(text, l, slabs) })
		r.must(err)
		// What sealing a block costs is what it takes to look at it: one more opening, which does little else.
		again := timed(func() { _, err = kv.OpenSequence(text, l, slabs) })
		r.must(err)
		if n := len(seq.Blocks); n != kv.Blocks(tokens) || tokens < 4096 {
			b.Fatalf("%d blocks of %d tokens", n, tokens)
		}
		twice := func(handles ...mem.Handle) (sum time.Duration) {
			for _, h := range handles {
				o := r.attach(h)
				sum += timed(func() { r.must(o.Verify()); r.must(o.Verify()) })
				r.free(o)
			}
			return sum
		}
		mm := twice(decoded[wire.Prefill](r, r.newest(stage.Prefill)).MM...)
		var encoded []mem.Handle
		for _, m := range r.snapshot() {
			if to(stage.Encode)(m) {
				if e := decoded[wire.Encode](r, m.Data); e.Request.ID == d.Request.ID {
					encoded = append(encoded, e.Pixels)
				}
			}
		}
		pictures := twice(encoded...)
		r.free(log)
		for _, s := range slabs {
			r.free(s.(*hbm.Object))
		}
		release()
		s := <-done
		ttft, kvs, mms, pixels = append(ttft, s.first), append(kvs, open+again), append(mms, mm), append(pixels, pictures)
		sums = append(sums, open+again+mm+pictures)
	}
	run("warm")
	ttft, sums, kvs, mms, pixels = nil, nil, nil, nil, nil
	n := 0
	for b.Loop() {
		run(fmt.Sprint(n))
		n++
	}
	median := func(d []time.Duration) float64 {
		slices.Sort(d)
		return float64(d[len(d)/2].Microseconds()) / 1000
	}
	b.ReportMetric(float64(tokens), "tokens")
	b.ReportMetric(median(ttft), "ms-TTFT")
	b.ReportMetric(median(kvs), "ms-KV")
	b.ReportMetric(median(mms), "ms-MM")
	b.ReportMetric(median(pixels), "ms-pictures")
	b.ReportMetric(100*median(sums)/median(ttft), "%-of-TTFT")
}
