package token

import (
	"os"
	"strings"
	"testing"
)

// corpus is text of several scripts from the repository's own test vectors, and plain English.
func corpus(b *testing.B, repeat int) string {
	b.Helper()
	var text strings.Builder
	for range repeat {
		text.WriteString("Trireme serves multimodal mixture-of-experts models with the encode, prefill and decode stages on separate NPUs.\n")
		for _, v := range readVectors(b) {
			text.WriteString(v.Text)
			text.WriteByte('\n')
		}
	}
	return text.String()
}

func benchmarkEncode(b *testing.B, tok *Tokenizer, text string) {
	b.SetBytes(int64(len(text)))
	b.ReportAllocs()
	tokens := 0
	for b.Loop() {
		tokens = len(tok.EncodeOrdinary(text))
	}
	b.ReportMetric(float64(tokens)*float64(b.N)/b.Elapsed().Seconds(), "tokens/s")
}

func BenchmarkEncodeMixed(b *testing.B) {
	text := corpus(b, 20)
	b.Run("shapes", func(b *testing.B) { benchmarkEncode(b, shapes(b), text) })
	b.Run("qwen3", func(b *testing.B) { benchmarkEncode(b, qwen3(b), text) })
}

func BenchmarkEncodeEnglish(b *testing.B) {
	data, err := os.ReadFile("tokenizer.go")
	if err != nil {
		b.Fatal(err)
	}
	b.Run("shapes", func(b *testing.B) { benchmarkEncode(b, shapes(b), string(data)) })
	b.Run("qwen3", func(b *testing.B) { benchmarkEncode(b, qwen3(b), string(data)) })
}

// BenchmarkEncodeOneWord has no word boundaries, the worst case for merging.
func BenchmarkEncodeOneWord(b *testing.B) {
	benchmarkEncode(b, shapes(b), strings.Repeat("theing", 100_000))
}

func BenchmarkSplit(b *testing.B) {
	s, text := splitter{digits: 1}, corpus(b, 20)
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		for rest := text; len(rest) > 0; {
			rest = rest[s.next(rest):]
		}
	}
}

func BenchmarkStream(b *testing.B) {
	tok := shapes(b)
	text := corpus(b, 1)
	ids := tok.EncodeOrdinary(text)
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		s := tok.Stream(true)
		for _, id := range ids {
			s.Push(id)
		}
		s.Flush()
	}
}

func BenchmarkLoadQwen3(b *testing.B) {
	qwen3(b)
	for b.Loop() {
		qwen3(b)
	}
}
