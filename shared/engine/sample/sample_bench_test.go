package sample

import (
	"math/rand/v2"
	"testing"
)

// BenchmarkNext samples from a vocabulary of Qwen3's size.
func BenchmarkNext(b *testing.B) {
	const vocab = 151_936
	r := rand.New(rand.NewPCG(1, 1))
	logits := make([]float32, vocab)
	for i := range logits {
		logits[i] = float32(r.NormFloat64() * 3)
	}
	for _, c := range []struct {
		name string
		p    Params
	}{
		{"greedy", Params{TopLogprobs: -1}},
		{"greedy,logprobs=20", Params{TopLogprobs: 20}},
		{"temperature", Params{Temperature: 0.7, TopLogprobs: -1}},
		{"top_k=20,top_p=0.8", Params{Temperature: 0.7, TopK: 20, TopP: 0.8, TopLogprobs: -1}},
		{"top_p=0.95", Params{Temperature: 1, TopP: 0.95, TopLogprobs: -1}},
	} {
		b.Run(c.name, func(b *testing.B) {
			s := New(c.p, NewSpace(vocab), nil, nil)
			b.ReportAllocs()
			for b.Loop() {
				s.Next(logits, s.Len())
			}
		})
	}
}
