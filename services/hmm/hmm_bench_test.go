package hmm_test

import (
	"fmt"
	"os"
	"testing"
	"time"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/hbm/hbmbench"
	"trireme.dev/shared/mem"

	"trireme.dev/services/hmm"
)

func benchDaemon(b *testing.B, bytes int64) string {
	_, socket := daemon(b, func(c *hmm.Config) { c.NPUBytes = bytes })
	return socket
}

// BenchmarkRoundTrip is one call of the HMM and back, nothing mapped.
func BenchmarkRoundTrip(b *testing.B) {
	_, socket := daemon(b)
	b.Run("one", func(b *testing.B) {
		bench(b, hbmbench.Call(b.Context(), dial(b, socket, hbm.Hello{})), nil)
	})
	// As many callers as there are streams, in one process or in four.
	for _, clients := range []int{1, 4} {
		b.Run(fmt.Sprintf("callers=200/clients=%d", clients), func(b *testing.B) {
			all := make([]*hbm.Client, clients)
			for i := range all {
				all[i] = dial(b, socket, hbm.Hello{Instance: fmt.Sprint("c", i)})
			}
			bench(b, hbmbench.Calls(b.Context(), 200, 20, all...), nil)
		})
	}
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

// BenchmarkProgress is what a worker says with each token, for the HMM to find if the worker dies.
func BenchmarkProgress(b *testing.B) {
	k := claim(b, dial(b, benchDaemon(b, 64*page), hbm.Hello{}), decodePart("r", 1, 0), "ack")
	k.Run()
	b.ReportAllocs()
	n := uint32(0)
	for b.Loop() {
		n++
		k.Progress(n)
	}
}

// bench runs a case and reports the time of what it measures, without that of undoing it.
func bench(b *testing.B, c hbmbench.Case, err error) {
	b.Helper()
	must(b, err)
	var spent time.Duration
	for b.Loop() {
		d, err := c.Do()
		must(b, err)
		spent += d
	}
	must(b, c.Close())
	b.ReportMetric(float64(spent.Nanoseconds())/float64(b.N), "ns/op")
	switch {
	case c.Extents > 1:
		b.ReportMetric(float64(spent.Nanoseconds())/float64(b.N*c.Extents), "ns/extent")
	case c.Calls > 1:
		b.ReportMetric(float64(b.N*c.Calls)/spent.Seconds(), "calls/s")
	case c.Bytes > 0:
		b.ReportMetric(float64(c.Bytes)*float64(b.N)/1e6/spent.Seconds(), "MB/s")
	}
}

// BenchmarkAttach asks for extents by handle and maps them.
func BenchmarkAttach(b *testing.B) {
	for _, n := range []int{1, 1000} {
		b.Run(fmt.Sprintf("extents=%d", n), func(b *testing.B) {
			socket := benchDaemon(b, int64(n)*page)
			owner, c := dial(b, socket, hbm.Hello{}), dial(b, socket, hbm.Hello{Instance: "i2"})
			objects, err := hbmbench.Give(b.Context(), owner, n, page)
			must(b, err)
			handles := make([]mem.Handle, n)
			for i, o := range objects {
				handles[i] = o.Handle()
			}
			bench(b, hbmbench.Attach(b.Context(), c, handles), nil)
		})
	}
}

// BenchmarkHandOver gives an object from one client to another by mapping and by copying. The rows of one size compare.
// TRIREME_BENCH_LARGE=1 adds 1 GiB, which takes three and, where fresh memory is slow, half a minute.
func BenchmarkHandOver(b *testing.B) {
	sizes := []int64{1, 16, 256}
	if os.Getenv("TRIREME_BENCH_LARGE") != "" {
		sizes = append(sizes, 1024)
	}
	for _, mib := range sizes {
		bytes := mib << 20
		socket := benchDaemon(b, 2*bytes)
		giver, taker := dial(b, socket, hbm.Hello{}), dial(b, socket, hbm.Hello{Instance: "i2"})
		given, err := hbmbench.Give(b.Context(), giver, 1, bytes)
		must(b, err)
		h := given[0].Handle()
		row := func(name string, c func() (hbmbench.Case, error)) {
			b.Run(fmt.Sprintf("%s/MiB=%d", name, mib), func(b *testing.B) {
				made, err := c()
				bench(b, made, err)
			})
		}
		row("map", func() (hbmbench.Case, error) { return hbmbench.HandOver(b.Context(), taker, h, false), nil })
		row("map+touch", func() (hbmbench.Case, error) { return hbmbench.HandOver(b.Context(), taker, h, true), nil })
		row("copy-to-new", func() (hbmbench.Case, error) { return hbmbench.CopyOver(b.Context(), taker, h) })
		row("copy", func() (hbmbench.Case, error) { return hbmbench.CopyMapped(b.Context(), taker, h) })
		row("memcpy", func() (hbmbench.Case, error) { return hbmbench.Memcpy(bytes) })
		free(b, giver, given...)
		must(b, giver.Close())
		must(b, taker.Close())
	}
}

// BenchmarkTakeBetweenDomains hands an object over to an NPU that is a memory domain of its own: the taker's Attach
// allocates, copies, checks what is sealed, and says so. The rows of one size compare. TRIREME_BENCH_LARGE=1 adds 1 GiB.
func BenchmarkTakeBetweenDomains(b *testing.B) {
	sizes := []int64{1, 16, 256}
	if os.Getenv("TRIREME_BENCH_LARGE") != "" {
		sizes = append(sizes, 1024)
	}
	for _, mib := range sizes {
		bytes := mib << 20
		_, socket := daemon(b, perNPU, func(c *hmm.Config) { c.NPUBytes, c.CacheBytes = 2*bytes, 2*bytes })
		giver, taker := dial(b, socket, hbm.Hello{}), dial(b, socket, hbm.Hello{Instance: "i2"})
		objects := alloc(b, giver, kv(0, bytes), kv(0, bytes))
		for _, o := range objects {
			hbmbench.Fill(o.Bytes())
		}
		_, err := giver.Seal(b.Context(), ref("r", 1), objects[1])
		must(b, err)
		for i, name := range []string{"open", "sealed"} {
			b.Run(fmt.Sprintf("%s/MiB=%d", name, mib), func(b *testing.B) {
				bench(b, hbmbench.Take(b.Context(), taker, 1, objects[i].Handle()), nil)
			})
		}
		b.Run(fmt.Sprintf("memcpy/MiB=%d", mib), func(b *testing.B) {
			c, err := hbmbench.Memcpy(bytes)
			bench(b, c, err)
		})
		free(b, giver, objects...)
		must(b, giver.End(b.Context(), "r"))
		must(b, giver.Close())
		must(b, taker.Close())
	}
}

// BenchmarkAttachFromNode takes a sealed object of another node over: two HMMs in this process, on loopback.
func BenchmarkAttachFromNode(b *testing.B) {
	const bytes = 64 << 20
	_, one, two := twoNodes(b, func(c *hmm.Config) { c.NPUBytes = 2 * bytes })
	o := alloc(b, one, kv(0, bytes))[0]
	hbmbench.Fill(o.Bytes())
	_, err := one.Seal(b.Context(), ref("r", 1), o)
	must(b, err)
	bench(b, hbmbench.Take(b.Context(), two, 0, o.Handle()), nil)
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
