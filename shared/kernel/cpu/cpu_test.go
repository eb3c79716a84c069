package cpu

import (
	"errors"
	"fmt"
	"testing"

	"go.uber.org/goleak"

	"trireme.dev/shared/kernel"
	"trireme.dev/shared/kernel/kerneltest"
	"trireme.dev/shared/kernel/ref"
)

// open returns a Compute that spreads even the smallest work over its threads, or skips the test where this machine
// lacks the instruction set.
func open(t *testing.T, isa ISA, threads int) kernel.Compute {
	t.Helper()
	c, err := New(Options{Threads: threads, ISA: isa})
	if errors.Is(err, ErrNotSupported) {
		t.Skipf("this machine lacks %s: %v", isa, err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error("closing:", err)
		}
	})
	c.(*compute).pool.smallest = 1
	return c
}

func TestAgainstReference(t *testing.T) {
	for _, isa := range []ISA{Portable, AVX2, AVX512} {
		t.Run(isa.String(), func(t *testing.T) {
			c := open(t, isa, 2)
			kerneltest.Laws(t, c)
			kerneltest.Agree(t, c, ref.New())
		})
	}
}

func TestBitEquality(t *testing.T) {
	for _, pair := range []struct {
		a, b     ISA
		aThreads int
		bThreads int
	}{
		{AVX512, AVX2, 1, 1},
		{AVX2, AVX512, 4, 3},
		{AVX2, Portable, 2, 1},
		{Portable, Auto, 3, 1},
	} {
		t.Run(fmt.Sprintf("%s on %d and %s on %d", pair.a, pair.aThreads, pair.b, pair.bThreads), func(t *testing.T) {
			kerneltest.Invariant(t, open(t, pair.a, pair.aThreads), open(t, pair.b, pair.bThreads))
		})
	}
}

func TestNew(t *testing.T) {
	defer goleak.VerifyNone(t)
	if _, err := New(Options{Threads: -1}); err == nil {
		t.Error("New took -1 threads")
	}
	if _, err := New(Options{ISA: 99}); !errors.Is(err, ErrNotSupported) {
		t.Errorf("New of an unknown instruction set: %v", err)
	}
	c, err := New(Options{Threads: 3})
	if err != nil {
		t.Fatal(err)
	}
	if c.Digest() != Digest {
		t.Errorf("digest %q", c.Digest())
	}
	for range 2 {
		if err := c.Close(); err != nil {
			t.Error("closing:", err)
		}
	}
}
