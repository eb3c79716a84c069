package kv_test

import (
	"errors"
	"testing"

	"pgregory.net/rapid"

	"trireme.dev/shared/kv"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/model"
)

// Whoever opens a sequence, a fork of it or its successor's copy finds any change to the KV of any position that was there
// when the last token was committed: in full blocks and in the open one, as prefill has left it, a decoder has gone on, or
// an answer was resumed.
func TestAnyChangeToKVIsFound(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		prompt := rapid.IntRange(1, 60).Draw(t, "prompt")
		shape := kv.LogShape{Request: "r", Attempt: 1, Prompt: prompt, MaxTokens: 60, MaxSlabs: 4}
		newSequence := func() (*kv.Sequence, *kv.Log) {
			log, err := kv.CreateLog(aligned(int(shape.Bytes())), shape, 1)
			if err != nil {
				t.Fatal(err)
			}
			return kv.NewSequence(text, log), log
		}
		must := func(err error) {
			if err != nil {
				t.Helper()
				t.Fatal(err)
			}
		}
		each := func(seq *kv.Sequence, p int, f func(x *float32)) { // of the floats of a position
			row := text.KVHeads * text.HeadDim
			for at := p % model.BlockTokens * row; at < text.BlockFloats(); at += model.BlockTokens * row {
				for i := range row {
					f(&seq.Blocks[p/model.BlockTokens][at+i])
				}
			}
		}
		compute := func(seq *kv.Sequence, from, to int) {
			must(seq.Grow(to))
			for p := from; p < to; p++ {
				each(seq, p, func(x *float32) { *x = float32(p + 1) })
			}
			seq.Seal(from, to)
		}
		seq, log := newSequence()
		must(seq.AddSlab(newSlab(1)))
		resumed := rapid.IntRange(0, 20).Draw(t, "resumed")
		for i := range resumed {
			must(log.Append(kv.Record{Index: i, Token: 3}))
		}
		end := prompt + resumed
		compute(seq, 0, end)
		must(seq.Append(kv.Record{Index: resumed, Token: 4}))
		if resumed == 0 && rapid.Bool().Draw(t, "fork") {
			_, forkLog := newSequence()
			fork, err := seq.Fork(text, forkLog, prompt, newSlab(2), func(dst, src []float32) { copy(dst, src) })
			must(err)
			must(fork.Append(kv.Record{Index: 0, Token: 5}))
			seq, log = fork, forkLog
		}
		for n := resumed + 1; n <= resumed+rapid.IntRange(0, 35).Draw(t, "steps"); n++ {
			compute(seq, end, end+1)
			end++
			must(seq.Append(kv.Record{Index: n, Token: int32(n)}))
		}
		if rapid.Bool().Draw(t, "succeed") {
			c, err := log.Continuation(kv.Known{}, func(mem.Handle) bool { return false })
			must(err)
			shape = c.Shape
			_, nextLog := newSequence()
			var fresh []kv.Slab
			for i := range c.Fresh {
				fresh = append(fresh, newSlab(uint64(10+i)))
			}
			seq, err = seq.Continue(text, c, nextLog, fresh, copied)
			must(err)
			log = nextLog
		}
		open := func() error {
			_, err := kv.OpenSequence(text, log, seq.SlabList())
			return err
		}
		must(open())
		at := rapid.IntRange(0, end-1).Draw(t, "position")
		which := rapid.IntRange(0, text.BlockFloats()/model.BlockTokens-1).Draw(t, "float")
		n := 0
		each(seq, at, func(x *float32) {
			if n == which {
				*x++
			}
			n++
		})
		if err := open(); !errors.Is(err, mem.ErrCorrupt) {
			t.Fatalf("with a wrong position %d of %d: %v", at, end, err)
		}
	})
}

// A successor that copies the open block compares its copy with the records.
func TestWrongCopyOfTheOpenBlock(t *testing.T) {
	shape := kv.LogShape{Request: "r", Attempt: 1, Prompt: 20, MaxTokens: 10, MaxSlabs: 4}
	log, _ := newLog(t, shape)
	seq := kv.NewSequence(text, log)
	if err := errors.Join(seq.AddSlab(newSlab(1)), seq.Grow(20)); err != nil {
		t.Fatal(err)
	}
	seq.Seal(0, 20)
	if err := seq.Append(kv.Record{Token: 1}); err != nil {
		t.Fatal(err)
	}
	c, err := log.Continuation(kv.Known{}, func(mem.Handle) bool { return false })
	if err != nil {
		t.Fatal(err)
	}
	next, _ := newLog(t, c.Shape)
	copies := 0
	_, err = seq.Continue(text, c, next, []kv.Slab{newSlab(2)}, func(dst, src []float32) error {
		copy(dst, src)
		if copies++; copies == 2 {
			dst[0]++
		}
		return nil
	})
	if !errors.Is(err, mem.ErrCorrupt) {
		t.Errorf("with a wrong copy: %v", err)
	}
}

// copied is a copyBlock that does nothing but that.
func copied(dst, src []float32) error { copy(dst, src); return nil }
