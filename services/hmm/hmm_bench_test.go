package hmm_test

import (
	"fmt"
	"testing"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"

	"trireme.dev/services/hmm"
)

func benchDaemon(b *testing.B, bytes int64) string {
	_, socket := daemon(b, func(c *hmm.Config) { c.NPUBytes = bytes })
	return socket
}

// BenchmarkRoundTrip is one call of the HMM and back, nothing mapped.
func BenchmarkRoundTrip(b *testing.B) {
	socket := benchDaemon(b, 64*page)
	b.Run("one", func(b *testing.B) {
		c := dial(b, socket, hbm.Hello{})
		part := decodePart("r", 1, 0)
		for b.Loop() {
			claim(b, c, part, "ack")
		}
	})
	b.Run("parallel", func(b *testing.B) {
		c := dial(b, socket, hbm.Hello{Instance: "i2"})
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if _, err := c.Claim(b.Context(), decodePart("r", 1, 1), "ack"); err != nil {
					b.Error(err)
					return
				}
			}
		})
	})
}

// BenchmarkHeld is the check before every append, publish and ack.
func BenchmarkHeld(b *testing.B) {
	c := dial(b, benchDaemon(b, 64*page), hbm.Hello{})
	k := claim(b, c, decodePart("r", 1, 0), "ack")
	for b.Loop() {
		if !k.Held() {
			b.Fatal("not held")
		}
	}
}

// BenchmarkAttach asks for extents by handle, maps them, unmaps them and gives them back.
func BenchmarkAttach(b *testing.B) {
	for _, n := range []int{1, 1000} {
		b.Run(fmt.Sprintf("extents=%d", n), func(b *testing.B) {
			socket := benchDaemon(b, int64(n)*page)
			owner, c := dial(b, socket, hbm.Hello{}), dial(b, socket, hbm.Hello{Instance: "i2"})
			specs := make([]hbm.Spec, n)
			for i := range specs {
				specs[i] = kv(0, page)
			}
			handles := make([]mem.Handle, n)
			for i, o := range alloc(b, owner, specs...) {
				handles[i] = o.Handle()
			}
			for b.Loop() {
				free(b, c, attach(b, c, mem.ReadOnly, -1, handles...)...)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/extent")
		})
	}
}

// BenchmarkHandOver gives an object from one client to another by mapping, and by copying its bytes into a new object.
// touch reads one byte of each page of the machine after mapping: what the taker's first pass pays in page faults.
func BenchmarkHandOver(b *testing.B) {
	for _, mib := range []int64{1, 16, 256} {
		bytes := mib << 20
		socket := benchDaemon(b, 3*bytes)
		giver, taker := dial(b, socket, hbm.Hello{}), dial(b, socket, hbm.Hello{Instance: "i2"})
		o := alloc(b, giver, kv(0, bytes))[0]
		fill(o, 1)
		to := 0
		b.Run(fmt.Sprintf("map/MiB=%d", mib), func(b *testing.B) {
			b.SetBytes(bytes)
			for b.Loop() {
				to = 1 - to
				free(b, taker, attach(b, taker, mem.ReadWrite, to, o.Handle())...)
			}
		})
		b.Run(fmt.Sprintf("map+touch/MiB=%d", mib), func(b *testing.B) {
			b.SetBytes(bytes)
			var sum byte
			for b.Loop() {
				to = 1 - to
				got := attach(b, taker, mem.ReadOnly, to, o.Handle())
				for i := 0; i < len(got[0].Bytes()); i += 4096 {
					sum += got[0].Bytes()[i]
				}
				free(b, taker, got...)
			}
			_ = sum
		})
		b.Run(fmt.Sprintf("copy/MiB=%d", mib), func(b *testing.B) {
			b.SetBytes(bytes)
			for b.Loop() {
				got := alloc(b, taker, kv(1, bytes))
				copy(got[0].Bytes(), o.Bytes())
				free(b, taker, got...)
			}
		})
		b.Run(fmt.Sprintf("memcpy/MiB=%d", mib), func(b *testing.B) {
			dst := make([]byte, bytes)
			b.SetBytes(bytes)
			for b.Loop() {
				copy(dst, o.Bytes())
			}
		})
		free(b, giver, o)
		must(b, giver.Close())
		must(b, taker.Close())
	}
}

// BenchmarkSeal is the checksum of 16 MiB and the call.
func BenchmarkSeal(b *testing.B) {
	const bytes = 16 << 20
	c := dial(b, benchDaemon(b, 2*bytes), hbm.Hello{})
	b.SetBytes(bytes)
	i := 0
	for b.Loop() {
		b.StopTimer()
		o := alloc(b, c, kv(0, bytes))
		clear(o[0].Bytes()) // the page faults are not the seal's
		request := fmt.Sprint("r", i)
		b.StartTimer()
		_, err := c.Seal(b.Context(), ref(request, 1), o...)
		must(b, err)
		b.StopTimer()
		free(b, c, o...)
		must(b, c.End(b.Context(), request))
		i++
		b.StartTimer()
	}
}
