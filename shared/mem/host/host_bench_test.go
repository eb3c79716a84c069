package host_test

import (
	"fmt"
	"testing"
	"time"

	"trireme.dev/shared/hbm/hbmbench"
)

// bench runs a case and reports the time of what it measures, without that of undoing it.
func bench(b *testing.B, c hbmbench.Case, err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
	var spent time.Duration
	for b.Loop() {
		d, err := c.Do()
		if err != nil {
			b.Fatal(err)
		}
		spent += d
	}
	if err := c.Close(); err != nil {
		b.Error(err)
	}
	b.ReportMetric(float64(spent.Nanoseconds())/float64(b.N), "ns/op")
	if c.Extents > 0 {
		b.ReportMetric(float64(spent.Nanoseconds())/float64(b.N*c.Extents), "ns/extent")
	} else {
		b.ReportMetric(float64(c.Bytes)*float64(b.N)/1e6/spent.Seconds(), "MB/s")
	}
}

func BenchmarkMap(b *testing.B) {
	for _, n := range []int{1, 1000} {
		b.Run(fmt.Sprintf("extents=%d", n), func(b *testing.B) {
			c, err := hbmbench.Map(n)
			bench(b, c, err)
		})
	}
}

func BenchmarkRemap(b *testing.B) {
	for _, n := range []int{1, 1000} {
		b.Run(fmt.Sprintf("extents=%d", n), func(b *testing.B) {
			c, err := hbmbench.Remap(n)
			bench(b, c, err)
		})
	}
}

// BenchmarkBack compares memory from the system with memory that the store kept, or has taken ahead.
func BenchmarkBack(b *testing.B) {
	for memory, name := range []string{hbmbench.Fresh: "fresh", hbmbench.Reused: "reused", hbmbench.Readied: "readied"} {
		b.Run(name, func(b *testing.B) {
			c, err := hbmbench.Back(64<<20, hbmbench.Memory(memory))
			bench(b, c, err)
		})
	}
}

func BenchmarkMemcpy(b *testing.B) {
	for _, mib := range []int64{1, 256} {
		b.Run(fmt.Sprintf("MiB=%d", mib), func(b *testing.B) {
			c, err := hbmbench.Memcpy(mib << 20)
			bench(b, c, err)
		})
	}
}
