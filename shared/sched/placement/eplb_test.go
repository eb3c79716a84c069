package placement_test

import (
	"cmp"
	"slices"

	"trireme.dev/shared/sched/placement"
)

// eplb is the baseline: the global policy of EPLB (github.com/deepseek-ai/EPLB, README and eplb.py: replicate_experts, then
// balanced_packing), for one layer. Every NPU gets exactly slots copies. It does not look at where experts are.
func eplb(load []uint64, npus, slots int) []placement.Set {
	experts := len(load)
	copies := make([]int, experts)
	for e := range copies {
		copies[e] = 1
	}
	share := func(e int) float64 { return float64(load[e]) / float64(copies[e]) }
	for range npus*slots - experts {
		most := 0
		for e := range copies {
			if share(e) > share(most) {
				most = e
			}
		}
		copies[most]++
	}
	var all []int // the expert of each copy
	for e, n := range copies {
		for range n {
			all = append(all, e)
		}
	}
	slices.SortStableFunc(all, func(a, b int) int { return cmp.Compare(share(b), share(a)) })
	total, used := make([]float64, npus), make([]int, npus)
	has := make([]placement.Set, experts)
	for _, e := range all {
		to := -1
		for n := range npus {
			if used[n] < slots && (to < 0 || total[n] < total[to]) {
				to = n
			}
		}
		total[to] += share(e)
		used[to]++
		has[e] = has[e].With(to)
	}
	return has
}
