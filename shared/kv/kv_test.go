package kv_test

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"testing"
	"unsafe"

	"pgregory.net/rapid"

	"trireme.dev/shared/kv"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/model"
)

// text is a small model: blocks of 2*2*16*1*4 floats.
var text = &model.Text{Layers: 2, KVHeads: 1, HeadDim: 4}

// slab is KV memory made by the test.
type slab struct {
	h mem.Handle
	p []byte
}

func (s *slab) Handle() mem.Handle { return s.h }
func (s *slab) Bytes() []byte      { return s.p }

func newSlab(id uint64) *slab {
	n := kv.SlabBytes(text)
	return &slab{
		h: mem.Handle{Node: "n", Object: id, Generation: id * 7, Kind: mem.KindKV, NPU: 3, Bytes: n, Capability: make([]byte, 16)},
		p: aligned(int(n)),
	}
}

// aligned returns memory on an 8-byte boundary, as mapped memory is.
func aligned(n int) []byte {
	words := make([]uint64, (n+7)/8)
	return unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), n)
}

func shape() kv.LogShape {
	return kv.LogShape{Request: "req", Choice: 2, Attempt: 1, Prompt: 20, MaxTokens: 500, MaxSlabs: 4, Top: 3}
}

func newLog(t testing.TB, s kv.LogShape) (*kv.Log, []byte) {
	t.Helper()
	p := aligned(int(s.Bytes()))
	log, err := kv.CreateLog(p, s, 9)
	if err != nil {
		t.Fatal(err)
	}
	return log, p
}

