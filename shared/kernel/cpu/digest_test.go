package cpu

import (
	"encoding/binary"
	"hash/crc32"
	"math"
	"testing"

	"trireme.dev/shared/kernel"
	"trireme.dev/shared/model"
)

// digestBits is the CRC32C of the results below under Digest. It is the same for every instruction set and every
// processor; a change means that sequences computed before and after it must not be mixed: give Digest a new name.
const digestBits = 0x81ef1e1d

// sequence is a fixed sequence of numbers in [-2, 2): the upper bits of a linear congruential generator (Knuth, MMIX).
type sequence uint64

func (s *sequence) float() float32 {
	*s = *s*6364136223846793005 + 1442695040888963407
	return float32(int32(*s>>32)) / (1 << 30)
}

func (s *sequence) floats(n int) []float32 {
	to := make([]float32, n)
	for i := range to {
		to[i] = s.float()
	}
	return to
}

func (s *sequence) matrix(rows, cols int) model.Matrix {
	m := model.Matrix{Data: make([]model.BF16, rows*cols), Rows: rows, Cols: cols}
	for i := range m.Data {
		m.Data[i] = model.BF16(math.Float32bits(s.float()/8) >> 16)
	}
	return m
}

func TestDigest(t *testing.T) {
	for _, isa := range []ISA{Portable, AVX2, AVX512} {
		t.Run(isa.String(), func(t *testing.T) {
			if got := resultBits(open(t, isa, 2)); got != digestBits {
				t.Errorf("the results have checksum %#x, want %#x of %s", got, digestBits, Digest)
			}
		})
	}
}

// resultBits runs every operation once, the later ones on results of the earlier, and returns the checksum of all.
func resultBits(c kernel.Compute) uint32 {
	const rows, hidden, inner, experts, topK = 21, 72, 45, 7, 3
	shape := kernel.AttnShape{Layers: 1, Heads: 4, KVHeads: 2, Dim: 18}
	seed := sequence(1)
	sum := crc32.New(crc32.MakeTable(crc32.Castagnoli))
	keep := func(s []float32) {
		if err := binary.Write(sum, binary.LittleEndian, s); err != nil {
			panic(err) // a hash returns no error
		}
	}
	x := seed.floats(rows * hidden)
	weight, bias := seed.floats(hidden), seed.floats(hidden)
	c.RMSNorm(x, x, rows, weight, 1e-6)
	keep(x)
	qkv := make([]float32, rows*3*hidden)
	c.Linear(qkv, x, rows, seed.matrix(3*hidden, hidden), seed.floats(3*hidden))
	keep(qkv)
	c.Rotate(qkv, rows, 3*hidden, 8, 18, seed.floats(rows*9), seed.floats(rows*9))
	keep(qkv)
	out := make([]float32, rows*hidden)
	c.SegmentAttention(out, qkv, []int{4, rows - 4}, 4, 18)
	keep(out)
	c.Add(x, out)
	c.LayerNorm(x, x, rows, weight, bias, 1e-6)
	keep(x)
	k, v := seed.floats(rows*36), seed.floats(rows*36)
	blocks := [][]float32{make([]float32, 2*16*36), make([]float32, 2*16*36)}
	seqs := []kernel.Seq{{Rows: rows, Blocks: blocks}}
	c.StoreKV(0, shape, k, v, seqs)
	c.Attention(0, shape, out, x, seqs)
	keep(out)
	c.GELU(out, false)
	keep(out)
	c.GELU(x, true)
	keep(x)
	logits, ids, weights := make([]float32, rows*experts), make([]int32, rows*topK), make([]float32, rows*topK)
	c.Linear(logits, x, rows, seed.matrix(experts, hidden), nil)
	c.Route(logits, rows, experts, topK, true, ids, weights)
	keep(weights)
	c.Route(logits, rows, experts, topK, false, ids, weights)
	keep(weights)
	set := make([]model.Expert, experts)
	for e := range set {
		set[e] = model.Expert{Gate: seed.matrix(inner, hidden), Up: seed.matrix(inner, hidden), Down: seed.matrix(hidden, inner)}
	}
	slots := make([]float32, rows*topK*hidden)
	c.Experts(slots, x, rows, topK, ids, set)
	keep(slots)
	c.Combine(x, slots, rows, topK, weights)
	keep(x)
	c.SiLUMul(x, out)
	keep(x)
	return sum.Sum32()
}
