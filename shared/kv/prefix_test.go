package kv_test

import (
	"encoding/binary"
	"errors"
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"trireme.dev/shared/kv"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/model"
)

// Any difference in what KV depends on changes the hash of the block where it is and of all behind, and none before.
func TestHashes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const n = 10 * model.BlockTokens
		tokens := make([]int32, n+rapid.IntRange(0, 15).Draw(t, "more"))
		for i := range tokens {
			tokens[i] = int32(i % 7)
		}
		start := rapid.IntRange(0, n-30).Draw(t, "start")
		pictures := []kv.Picture{
			{Start: start, Tokens: 20, Grid: [3]int{1, 8, 10}, Content: [32]byte{1}},
			{Start: start + 20, Tokens: 10, Grid: [3]int{1, 4, 10}, Content: [32]byte{2}},
		}
		o := kv.Origin{Model: [32]byte{1}, Processor: [32]byte{2}, Kernels: "k", Salt: "s"}
		want := kv.Hashes(o, tokens, pictures)
		if len(want) != n/model.BlockTokens {
			t.Fatalf("%d hashes of %d tokens", len(want), len(tokens))
		}
		at := 0 // the first token that is different
		switch change := rapid.SampledFrom([]string{"token", "picture", "grid", "model", "processor", "kernels", "salt", "place"}).Draw(t, "change"); change {
		case "token":
			at = rapid.IntRange(0, n-1).Draw(t, "at")
			tokens[at]++
			if at >= start && at < start+30 { // placeholders stand for the picture, whatever their id
				at = n
			}
		case "picture":
			pictures[1].Content[31]++
			at = pictures[1].Start
		case "grid":
			pictures[0].Grid = [3]int{1, 10, 8}
			at = start
		case "place": // the same tokens of a picture, one further
			pictures[1].Start++
			pictures[1].Tokens--
			at = start + 20
		case "model":
			o.Model[3]++
		case "processor":
			o.Processor[0]++
		case "kernels":
			o.Kernels += "1"
		case "salt":
			o.Salt = ""
		}
		got := kv.Hashes(o, tokens, pictures)
		for i := range want {
			if same := i < at/model.BlockTokens; (got[i] == want[i]) != same {
				t.Fatalf("block %d of a sequence that differs from token %d on: same hash %v", i, at, got[i] == want[i])
			}
		}
		if longer := kv.Hashes(o, append(slices.Clone(tokens), 5), pictures); !slices.Equal(longer[:len(got)], got) {
			t.Fatal("a token behind changes the hashes before it")
		}
	})
}

// A sequence that begins with another's blocks is opened by a successor like any other, and a wrong block ends what it
// may share.
func TestShare(t *testing.T) {
	donor := []*slab{newSlab(1), newSlab(2)}
	bytesOf := func(s *slab, block int) []byte {
		size := text.BlockFloats() * 4
		return s.p[block*size : (block+1)*size]
	}
	var blocks []kv.BlockRef
	for i := range 20 {
		b := kv.BlockRef{Slab: i / kv.SlabBlocks, Block: i % kv.SlabBlocks, Sealed: true}
		p := bytesOf(donor[b.Slab], b.Block)
		for k := range p {
			p[k] = byte(i + k)
		}
		b.CRC = mem.Checksum(p)
		blocks = append(blocks, b)
	}
	shape := kv.LogShape{Request: "r", Attempt: 1, Prompt: 20*16 + 5, MaxTokens: 40, MaxSlabs: 5}
	begin := func() (*kv.Log, *kv.Sequence) {
		log, _ := newLog(t, shape)
		return log, kv.NewSequence(text, log)
	}
	log, seq := begin()
	if n, err := seq.Share([]kv.Slab{donor[0], donor[1]}, blocks); n != 20 || err != nil {
		t.Fatalf("shared %d blocks, %v", n, err)
	}
	own := newSlab(3)
	if err := seq.AddSlab(own); err != nil {
		t.Fatal(err)
	}
	if err := seq.Grow(shape.Prompt); err != nil {
		t.Fatal(err)
	}
	if err := log.Append(kv.Record{Token: 1}); err != nil {
		t.Fatal(err)
	}
	again, err := kv.OpenSequence(text, log, []kv.Slab{donor[0], donor[1], own})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := again.Room(), (20+kv.SlabBlocks)*model.BlockTokens; got != want { // nothing of the donor's is reserve
		t.Errorf("room for %d positions, want %d", got, want)
	}
	if &again.Blocks[20][0] != &seq.Blocks[20][0] || &again.Blocks[3][0] != &seq.Blocks[3][0] {
		t.Error("the successor's blocks are others")
	}

	bytesOf(donor[1], 1)[0]++
	log, seq = begin()
	n, err := seq.Share([]kv.Slab{donor[0], donor[1]}, blocks)
	if n != 17 || !errors.Is(err, mem.ErrCorrupt) || len(seq.Blocks) != 17 || log.BlockCount() != 17 {
		t.Errorf("with block 17 wrong: shared %d (%d in the sequence), %v", n, len(seq.Blocks), err)
	}
}

