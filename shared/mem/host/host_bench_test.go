package host_test

import (
	"fmt"
	"testing"

	"trireme.dev/shared/mem"
)

func BenchmarkMapUnmap(b *testing.B) {
	for _, n := range []int64{1, 1000} {
		b.Run(fmt.Sprintf("extents=%d", n), func(b *testing.B) {
			s := store(b, n, n, 0)
			sp := space(b, s)
			for i := range n {
				if err := s.Back(mem.Extent{Offset: i * page, Bytes: page}); err != nil {
					b.Fatal(err)
				}
			}
			for b.Loop() {
				for i := range n {
					if _, err := sp.Map(mem.Extent{Offset: i * page, Bytes: page}, mem.ReadOnly); err != nil {
						b.Fatal(err)
					}
				}
				for i := range n {
					if err := sp.Unmap(mem.Extent{Offset: i * page, Bytes: page}); err != nil {
						b.Fatal(err)
					}
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/extent")
		})
	}
}

// BenchmarkBack compares memory from the system with memory that the store kept.
func BenchmarkBack(b *testing.B) {
	const pages = 1024 // 64 MiB
	for name, keep := range map[string]int64{"fresh": 0, "cached": pages} {
		b.Run(name, func(b *testing.B) {
			s := store(b, pages, pages, keep)
			e := mem.Extent{Bytes: pages * page}
			b.SetBytes(e.Bytes)
			for b.Loop() {
				if err := s.Back(e); err != nil {
					b.Fatal(err)
				}
				if err := s.Drop(e); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