func TestLogReadsBackWhatWasWritten(t *testing.T) {
	log, p := newLog(t, shape())
	want := []kv.Record{
		{Index: 0, Token: 5, Logprob: -0.5, TopIDs: []int32{5, 6, 7}, Top: []float32{-0.5, -1, -2}},
		{Index: 1, Token: 1 << 20, Logprob: -3, TopIDs: []int32{1}, Top: []float32{-0.1}, Covers: 3, KV: 1 << 31},
		{Index: 2, Token: 0, Logprob: 0},
	}
	for _, r := range want {
		if err := log.Append(r); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := log.AddSlab(newSlab(11).h, true); err != nil {
		t.Fatal(err)
	}
	if _, err := log.AddSlab(newSlab(12).h, false); err != nil {
		t.Fatal(err)
	}
	if err := log.AddBlock(0, 4); err != nil {
		t.Fatal(err)
	}
	log.SealBlock(0, 77)

	got, err := kv.OpenLog(p)
	if err != nil {
		t.Fatal(err)
	}
	if got.Shape() != shape() || got.Generation() != 9 || got.Committed() != 3 || got.SlabCount() != 2 || got.BlockCount() != 1 {
		t.Fatalf("reopened log: %+v, generation %d, %d records, %d slabs, %d blocks",
			got.Shape(), got.Generation(), got.Committed(), got.SlabCount(), got.BlockCount())
	}
	for i, w := range want {
		r, err := got.Record(i)
		if err != nil || r.Token != w.Token || r.Logprob != w.Logprob || !slices.Equal(r.TopIDs, w.TopIDs) || !slices.Equal(r.Top, w.Top) {
			t.Errorf("record %d is %+v, %v; want %+v", i, r, err, w)
		}
	}
	h, own, err := got.Slab(0)
	if err != nil || h.Object != 11 || h.Generation != 77 || h.NPU != 3 || !own {
		t.Errorf("slab 0 is %+v, own %v, %v", h, own, err)
	}
	if _, own, _ = got.Slab(1); own {
		t.Error("slab 1 is not the sequence's own, yet reads so")
	}
	if b, err := got.Block(0); err != nil || b != (kv.BlockRef{Slab: 0, Block: 4, Sealed: true, CRC: 77}) {
		t.Errorf("block 0 is %+v, %v", b, err)
	}
}

// Every flipped bit of the header, a slab entry, a block entry or a committed record is found.
func TestLogFindsEveryFlippedBit(t *testing.T) {
	log, p := newLog(t, kv.LogShape{Request: "r", Attempt: 1, Prompt: 1, MaxTokens: 4, MaxSlabs: 1})
	if _, err := log.AddSlab(newSlab(3).h, true); err != nil {
		t.Fatal(err)
	}
	if err := log.AddBlock(0, 3); err != nil {
		t.Fatal(err)
	}
	log.SealBlock(0, 99)
	for i := range 3 {
		if err := log.Append(kv.Record{Index: i, Token: int32(i), Logprob: float32(math.NaN())}); err != nil {
			t.Fatal(err)
		}
	}
	covered := func(i int) bool { // constant header; the slab entry, the block entry, three records
		return i < 76 || i >= 256 && i < 256+64+16+3*16
	}
	for i := range p {
		if !covered(i) {
			continue
		}
		for bit := range 8 {
			p[i] ^= 1 << bit
			if _, err := kv.OpenLog(p); !errors.Is(err, mem.ErrCorrupt) {
				t.Fatalf("bit %d of byte %d flipped: error %v", bit, i, err)
			}
			p[i] ^= 1 << bit
		}
	}
	if _, err := kv.OpenLog(p); err != nil {
		t.Fatalf("after all bits are back: %v", err)
	}
}

func TestLogRefusesWrongOrder(t *testing.T) {
	log, _ := newLog(t, shape())
	for _, i := range []int{1, -1, 500} {
		if err := log.Append(kv.Record{Index: i}); !errors.Is(err, mem.ErrInvalid) {
			t.Errorf("appending record %d to an empty log: %v", i, err)
		}
	}
}

func FuzzOpenLog(f *testing.F) {
	_, p := newLog(f, kv.LogShape{Request: "r", Attempt: 1, Prompt: 1, MaxTokens: 2, MaxSlabs: 1})
	f.Add(p)
	f.Add(p[:100])
	whole, p := newLog(f, kv.LogShape{Request: "r", Attempt: 1, Prompt: 17, MaxTokens: 2, MaxSlabs: 1})
	seq := kv.NewSequence(text, whole)
	if err := seq.AddSlab(newSlab(1)); err != nil {
		f.Fatal(err)
	}
	if err := seq.Grow(17); err != nil {
		f.Fatal(err)
	}
	seq.Seal(0, 17)
	f.Add(p)
	f.Fuzz(func(t *testing.T, data []byte) {
		q := aligned(max(len(data), 1))[:len(data)]
		copy(q, data)
		log, err := kv.OpenLog(q)
		if err != nil || log.SlabCount() > 8 {
			return
		}
		var slabs []kv.Slab
		for i := range log.SlabCount() {
			slabs = append(slabs, newSlab(uint64(i+1)))
		}
		if s, err := kv.OpenSequence(text, log, slabs); err == nil && len(s.Blocks)*16 < log.Shape().Prompt {
			t.Errorf("%d blocks for a prompt of %d", len(s.Blocks), log.Shape().Prompt)
		}
	})
}

// Random growth, sealing, forks and reopening keep every position's content, and never let two sequences write the
// same block.
func TestSequencesKeepTheirPositions(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		next := uint64(1)
		take := func() *slab { next++; return newSlab(next) }
		prompt := rapid.IntRange(1, 600).Draw(t, "prompt")
		forks := rapid.IntRange(0, 3).Draw(t, "forks")
		s := kv.LogShape{Request: "r", Attempt: 1, Prompt: prompt, MaxTokens: 600, MaxSlabs: 10}

		write := func(seq *kv.Sequence, from, to int, tag float32) {
			for seq.Room() < to {
				if err := seq.AddSlab(take()); err != nil {
					t.Fatal(err)
				}
			}
			if err := seq.Grow(to); err != nil {
				t.Fatal(err)
			}
			for p := from; p < to; p++ {
				seq.Blocks[p/16][p%16] = tag + float32(p)
			}
			seq.Seal(from, to)
		}
		check := func(seq *kv.Sequence, to int, tag float32) {
			for p := range to {
				want := float32(p)
				if p >= prompt {
					want += tag
				}
				if got := seq.Blocks[p/16][p%16]; got != want {
					t.Fatalf("position %d holds %g, want %g", p, got, want)
				}
			}
		}
		mk := func(c int) *kv.Log {
			sh := s
			sh.Choice = c
			log, err := kv.CreateLog(aligned(int(sh.Bytes())), sh, 1)
			if err != nil {
				t.Fatal(err)
			}
			return log
		}
		first := kv.NewSequence(text, mk(0))
		for at := 0; at < prompt; {
			n := min(prompt-at, rapid.IntRange(1, 200).Draw(t, "chunk"))
			write(first, at, at+n, 0)
			at += n
		}
		seqs := []*kv.Sequence{first}
		for c := 1; c <= forks; c++ {
			f, err := first.Fork(text, mk(c), prompt, take(), func(dst, src []float32) { copy(dst, src) })
			if err != nil {
				t.Fatal(err)
			}
			seqs = append(seqs, f)
		}
		ends := make([]int, len(seqs))
		for i := range ends {
			ends[i] = prompt
		}
		for range rapid.IntRange(0, 12).Draw(t, "steps") {
			i := rapid.IntRange(0, len(seqs)-1).Draw(t, "which")
			if rapid.Bool().Draw(t, "reopen") {
				re, err := kv.OpenSequence(text, seqs[i].Log, seqs[i].SlabList())
				if err != nil {
					t.Fatal(err)
				}
				if re.Room() != seqs[i].Room() {
					t.Fatalf("sequence %d reopened with room for %d, had %d", i, re.Room(), seqs[i].Room())
				}
				seqs[i] = re
			}
			n := rapid.IntRange(1, 40).Draw(t, "tokens")
			write(seqs[i], ends[i], ends[i]+n, float32(1000*(i+1)))
			ends[i] += n
		}
		for i, seq := range seqs {
			check(seq, ends[i], float32(1000*(i+1)))
		}
	})
}

