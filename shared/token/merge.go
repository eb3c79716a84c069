package token

import (
	"hash/maphash"
	"math"
	"strings"
	"sync/atomic"
)

// pair is two neighbouring token ids.
type pair struct{ left, right int32 }

// merge says that a pair may become one token. Lower ranks go first.
type merge struct{ rank, id int32 }

// noRank marks a place where no merge begins.
const noRank = math.MaxInt32

const (
	shortWord  = 32      // bytes; up to here a plain scan for the lowest rank beats a heap
	cachedWord = 64      // bytes; longer words are not cached, which bounds the cache's memory
	cacheSlots = 1 << 14 // words
)

// encodeWord appends the ids of one word. The word's merges do not depend on its surroundings, so short words are cached.
func (t *Tokenizer) encodeWord(ids []int, word string) []int {
	if len(word) == 1 {
		if id := t.bytes[word[0]]; id >= 0 {
			ids = append(ids, int(id))
		}
		return ids
	}
	if len(word) > cachedWord {
		return appendIDs(ids, t.mergeWord(word))
	}
	slot := t.cache.slot(word)
	if e := slot.Load(); e != nil && e.word == word {
		return appendIDs(ids, e.ids)
	}
	e := &cachedIDs{word: strings.Clone(word), ids: t.mergeWord(word)}
	slot.Store(e)
	return appendIDs(ids, e.ids)
}

func appendIDs(ids []int, more []int32) []int {
	for _, id := range more {
		ids = append(ids, int(id))
	}
	return ids
}

// mergeWord returns the ids of word: its bytes, with the pair of lowest rank (the leftmost of equals) merged until no
// pair has a rank.
func (t *Tokenizer) mergeWord(word string) []int32 {
	symbols := make([]int32, 0, len(word))
	for i := range len(word) {
		if id := t.bytes[word[i]]; id >= 0 {
			symbols = append(symbols, id)
		}
	}
	if len(symbols) <= shortWord {
		return t.mergeShort(symbols)
	}
	return t.mergeLong(symbols)
}

// rank returns the merge of two neighbours; its rank is noRank if there is none.
func (t *Tokenizer) rank(left, right int32) merge {
	if m, ok := t.merges[pair{left, right}]; ok {
		return m
	}
	return merge{rank: noRank}
}

// mergeShort merges in place, in time quadratic in len(symbols), which is at most shortWord.
func (t *Tokenizer) mergeShort(symbols []int32) []int32 {
	if len(symbols) < 2 {
		return symbols
	}
	var buf [shortWord]merge // buf[i] is the merge of symbols i and i+1
	merges := buf[:len(symbols)-1]
	for i := range merges {
		merges[i] = t.rank(symbols[i], symbols[i+1])
	}
	for {
		best := -1
		lowest := int32(noRank)
		for i := range merges {
			if merges[i].rank < lowest {
				best, lowest = i, merges[i].rank
			}
		}
		if best < 0 {
			return symbols
		}
		symbols[best] = merges[best].id
		symbols = append(symbols[:best+1], symbols[best+2:]...)
		merges = append(merges[:best], merges[best+1:]...)
		if best < len(merges) {
			merges[best] = t.rank(symbols[best], symbols[best+1])
		}
		if best > 0 {
			merges[best-1] = t.rank(symbols[best-1], symbols[best])
		}
	}
}

// mergeLong does the same with a heap and a doubly linked list, in time n log n. It overwrites symbols.
func (t *Tokenizer) mergeLong(symbols []int32) []int32 {
	n := len(symbols)
	// A node is a symbol and its merge with the next one. next == n ends the list; previous == -1 begins it.
	type node struct {
		merge          merge
		previous, next int32
	}
	nodes := make([]node, n)
	heap := make(mergeHeap, 0, n)
	for i := range nodes {
		nodes[i] = node{merge: merge{rank: noRank}, previous: int32(i) - 1, next: int32(i) + 1}
		if i+1 < n {
			nodes[i].merge = t.rank(symbols[i], symbols[i+1])
			heap.push(nodes[i].merge.rank, int32(i))
		}
	}
	renew := func(i int32) {
		nodes[i].merge = merge{rank: noRank}
		if next := nodes[i].next; next < int32(n) {
			nodes[i].merge = t.rank(symbols[i], symbols[next])
			heap.push(nodes[i].merge.rank, i)
		}
	}
	for len(heap) > 0 {
		rank, i := heap.pop()
		if nodes[i].merge.rank != rank {
			continue // the pair that was here is gone
		}
		gone := nodes[i].next
		symbols[i] = nodes[i].merge.id
		nodes[i].next = nodes[gone].next
		nodes[gone].merge.rank = noRank
		if next := nodes[i].next; next < int32(n) {
			nodes[next].previous = i
		}
		renew(i)
		if previous := nodes[i].previous; previous >= 0 {
			renew(previous)
		}
	}
	kept := symbols[:0]
	for i := int32(0); i < int32(n); i = nodes[i].next {
		kept = append(kept, symbols[i])
	}
	return kept
}

// mergeHeap is a binary min-heap of (rank, position), packed so that one comparison orders both.
type mergeHeap []uint64

// push adds a candidate; one without a rank is not one.
func (h *mergeHeap) push(rank, position int32) {
	if rank == noRank {
		return
	}
	a := append(*h, uint64(rank)<<32|uint64(position))
	i := len(a) - 1
	for i > 0 {
		parent := (i - 1) / 2
		if a[parent] <= a[i] {
			break
		}
		a[parent], a[i] = a[i], a[parent]
		i = parent
	}
	*h = a
}

// pop removes the lowest rank, the leftmost position of equals. The heap must not be empty.
func (h *mergeHeap) pop() (rank, position int32) {
	a := *h
	top := a[0]
	last := len(a) - 1
	a[0] = a[last]
	a = a[:last]
	for i := 0; ; {
		child := 2*i + 1
		if child >= last {
			break
		}
		if child+1 < last && a[child+1] < a[child] {
			child++
		}
		if a[i] <= a[child] {
			break
		}
		a[i], a[child] = a[child], a[i]
		i = child
	}
	*h = a
	return int32(top >> 32), int32(uint32(top))
}

// wordCache maps words to ids. Each word has one slot, and the last word wins it, so memory is bounded and no reader
// ever waits.
type wordCache struct {
	seed  maphash.Seed
	slots []atomic.Pointer[cachedIDs]
}

type cachedIDs struct {
	word string
	ids  []int32 // never changed
}

func newWordCache() wordCache {
	return wordCache{seed: maphash.MakeSeed(), slots: make([]atomic.Pointer[cachedIDs], cacheSlots)}
}

// slot returns the place of word.
func (c *wordCache) slot(word string) *atomic.Pointer[cachedIDs] {
	return &c.slots[maphash.String(c.seed, word)%cacheSlots]
}
