package cuda

import (
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"trireme.dev/shared/mem"
)

func benchDevice(b *testing.B) *Device {
	b.Helper()
	d, err := Open(0)
	if errors.Is(err, mem.ErrNotSupported) {
		b.Skipf("no GPU: %v", err)
	}
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := d.Close(); err != nil {
			b.Error(err)
		}
	})
	return d
}

// BenchmarkCall is the cost of calling the driver, with and without the switch to the context.
func BenchmarkCall(b *testing.B) {
	d := benchDevice(b)
	var version int32
	b.Run("bare", func(b *testing.B) {
		for b.Loop() {
			d.driver.DriverVersion(&version)
		}
	})
	b.Run("bound", func(b *testing.B) {
		for b.Loop() {
			if err := d.do("cuDriverGetVersion", func() code { return d.driver.DriverVersion(&version) }); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkExtent takes extents through their life, many at a time, and reports the microseconds of each step.
func BenchmarkExtent(b *testing.B) {
	const n = 256
	for _, bytes := range []int64{2 << 20, 64 << 20} {
		b.Run(fmt.Sprintf("MiB=%d", bytes>>20), func(b *testing.B) {
			d := benchDevice(b)
			base, err := d.reserve(n * bytes)
			if err != nil {
				b.Fatal(err)
			}
			defer d.unreserve(base, n*bytes)
			var (
				made, imported [n]allocation
				files          [n]*os.File
			)
			at := func(i int) devicePointer { return base + devicePointer(int64(i)*bytes) }
			steps := []struct {
				name string
				do   func(i int) error
			}{
				{"create", func(i int) (err error) { made[i], err = d.create(bytes); return err }},
				{"export", func(i int) (err error) { files[i], err = d.export(made[i]); return err }},
				{"import", func(i int) (err error) { imported[i], err = d.importFD(files[i]); return err }},
				{"closefd", func(i int) error { return files[i].Close() }},
				{"map", func(i int) error { return d.mapAt(at(i), bytes, imported[i]) }},
				{"access", func(i int) error { return d.setAccess(at(i), bytes, mem.ReadWrite) }},
				{"protect", func(i int) error { return d.setAccess(at(i), bytes, mem.ReadOnly) }},
				{"unprotect", func(i int) error { return d.setAccess(at(i), bytes, mem.ReadWrite) }},
				{"zero", func(i int) error { return d.Fill(uintptr(at(i)), 0, bytes) }},
				{"remap", func(i int) error {
					return errors.Join(d.unmap(at(i), bytes), d.mapAt(at(i), bytes, imported[i]), d.setAccess(at(i), bytes, mem.ReadWrite))
				}},
				{"unmap", func(i int) error { return d.unmap(at(i), bytes) }},
				{"forget", func(i int) error { return d.release(imported[i]) }},
				{"drop", func(i int) error { return d.release(made[i]) }},
			}
			spent := make([]time.Duration, len(steps))
			rounds := 0
			for b.Loop() {
				rounds++
				for s, step := range steps {
					start := time.Now()
					for i := range n {
						if err := step.do(i); err != nil {
							b.Fatalf("%s: %v", step.name, err)
						}
					}
					spent[s] += time.Since(start)
				}
			}
			for s, step := range steps {
				b.ReportMetric(float64(spent[s].Nanoseconds())/1e3/float64(rounds*n), step.name+"-us")
			}
		})
	}
}

// BenchmarkAttach is what a consumer does with n extents that it was given descriptors of: import, map, and give back.
func BenchmarkAttach(b *testing.B) {
	for _, n := range []int64{1, 1000} {
		b.Run(fmt.Sprintf("extents=%d", n), func(b *testing.B) {
			d := benchDevice(b)
			page := d.info.Page
			s, err := NewStore(d, n*page)
			if err != nil {
				b.Fatal(err)
			}
			defer s.Close()
			sp, err := OpenSpace(d, n*page)
			if err != nil {
				b.Fatal(err)
			}
			defer sp.Close()
			for i := range n {
				if err := s.Back(mem.Extent{Offset: i * page, Bytes: page}); err != nil {
					b.Fatal(err)
				}
			}
			var attach, again, detach time.Duration
			for b.Loop() {
				files := make([]*os.File, n)
				for i := range files {
					if files[i], err = s.Export(mem.Extent{Offset: int64(i) * page, Bytes: page}); err != nil {
						b.Fatal(err)
					}
				}
				each := func(do func(e mem.Extent, i int64) error) time.Duration {
					start := time.Now()
					for i := range n {
						if err := do(mem.Extent{Offset: i * page, Bytes: page}, i); err != nil {
							b.Fatal(err)
						}
					}
					return time.Since(start)
				}
				attach += each(func(e mem.Extent, i int64) error {
					if err := sp.Import(e, files[i]); err != nil {
						return err
					}
					_, err := sp.Map(e, mem.ReadOnly)
					return err
				})
				again += each(func(e mem.Extent, _ int64) error {
					if err := sp.Unmap(e); err != nil {
						return err
					}
					_, err := sp.Map(e, mem.ReadOnly)
					return err
				})
				detach += each(func(e mem.Extent, _ int64) error { return errors.Join(sp.Unmap(e), sp.Forget(e)) })
			}
			per := func(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 / float64(int64(b.N)*n) }
			b.ReportMetric(per(attach), "attach-us/extent")
			b.ReportMetric(per(again), "remap-us/extent")
			b.ReportMetric(per(detach), "detach-us/extent")
		})
	}
}

// BenchmarkHandOver gives an extent from its owner to a taker: by mapping it, by copying it into memory that the taker has,
// and by copying it into new memory. Compare within a size.
func BenchmarkHandOver(b *testing.B) {
	for _, bytes := range []int64{2 << 20, 16 << 20, 256 << 20, 1 << 30} {
		b.Run(fmt.Sprintf("MiB=%d", bytes>>20), func(b *testing.B) {
			d := benchDevice(b)
			s, err := NewStore(d, 3*bytes)
			if err != nil {
				b.Fatal(err)
			}
			defer s.Close()
			taker, err := OpenSpace(d, 3*bytes)
			if err != nil {
				b.Fatal(err)
			}
			defer taker.Close()
			extent := func(i int64) mem.Extent { return mem.Extent{Offset: i * bytes, Bytes: bytes} }
			take := func(e mem.Extent) (uintptr, error) {
				f, err := s.Export(e)
				if err != nil {
					return 0, err
				}
				if err := taker.Import(e, f); err != nil {
					return 0, err
				}
				return taker.Map(e, mem.ReadWrite)
			}
			leave := func(e mem.Extent) error { return errors.Join(taker.Unmap(e), taker.Forget(e)) }
			given, own, fresh := extent(0), extent(1), extent(2)
			var from, to uintptr
			for _, x := range []struct {
				e  mem.Extent
				at *uintptr
			}{{given, &from}, {own, &to}} {
				if err := s.Back(x.e); err != nil {
					b.Fatal(err)
				}
				if *x.at, err = take(x.e); err != nil {
					b.Fatal(err)
				}
			}
			for _, way := range []struct {
				name string
				do   func() error
			}{
				{"copy", func() error { return d.Copy(to, from, bytes) }},
				{"copy-to-new", func() error {
					if err := s.Back(fresh); err != nil {
						return err
					}
					at, err := take(fresh)
					if err != nil {
						return err
					}
					return errors.Join(d.Copy(at, from, bytes), leave(fresh), s.Drop(fresh))
				}},
				{"map", func() error { // given is mapped already: leaving it first is part of the price
					if err := leave(given); err != nil {
						return err
					}
					from, err = take(given)
					return err
				}},
			} {
				b.Run(way.name, func(b *testing.B) {
					b.SetBytes(bytes)
					for b.Loop() {
						if err := way.do(); err != nil {
							b.Fatal(err)
						}
					}
				})
			}
		})
	}
}

// BenchmarkBack is an extent of the store, zeroed, and given back.
func BenchmarkBack(b *testing.B) {
	for _, bytes := range []int64{2 << 20, 1 << 30} {
		b.Run(fmt.Sprintf("MiB=%d", bytes>>20), func(b *testing.B) {
			s, err := NewStore(benchDevice(b), bytes)
			if err != nil {
				b.Fatal(err)
			}
			defer s.Close()
			e := mem.Extent{Bytes: bytes}
			b.SetBytes(bytes)
			for b.Loop() {
				if err := errors.Join(s.Back(e), s.Drop(e)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkCopy is copies of mapped extents: within the GPU, where MB/s count the bytes copied (the memory reads and
// writes each), and from and to the host.
func BenchmarkCopy(b *testing.B) {
	const bytes = 1 << 30
	d := benchDevice(b)
	s, err := NewStore(d, 2*bytes)
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	sp, err := OpenSpace(d, 2*bytes)
	if err != nil {
		b.Fatal(err)
	}
	defer sp.Close()
	var at [2]uintptr
	for i := range at {
		e := mem.Extent{Offset: int64(i) * bytes, Bytes: bytes}
		if err := s.Back(e); err != nil {
			b.Fatal(err)
		}
		f, err := s.Export(e)
		if err != nil {
			b.Fatal(err)
		}
		if err := sp.Import(e, f); err != nil {
			b.Fatal(err)
		}
		if at[i], err = sp.Map(e, mem.ReadWrite); err != nil {
			b.Fatal(err)
		}
	}
	pinned, err := NewPinned(d, 256<<20)
	if err != nil {
		b.Fatal(err)
	}
	defer pinned.Close()
	pageable := make([]byte, 256<<20)
	for i := range pageable {
		pageable[i] = byte(i)
	}
	for _, c := range []struct {
		name  string
		bytes int64
		do    func() error
	}{
		{"device", bytes, func() error { return d.Copy(at[1], at[0], bytes) }},
		{"device-2MiB", 2 << 20, func() error { return d.Copy(at[1], at[0], 2<<20) }},
		{"fill", bytes, func() error { return d.Fill(at[1], 1, bytes) }},
		{"pinned-to-device", 256 << 20, func() error { return d.Write(at[0], pinned.Bytes()) }},
		{"device-to-pinned", 256 << 20, func() error { return d.Read(pinned.Bytes(), at[0]) }},
		{"pageable-to-device", 256 << 20, func() error { return d.Write(at[0], pageable) }},
		{"device-to-pageable", 256 << 20, func() error { return d.Read(pageable, at[0]) }},
		{"pinned-to-device-2MiB", 2 << 20, func() error { return d.Write(at[0], pinned.Bytes()[:2<<20]) }},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.SetBytes(c.bytes)
			for b.Loop() {
				if err := c.do(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