// Of two writers of one log, one of which was fenced between its check and its write, neither undoes what the other
// has committed, and the one that came too late is told.
func TestTwoWritersDoNotUndoEachOther(t *testing.T) {
	_, p := newLog(t, shape())
	open := func() *kv.Sequence {
		log, err := kv.OpenLog(p)
		if err != nil {
			t.Fatal(err)
		}
		return kv.NewSequence(text, log)
	}
	fenced, successor := open(), open()
	for i := range 3 {
		if err := successor.Log.Append(kv.Record{Index: i, Token: int32(i)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := successor.AddSlab(newSlab(1)); err != nil {
		t.Fatal(err)
	}
	if err := successor.Grow(20); err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"token": fenced.Log.Append(kv.Record{Index: 0, Token: 0}),
		"slab":  fenced.AddSlab(newSlab(2)),
		"block": fenced.Grow(20),
	} {
		if !errors.Is(err, mem.ErrFenced) {
			t.Errorf("adding a %s that is there: %v", name, err)
		}
	}
	log := open().Log
	if h, _, err := log.Slab(0); err != nil || h.Object != 1 || log.Committed() != 3 || log.SlabCount() != 1 || log.BlockCount() != 2 {
		t.Errorf("after both: slab %d, %v, %d tokens, %d slabs, %d blocks", h.Object, err, log.Committed(), log.SlabCount(), log.BlockCount())
	}
}

// Successors go on one after the other, at any moment, with all that is committed, in memory that the writers before cannot
// write to: those spoil all that was theirs. However many there are, a sequence needs no more slabs.
func TestSuccessorsShareNothingWritable(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		next := uint64(1)
		slabs := map[uint64]*slab{}
		take := func() *slab { next++; slabs[next] = newSlab(next); return slabs[next] }
		sh := kv.LogShape{Request: "r", Attempt: 1, Prompt: rapid.IntRange(1, 600).Draw(t, "prompt"), MaxTokens: 600, MaxSlabs: 7, Top: 1}
		create := func(sh kv.LogShape) (*kv.Log, []byte) {
			p := aligned(int(sh.Bytes()))
			log, err := kv.CreateLog(p, sh, 1)
			if err != nil {
				t.Fatal(err)
			}
			return log, p
		}
		log, p := create(sh)
		seq := kv.NewSequence(text, log)
		write := func(at int) { // KV of position at
			if seq.Room() <= at {
				if err := seq.AddSlab(take()); err != nil {
					t.Fatal(err)
				}
			}
			if err := seq.Grow(at + 1); err != nil {
				t.Fatal(err)
			}
			seq.Blocks[at/16][at%16] = float32(at)
			seq.Seal(at, at+1)
		}
		commit := func(n int) {
			if err := seq.Log.Append(kv.Record{Index: n, Token: int32(n), Logprob: float32(n) / 7, TopIDs: []int32{int32(n)}, Top: []float32{1}}); err != nil {
				t.Fatal(err)
			}
		}
		for at := range sh.Prompt {
			write(at)
		}
		commit(0)
		tokens := 1
		for range rapid.IntRange(1, 12).Draw(t, "successors") {
			for range rapid.IntRange(0, 50).Draw(t, "tokens") {
				write(sh.Prompt + tokens - 1)
				commit(tokens)
				tokens++
			}
			if rapid.Bool().Draw(t, "in the middle of a step") {
				write(sh.Prompt + tokens - 1)
			}
			before, err := kv.OpenLog(kv.Snapshot(p))
			if err != nil {
				t.Fatal(err)
			}
			c, err := before.Continuation(kv.Known{}, func(mem.Handle) bool { return false })
			if err != nil {
				t.Fatal(err)
			}
			var theirs []kv.Slab
			writable := map[uint64]bool{}
			for n := range before.SlabCount() {
				h, _, err := before.Slab(n)
				if err != nil {
					t.Fatal(err)
				}
				theirs = append(theirs, slabs[h.Object])
				writable[h.Object] = !slices.Contains(c.Share, n)
			}
			from, err := kv.OpenSequence(text, before, theirs)
			if err != nil {
				t.Fatal(err)
			}
			var fresh []kv.Slab
			for range c.Fresh {
				fresh = append(fresh, take())
			}
			log, own := create(c.Shape)
			if seq, err = from.Continue(text, c, log, fresh, copied); err != nil {
				t.Fatal(err)
			}
			for i := range p {
				p[i] ^= 0x5a
			}
			for id, w := range writable {
				for i := range slabs[id].p {
					if w {
						slabs[id].p[i] ^= 0x5a
					}
				}
			}
			p = own
			if log.Committed() != tokens || len(seq.SlabList()) > kv.Slabs(sh.Prompt+tokens) {
				t.Fatalf("%d tokens of %d, in %d slabs", log.Committed(), tokens, len(seq.SlabList()))
			}
		}
		re, err := kv.OpenLog(p)
		if err != nil {
			t.Fatal(err)
		}
		for at := range sh.Prompt + tokens - 1 {
			if got := seq.Blocks[at/16][at%16]; got != float32(at) {
				t.Fatalf("position %d holds %g", at, got)
			}
		}
		for i := range tokens {
			if rec, err := re.Record(i); err != nil || rec.Token != int32(i) || rec.Logprob != float32(i)/7 || rec.TopIDs[0] != int32(i) {
				t.Fatalf("record %d: %+v, %v", i, rec, err)
			}
		}
		if _, err := kv.OpenSequence(text, re, seq.SlabList()); err != nil {
			t.Fatal(err)
		}
	})
}

