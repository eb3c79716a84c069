package placement

import (
	"fmt"
	"iter"
	"math/bits"
	"strings"
)

// MaxNPUs is the most NPUs that an instance can have, before, during and after a change together.
const MaxNPUs = 64

// Set is a set of NPUs of one instance, each a bit: 0 to MaxNPUs-1. An NPU keeps its number as long as it belongs to the
// instance, so numbers may have gaps after some have left.
type Set uint64

// First returns the set of the NPUs 0 to n-1.
func First(n int) Set {
	if n < 0 || n > MaxNPUs {
		panic(fmt.Sprintf("BUG: a set of %d NPUs", n))
	}
	return Set(1)<<n - 1
}

// Of returns the set of the given NPUs.
func Of(npus ...int) Set {
	var s Set
	for _, n := range npus {
		s = s.With(n)
	}
	return s
}

// Has reports whether NPU n is in s.
func (s Set) Has(n int) bool { return s>>n&1 != 0 }

// With returns s and n.
func (s Set) With(n int) Set { return s | 1<<n }

// Without returns s without n.
func (s Set) Without(n int) Set { return s &^ (1 << n) }

// Len is the number of NPUs in s.
func (s Set) Len() int { return bits.OnesCount64(uint64(s)) }

// Slots is the number of slots, empty ones included, up to the last NPU of s.
func (s Set) Slots() int { return bits.Len64(uint64(s)) }

// All yields the NPUs of s in rising order.
func (s Set) All() iter.Seq[int] {
	return func(yield func(int) bool) {
		for ; s != 0; s &= s - 1 {
			if !yield(bits.TrailingZeros64(uint64(s))) {
				return
			}
		}
	}
}

// String is the set as humans write it: "0-2,5".
func (s Set) String() string {
	var b strings.Builder
	for n := 0; n < MaxNPUs; n++ {
		if !s.Has(n) {
			continue
		}
		last := n
		for last+1 < MaxNPUs && s.Has(last+1) {
			last++
		}
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		fmt.Fprint(&b, n)
		if last > n {
			fmt.Fprintf(&b, "-%d", last)
		}
		n = last
	}
	return b.String()
}