// What may be shared is slab by slab the sequence's own order, and no more than its number of blocks fills.
func TestWhole(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var blocks []kv.BlockRef
		for slab := 0; len(blocks) < 80 && slab < 9; slab++ { // runs of others' slabs, mostly from a slab's first block on
			first := max(0, rapid.IntRange(-20, kv.SlabBlocks-1).Draw(t, "first"))
			n := min(kv.SlabBlocks-first, rapid.IntRange(1, 30).Draw(t, "blocks"))
			for b := range n {
				blocks = append(blocks, kv.BlockRef{Slab: slab, Block: first + b})
			}
		}
		want := 0
		for ; want+kv.SlabBlocks <= len(blocks); want += kv.SlabBlocks {
			ok := true
			for b, ref := range blocks[want : want+kv.SlabBlocks] {
				ok = ok && ref == kv.BlockRef{Slab: blocks[want].Slab, Block: b}
			}
			if !ok {
				break
			}
		}
		if got := kv.Whole(blocks); got != want {
			t.Fatalf("%d of %+v may be shared, want %d", got, blocks, want)
		}
	})
}

// Blocks that are copied hold what their sources hold, in the sequence's own slab, and a wrong one is found, before the
// copy or in it.
func TestCopy(t *testing.T) {
	donor := []kv.Slab{newSlab(1), newSlab(2)}
	size := text.BlockFloats() * 4
	var blocks []kv.BlockRef
	for i := range 20 {
		b := kv.BlockRef{Slab: i % 2, Block: i / 2, Sealed: true}
		p := donor[b.Slab].Bytes()[b.Block*size : (b.Block+1)*size]
		for k := range p {
			p[k] = byte(3*i + k)
		}
		b.CRC = mem.Checksum(p)
		blocks = append(blocks, b)
	}
	shape := kv.LogShape{Request: "r", Attempt: 1, Prompt: 20*16 + 5, MaxTokens: 40, MaxSlabs: 5}
	begin := func() (*kv.Log, *kv.Sequence) {
		log, _ := newLog(t, shape)
		seq := kv.NewSequence(text, log)
		for i := range 2 {
			if err := seq.AddSlab(newSlab(uint64(3 + i))); err != nil {
				t.Fatal(err)
			}
		}
		return log, seq
	}
	log, seq := begin()
	if n, err := seq.Copy(donor, blocks, copied); n != 20 || err != nil {
		t.Fatalf("copied %d blocks, %v", n, err)
	}
	for i, ref := range blocks {
		p := donor[ref.Slab].Bytes()[ref.Block*size:]
		if got, err := log.Block(i); err != nil || !got.Sealed || got.CRC != ref.CRC || seq.Blocks[i][1] != floatAt(p[4:]) {
			t.Errorf("block %d is %+v, %v", i, got, err)
		}
	}
	if err := seq.Grow(shape.Prompt); err != nil {
		t.Fatal(err)
	}
	if err := log.Append(kv.Record{Token: 1}); err != nil {
		t.Fatal(err)
	}
	if _, err := kv.OpenSequence(text, log, seq.SlabList()); err != nil {
		t.Error(err)
	}

	_, seq = begin()
	copies := 0
	n, err := seq.Copy(donor, blocks, func(dst, src []float32) error {
		copy(dst, src)
		if copies++; copies == 8 {
			dst[3]++
		}
		return nil
	})
	if n != 7 || !errors.Is(err, mem.ErrCorrupt) {
		t.Errorf("with a wrong copy: %d blocks, %v", n, err)
	}
	_, seq = begin()
	copies = 0
	n, err = seq.Copy(donor, blocks, func(dst, src []float32) error {
		if copies++; copies == 4 {
			return mem.ErrEnded
		}
		return copied(dst, src)
	})
	if n != 3 || copies != 4 || !errors.Is(err, mem.ErrEnded) {
		t.Errorf("ended in the middle: %d blocks after %d, %v", n, copies, err)
	}
	donor[1].Bytes()[2*size+9]++ // of block 5
	_, seq = begin()
	if n, err := seq.Copy(donor, blocks, copied); n != 5 || !errors.Is(err, mem.ErrCorrupt) {
		t.Errorf("with block 5 wrong: %d blocks, %v", n, err)
	}
	blocks[2].Block = kv.SlabBlocks
	_, seq = begin()
	if n, err := seq.Copy(donor, blocks, copied); n != 2 || !errors.Is(err, mem.ErrCorrupt) {
		t.Errorf("with a block that its slab does not have: %d blocks, %v", n, err)
	}
}

func floatAt(p []byte) float32 { return math.Float32frombits(binary.NativeEndian.Uint32(p)) }

// BenchmarkHashes is what a prompt's keys cost: of text, and of pictures of 256 tokens each.
func BenchmarkHashes(b *testing.B) {
	const tokens, each = 8192, 256
	prompt := make([]int32, tokens)
	for name, count := range map[string]int{"text": 0, "pictures": tokens / each} {
		pictures := make([]kv.Picture, count)
		for i := range pictures {
			pictures[i] = kv.Picture{Start: i * each, Tokens: each, Grid: [3]int{1, 32, 32}}
		}
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				kv.Hashes(kv.Origin{}, prompt, pictures)
			}
		})
	}
}