// A writer that dies at any moment of sealing a block leaves a log that opens: the block is sealed or not.
func TestTornSeal(t *testing.T) {
	_, p := newLog(t, kv.LogShape{Request: "r", Attempt: 1, Prompt: 1, MaxTokens: 4, MaxSlabs: 1})
	log, err := kv.OpenLog(p)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := log.AddSlab(newSlab(3).h, true); err != nil {
		t.Fatal(err)
	}
	if err := log.AddBlock(0, 3); err != nil {
		t.Fatal(err)
	}
	open := slices.Clone(p)
	log.SealBlock(0, 0x12345678)
	sealed := slices.Clone(p)
	const entry = 256 + 64
	for n := range 17 { // bytes written so far; the entry's own checksum, the last 4, in one store
		if n > 12 && n < 16 {
			continue
		}
		copy(p, open)
		copy(p[entry:entry+n], sealed[entry:])
		log, err := kv.OpenLog(p)
		if err != nil {
			t.Fatalf("after %d bytes: %v", n, err)
		}
		want := kv.BlockRef{Block: 3}
		if n == 16 {
			want.Sealed, want.CRC = true, 0x12345678
		}
		if b, err := log.Block(0); err != nil || b != want {
			t.Errorf("after %d bytes: %+v, %v", n, b, err)
		}
	}
}

