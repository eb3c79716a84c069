package mem_test

import (
	"errors"
	"testing"

	"trireme.dev/shared/mem"
)

func TestChecksum(t *testing.T) {
	// The check value of CRC-32C: RFC 3720 appendix B.4 and the catalogue of parametrised CRC algorithms.
	if got := mem.Checksum([]byte("123456789")); got != 0xe3069283 {
		t.Errorf("Checksum = %#x, want 0xe3069283", got)
	}
	if got := mem.Checksum(make([]byte, 32)); got != 0x8a9136aa {
		t.Errorf("Checksum of 32 zeros = %#x, want 0x8a9136aa", got)
	}
	if got := mem.Extend(mem.Checksum([]byte("1234")), []byte("56789")); got != 0xe3069283 {
		t.Errorf("Extend = %#x, want 0xe3069283", got)
	}
}

func TestExtentCheck(t *testing.T) {
	for _, tc := range []struct {
		e  mem.Extent
		ok bool
	}{
		{mem.Extent{Offset: 0, Bytes: 64}, true},
		{mem.Extent{Offset: 192, Bytes: 64}, true},
		{mem.Extent{Offset: 0, Bytes: 256}, true},
		{mem.Extent{Offset: 192, Bytes: 128}, false},
		{mem.Extent{Offset: 32, Bytes: 64}, false},
		{mem.Extent{Offset: 64, Bytes: 32}, false},
		{mem.Extent{Offset: -64, Bytes: 64}, false},
		{mem.Extent{Offset: 64, Bytes: -64}, false},
		{mem.Extent{}, false},
	} {
		if err := tc.e.Check(64, 256); tc.ok != (err == nil) || !tc.ok && !errors.Is(err, mem.ErrInvalid) {
			t.Errorf("%v: %v, want ok %v", tc.e, err, tc.ok)
		}
	}
}

func TestPadded(t *testing.T) {
	for n, want := range map[int64]int64{0: 0, 1: 64, 63: 64, 64: 64, 65: 128} {
		if got := mem.Padded(n, 64); got != want {
			t.Errorf("Padded(%d) = %d, want %d", n, got, want)
		}
	}
}

func TestKindNames(t *testing.T) {
	seen := map[string]bool{}
	for k := mem.KindPixels; k <= mem.KindWeights; k++ {
		if name := k.String(); seen[name] || name == mem.Kind(200).String() {
			t.Errorf("kind %d is called %q", k, name)
		} else {
			seen[name] = true
		}
	}
}
