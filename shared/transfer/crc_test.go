package transfer

import (
	"testing"

	"pgregory.net/rapid"

	"trireme.dev/shared/mem"
)

func TestCombineIsTheChecksumOfBoth(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a := rapid.SliceOfN(rapid.Byte(), 0, 300).Draw(t, "a")
		b := rapid.SliceOfN(rapid.Byte(), 0, 300).Draw(t, "b")
		got := combine(mem.Checksum(a), mem.Checksum(b), power(8*uint64(len(b))))
		if want := mem.Checksum(append(a, b...)); got != want {
			t.Fatalf("combine = %08x, want %08x", got, want)
		}
	})
}

func TestCombineOfLongRuns(t *testing.T) {
	a, b := []byte("trireme"), make([]byte, 5<<20+3)
	for i := range b {
		b[i] = byte(i * i)
	}
	got := combine(mem.Checksum(a), mem.Checksum(b), power(8*uint64(len(b))))
	if want := mem.Extend(mem.Checksum(a), b); got != want {
		t.Errorf("combine = %08x, want %08x", got, want)
	}
}
