package hf

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"hash"
	"maps"
	"slices"

	"trireme.dev/shared/model"
)

// sampleBytes is how much of each end of a tensor goes into the digest: one page of memory.
const sampleBytes = 4096

// digest names a model by its content: SHA-256 over the numbers of cfg (all but Name) and, in order of name, over
// each tensor's name, dtype, shape and the first and last 4 KiB of its data, or all of it where it has no more than 8
// KiB. It does not depend on how the tensors are spread over files. Reading all of a model of 60 GB would take a
// minute; models that differ anywhere by training differ in every tensor that was trained, and so in the samples.
func digest(cfg model.Config, files []*Safetensors, index map[string]*Safetensors) (sum [32]byte) {
	for _, f := range files {
		f.mapping.random(true)
		defer f.mapping.random(false)
	}
	h := sha256.New()
	cfg.Name, cfg.Digest = "", [32]byte{}
	numbers, err := json.Marshal(cfg)
	if err != nil {
		panic("BUG: a model's numbers have no JSON form: " + err.Error())
	}
	writeSized(h, numbers)
	for _, name := range slices.Sorted(maps.Keys(index)) {
		t := index[name].tensors[name]
		writeSized(h, []byte(name))
		writeSized(h, []byte(t.DType))
		writeNumber(h, len(t.Shape))
		for _, d := range t.Shape {
			writeNumber(h, d)
		}
		if len(t.Data) <= 2*sampleBytes {
			h.Write(t.Data)
		} else {
			h.Write(t.Data[:sampleBytes])
			h.Write(t.Data[len(t.Data)-sampleBytes:])
		}
	}
	h.Sum(sum[:0])
	return sum
}

// writeSized adds the length of b and b.
func writeSized(h hash.Hash, b []byte) {
	writeNumber(h, len(b))
	h.Write(b)
}

// writeNumber adds n in eight bytes.
func writeNumber(h hash.Hash, n int) {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], uint64(n))
	h.Write(b[:])
}
