package token

import (
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// mergeSlow is byte-pair encoding as its definition has it.
func (t *Tokenizer) mergeSlow(word string) []int32 {
	var symbols []int32
	for i := range len(word) {
		symbols = append(symbols, t.bytes[word[i]])
	}
	for {
		best, lowest := -1, merge{rank: noRank}
		for i := 0; i+1 < len(symbols); i++ {
			if m := t.rank(symbols[i], symbols[i+1]); m.rank < lowest.rank {
				best, lowest = i, m
			}
		}
		if best < 0 {
			return symbols
		}
		symbols = slices.Replace(symbols, best, best+2, lowest.id)
	}
}

func TestMergeAgainstDefinition(t *testing.T) {
	tok := shapes(t)
	syllable := rapid.SampledFrom([]string{"a", "e", "l", "s", "t", "th", "he", "in", "ing", "circle", "red", " ", "small", "é", "q"})
	rapid.Check(t, func(t *rapid.T) {
		word := strings.Join(rapid.SliceOfN(syllable, 1, 60).Draw(t, "word"), "")
		want := tok.mergeSlow(word)
		symbols := func() []int32 {
			var s []int32
			for i := range len(word) {
				s = append(s, tok.bytes[word[i]])
			}
			return s
		}
		if got := tok.mergeLong(symbols()); !slices.Equal(got, want) {
			t.Fatalf("with a heap %q is %v, want %v", word, got, want)
		}
		if len(word) <= shortWord {
			if got := tok.mergeShort(symbols()); !slices.Equal(got, want) {
				t.Fatalf("by scanning %q is %v, want %v", word, got, want)
			}
		}
	})
}

// TestLongWord would take hours were merging quadratic.
func TestLongWord(t *testing.T) {
	tok := shapes(t)
	text := strings.Repeat("theing", 500_000)
	if got := tok.Decode(tok.EncodeOrdinary(text), false); got != text {
		t.Error("a word of 3 MB does not survive")
	}
}

func TestCacheIsBounded(t *testing.T) {
	tok := shapes(t)
	long := strings.Repeat("a", cachedWord+1)
	tok.EncodeOrdinary(long)
	if e := tok.cache.slot(long).Load(); e != nil && e.word == long {
		t.Error("a long word was cached")
	}
	tok.EncodeOrdinary("circle")
	if e := tok.cache.slot("circle").Load(); e == nil || e.word != "circle" {
		t.Error("a short word was not cached")
	}
}
