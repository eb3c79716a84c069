// Package mem names device memory: handles that travel between processes, the extents behind them, and the rules for
// mapping them. Backends live in mem/host and, later, mem/cuda; mem/page places extents. It moves no bytes itself.
package mem

import (
	"fmt"
	"hash/crc32"
)

// Kind says what an object holds; memory is accounted by NPU and kind.
type Kind uint8

// The kinds of object.
const (
	KindPixels  Kind = iota + 1 // encoded picture bytes as the client sent them, in host memory
	KindSpec                    // a request's prompt and parameters when too large for a message, in host memory
	KindMM                      // multimodal tokens: [levels, tokens, hidden] float32
	KindKV                      // one KV slab: SlabBlocks KV blocks
	KindLog                     // one sequence's token log
	KindWeights                 // model weights
)

// String returns the kind's name as metrics and status print it.
func (k Kind) String() string {
	switch k {
	case KindPixels:
		return "pixels"
	case KindSpec:
		return "spec"
	case KindMM:
		return "mm"
	case KindKV:
		return "kv"
	case KindLog:
		return "log"
	case KindWeights:
		return "weights"
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// HostNPU is the NPU number that stands for host memory.
const HostNPU = -1

// Shared is the NPU number of memory that belongs to all NPUs of the memory domain behind a space: weights. Of space 0,
// host memory, it is HostNPU.
func Shared(space int) int { return HostNPU - space }

// Handle is a name for device memory that can travel: it goes on the bus, what it names never does. It is issued by
// the HMM of Node and proves the right to attach by Capability; Generation tells a reused object id from the one meant.
// A handle stays valid while any hold keeps its object; attaching after that fails with ErrGone.
type Handle struct {
	//lint:ignore U1000 msgpack reads it by reflection
	_msgpack struct{} `msgpack:",as_array"`

	Node       string
	Object     uint64
	Generation uint64
	Kind       Kind
	NPU        int16  // NPU that the bytes are booked to, HostNPU for host memory, Shared for what a domain shares
	Bytes      int64  // length of the content; the extent behind it is padded to pages
	Shape      []int  // of the content, in elements of float32; nil for plain bytes
	Sealed     bool   // the content is final and CRC holds its CRC-32C
	CRC        uint32 // see Sealed
	Capability []byte // HMAC-SHA-256 by the HMM over the other identifying fields, cut to 16 bytes
}

// Access is the right to a mapping.
type Access uint8

// The two rights. A sealed object can only be attached ReadOnly.
const (
	ReadOnly Access = iota
	ReadWrite
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Checksum is the CRC-32C of p, the checksum of every handle and record.
func Checksum(p []byte) uint32 { return crc32.Checksum(p, castagnoli) }

// Extend continues Checksum: Extend(Checksum(a), b) == Checksum(append(a, b...)).
func Extend(crc uint32, p []byte) uint32 { return crc32.Update(crc, castagnoli, p) }
