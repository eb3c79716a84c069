package ref_test

import (
	"testing"

	"trireme.dev/shared/kernel/kerneltest"
	"trireme.dev/shared/kernel/ref"
)

func TestLaws(t *testing.T)      { kerneltest.Laws(t, ref.New()) }
func TestInvariant(t *testing.T) { kerneltest.Invariant(t, ref.New(), ref.New()) }
