package wire_test

import (
	"testing"

	"trireme.dev/shared/wire"
)

// Where NPUs share memory there is nothing to copy, and nobody reads of 0 MB.
func TestSentence(t *testing.T) {
	r := wire.ChangeReport{ID: "x", Kind: wire.ChangeScale, State: "prepare", Plan: wire.ChangePlan{Before: []int{1}, After: []int{1, 2}, Moves: true}}
	if got, want := r.Sentence(), "scale x: from 1 to 2 NPUs, nothing to copy"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	r.Plan.Bytes = 21_200_000
	if got, want := r.Sentence(), "scale x: from 1 to 2 NPUs, 21.2 MB to copy"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
