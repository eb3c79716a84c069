package engine_test

import (
	"errors"
	"fmt"
	"testing"

	"trireme.dev/shared/engine"
	"trireme.dev/shared/kernel/cpu"
)

// TestInstructionSets checks that a picture and its answer have the same bits on every instruction set of this machine
// and for every number of threads, as the equal digests promise.
func TestInstructionSets(t *testing.T) {
	var first *answer
	for _, o := range []cpu.Options{
		{Threads: 1, ISA: cpu.Auto}, {Threads: 2, ISA: cpu.Auto}, {Threads: 5, ISA: cpu.Auto},
		{Threads: 2, ISA: cpu.AVX2}, {Threads: 2, ISA: cpu.Portable},
	} {
		name := fmt.Sprintf("%v on %d threads", o.ISA, o.Threads)
		c, err := cpu.New(o)
		if errors.Is(err, cpu.ErrNotSupported) {
			t.Logf("not tried: %v", err)
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		r := newRig(t, shapesModel, c, engine.Limits{Rows: 64, Seqs: 1})
		p := prepare(t, r)[2]
		s := r.start(p.Input, p.grids(), p.planes, p.params, 3)
		var got answer
		for len(s.output) < 3 {
			got.take(s, r.step(len(p.Input), s)[0])
		}
		if first == nil {
			first = &got
			continue
		}
		first.compare(t, name, &got)
	}
}
