package cuda

import (
	"testing"

	"trireme.dev/shared/mem"
	"trireme.dev/shared/mem/vpage/vpagetest"
)

// BenchmarkChange is what other experts cost one GPU, with experts as large as a real model's.
func BenchmarkChange(b *testing.B) {
	d := benchDevice(b)
	var live int64
	vpagetest.Bench(b, vpagetest.Device{
		Page: d.info.Page,
		Open: func(b *testing.B, bytes int64) (mem.Space, func(mem.Extent) error, func(mem.Extent) error) {
			store, err := NewStore(d, bytes)
			if err != nil {
				b.Fatal(err)
			}
			space, err := OpenSpace(d, bytes)
			if err != nil {
				b.Fatal(err)
			}
			live = 0
			b.Cleanup(func() {
				if err := space.Close(); err != nil {
					b.Error(err)
				}
				if err := store.Close(); err != nil {
					b.Error(err)
				}
			})
			back := func(e mem.Extent) error {
				if err := store.Back(e); err != nil {
					return err
				}
				live += e.Bytes
				f, err := store.Export(e)
				if err != nil {
					return err
				}
				return space.Import(e, f)
			}
			drop := func(e mem.Extent) error {
				live -= e.Bytes
				if err := space.Forget(e); err != nil {
					return err
				}
				return store.Drop(e)
			}
			return space, back, drop
		},
		Overhead: func() (int64, error) {
			free, err := d.Free()
			return d.info.Bytes - free - live, err
		},
	}, vpagetest.Qwen3)
}
