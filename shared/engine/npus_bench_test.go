package engine_test

import (
	"fmt"
	"testing"

	"trireme.dev/shared/engine"
	"trireme.dev/shared/model"
)

// BenchmarkDispatch measures what it costs that experts are elsewhere: a decode step of sequences on NPU 0, one thread an NPU,
// with all experts there, too (the other NPUs only come to the meetings); with all of them on the others, to which every row is
// sent; and with sequences and experts spread evenly, as a running instance has them.
func BenchmarkDispatch(b *testing.B) {
	for _, n := range []int{8, 32} {
		for _, npus := range []int{1, 2, 4} {
			for _, where := range []string{"here", "away", "spread"} {
				if npus == 1 && where != "here" {
					continue
				}
				b.Run(fmt.Sprintf("batch=%d/npus=%d/%s", n, npus, where), func(b *testing.B) {
					g := newGroup(b, shapesModel, npus, single, engine.Limits{Rows: n, Seqs: n})
					batch := decodeBatch(g.rig, n)
					tables := make([][][]model.Expert, npus)
					for npu := range tables {
						for l, experts := range g.copy[npu] {
							own := make([]model.Expert, len(experts))
							for e := range experts {
								switch {
								case where == "here" && npu == 0,
									where == "away" && npu == 1+(l+e)%max(1, npus-1),
									where == "spread" && npu == (l+e)%npus:
									own[e] = experts[e]
								}
							}
							tables[npu] = append(tables[npu], own)
						}
					}
					if err := g.text.SetExperts(tables); err != nil {
						b.Fatal(err)
					}
					if where == "spread" {
						for i := range batch {
							batch[i].NPU = i % npus
						}
					}
					b.ReportAllocs()
					for b.Loop() {
						if _, err := g.text.Forward(batch); err != nil {
							b.Fatal(err)
						}
					}
				})
			}
		}
	}
}