// Tables that do not cover the positions whose KV must be there are refused: going on would attend to wrong blocks.
func TestOpenSequenceRefusesAnIncompleteTable(t *testing.T) {
	build := func(grow, seal int) (*kv.Log, []kv.Slab) {
		log, _ := newLog(t, shape()) // a prompt of 20
		seq := kv.NewSequence(text, log)
		if err := seq.AddSlab(newSlab(1)); err != nil {
			t.Fatal(err)
		}
		if err := seq.Grow(grow); err != nil {
			t.Fatal(err)
		}
		seq.Seal(0, seal)
		for i := range 14 { // 20+13 positions: two full blocks and one more
			if err := log.Append(kv.Record{Index: i}); err != nil {
				t.Fatal(err)
			}
		}
		return log, seq.SlabList()
	}
	for name, x := range map[string]struct {
		grow, seal int
		ok         bool
	}{
		"whole":           {33, 33, true},
		"a block more":    {49, 33, true}, // the writer died before its next token was committed
		"a block less":    {32, 32, false},
		"an open block":   {33, 31, false},
		"no block at all": {0, 0, false},
	} {
		log, slabs := build(x.grow, x.seal)
		_, err := kv.OpenSequence(text, log, slabs)
		if x.ok && err != nil || !x.ok && !errors.Is(err, mem.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestOpenSequenceFindsAFlippedByte(t *testing.T) {
	log, _ := newLog(t, shape())
	seq := kv.NewSequence(text, log)
	sl := newSlab(1)
	if err := seq.AddSlab(sl); err != nil {
		t.Fatal(err)
	}
	if err := seq.Grow(20); err != nil {
		t.Fatal(err)
	}
	seq.Seal(0, 20)
	sl.p[100] ^= 1 // in block 0, which is sealed
	if _, err := kv.OpenSequence(text, log, seq.SlabList()); !errors.Is(err, mem.ErrCorrupt) {
		t.Errorf("a flipped byte in a sealed block: %v", err)
	}
	sl.p[100] ^= 1
	sl.p[len(sl.p)-1] ^= 1 // in a block not in use
	if _, err := kv.OpenSequence(text, log, seq.SlabList()); err != nil {
		t.Errorf("a flipped byte outside sealed blocks: %v", err)
	}
}

func BenchmarkAppend(b *testing.B) {
	s := shape()
	s.MaxTokens, s.Top = 1<<20, 0
	log, _ := newLog(b, s)
	b.ReportAllocs()
	for i := range b.N {
		if err := log.Append(kv.Record{Index: i % (1 << 20), Token: 7}); err != nil {
			b.StopTimer()
			log, _ = newLog(b, s)
			b.StartTimer()
		}
	}
}

func ExampleSlabs() {
	fmt.Println(kv.Slabs(1), kv.Slabs(256), kv.Slabs(257))
	// Output: 1 1 2
}
