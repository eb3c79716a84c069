package hf_test

import (
	"testing"

	"trireme.dev/shared/hf"
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
