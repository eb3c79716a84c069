package mem_test

import (
	"fmt"
	"testing"

	"trireme.dev/shared/mem"
)

func BenchmarkChecksum(b *testing.B) {
	for _, kib := range []int{64, 16 << 10} {
		b.Run(fmt.Sprintf("KiB=%d", kib), func(b *testing.B) {
			p := make([]byte, kib<<10)
			for i := range p { // or all pages would be one and the same page of zeros
				p[i] = byte(i)
			}
			b.SetBytes(int64(len(p)))
			for b.Loop() {
				mem.Checksum(p)
			}
		})
	}
}
