package sched

import (
	"cmp"
	"slices"

	"trireme.dev/shared/sched/placement"
)

// Held is what an NPU has of its instance's sequences.
type Held struct {
	Slabs int // of KV
	Seqs  int
}

// Seats puts the NPUs of an instance that take new sequences in the order in which one tries to find room: the fewest slabs first, as
// all have the same memory; of those alike the fewest sequences, then the lowest number. held has what each NPU of the instance has.
// It returns order, filled.
func Seats(held []Held, npus placement.Set, order []int) []int {
	order = order[:0]
	for npu := range npus.All() {
		order = append(order, npu)
	}
	slices.SortStableFunc(order, func(a, b int) int {
		return cmp.Or(held[a].Slabs-held[b].Slabs, held[a].Seqs-held[b].Seqs)
	})
	return order
}
