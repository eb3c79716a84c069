package placement_test

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"

	"trireme.dev/shared/sched/placement"
)

// skewed is the load of layers with experts whose popularity falls as in Zipf's law, in an order of each layer's own.
func skewed(r *rand.Rand, layers, experts int, exponent float64) placement.Load {
	load := make(placement.Load, layers)
	for l := range load {
		load[l] = make([]uint64, experts)
		for i, e := range r.Perm(experts) {
			load[l][e] = uint64(1e6 * math.Pow(float64(i+1), -exponent) * (0.8 + 0.4*r.Float64()))
		}
	}
	return load
}

func even(layers, experts int) []int {
	counts := make([]int, layers)
	for l := range counts {
		counts[l] = experts
	}
	return counts
}

// BenchmarkPlan plans for a model of the size of Qwen3-30B-A3B.
func BenchmarkPlan(b *testing.B) {
	const layers, experts = 48, 128
	for _, n := range []struct{ from, to int }{{4, 4}, {4, 6}, {8, 6}, {63, 64}, {64, 64}} {
		b.Run(fmt.Sprintf("%d-%d", n.from, n.to), func(b *testing.B) {
			r := rand.New(rand.NewPCG(1, 1))
			load := skewed(r, layers, experts, 0.5)
			slots := (experts+n.to-1)/n.to + 1
			present, err := placement.Plan(placement.Even(even(layers, experts), placement.First(n.from)), load,
				placement.First(n.from), placement.Options{Slots: (experts+n.from-1)/n.from + 1, Slack: 0.05})
			if err != nil {
				b.Fatal(err)
			}
			now := skewed(r, layers, experts, 0.5)
			to := placement.First(n.to)
			var c *placement.Change
			b.ReportAllocs()
			for b.Loop() {
				if c, err = placement.Plan(present.Layout, now, to, placement.Options{Slots: slots, Slack: 0.05}); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(len(c.Copies)), "copies")
			b.ReportMetric(c.Layout.Balance(now, to), "balance")
			b.ReportMetric(present.Layout.Balance(now, placement.First(n.from)), "before")
		})
	}
}
