package hf_test

import (
	"context"
	"testing"

	"trireme.dev/shared/hf"
	"trireme.dev/shared/hf/hftest"
)

// BenchmarkOpen opens the bundled model and takes its weights, which need no copy.
func BenchmarkOpen(b *testing.B) {
	for b.Loop() {
		f, err := hf.Open(bundled)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := f.Weights(); err != nil {
			b.Fatal(err)
		}
		if err := f.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

// keptObjects is a Memory in which all is there.
type keptObjects struct{ all map[int][]byte }

func (k keptObjects) Weights(_ context.Context, s hf.Set, _ hf.Filler) ([][]byte, error) {
	objects := make([][]byte, len(s.Numbers))
	for i, n := range s.Numbers {
		if k.all[n] == nil {
			k.all[n] = make([]byte, s.Sizes[i])
		}
		objects[i] = k.all[n]
	}
	return objects, nil
}

// BenchmarkLoadShare gives one of four NPUs its part of 4,096 experts that are all in memory: what an operation does for each NPU beside
// copying.
func BenchmarkLoadShare(b *testing.B) {
	dir := b.TempDir()
	if err := hftest.Write(dir, hftest.Shape{Layers: 4, Experts: 1024, Hidden: 64, ExpertHidden: 8, Vocab: 64}); err != nil {
		b.Fatal(err)
	}
	f, err := hf.Open(dir)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	m := keptObjects{map[int][]byte{}}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := f.Load(b.Context(), m, hf.Text, func(_, expert int) bool { return expert%4 == 0 }); err != nil {
			b.Fatal(err)
		}
	}
}
