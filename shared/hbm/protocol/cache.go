package protocol

import (
	"encoding/binary"
	"fmt"
	"time"

	"trireme.dev/shared/mem"
)

// Key is a SHA-256 that names content: of an MM object or of a KV block.
type Key = [32]byte

// FindMM asks for the MM object of a key, or for the right to make it under a claim.
type FindMM struct {
	Key        Key
	Ref        Ref // request hold of the object that is found
	Part       Part
	Generation uint64        // of the claim on Part
	Wait       time.Duration // to wait for another one who makes it
}

// FoundMM answers FindMM: the object, or a ticket to make it, or, with neither, that the client makes it for itself
// because there is no cache or the wait was too long.
type FoundMM struct {
	Handle *mem.Handle
	Ticket uint64 // 0: none
}

// PublishMM gives a sealed MM object to the cache.
type PublishMM struct {
	Key    Key
	Ticket uint64
	Object Object
}

// AbandonMM gives a ticket back without an object.
type AbandonMM struct {
	Key    Key
	Ticket uint64
}

// CacheBlocks enters full KV blocks into the prefix index.
type CacheBlocks struct {
	Slabs  []Object
	Hashes []byte // packed keys, of as many blocks as Blocks has
	Blocks []byte // packed; Slab counts in Slabs
}

// FindPrefix asks for the longest run of cached blocks.
type FindPrefix struct {
	NPU    int    // in whose memory domain
	Hashes []byte // packed keys of the prompt's blocks, in order
}

// Prefix answers FindPrefix.
type Prefix struct {
	Slabs  []Grant // in order of their first block
	Blocks []byte  // packed, of the first hashes; Slab counts in Slabs
}

// Block says where a KV block lies and what its content's checksum is.
type Block struct {
	Slab, Block int
	CRC         uint32 // CRC-32C
}

// MaxBlocks is the most blocks of one request.
const MaxBlocks = 16 << 10

const (
	keyBytes   = len(Key{})
	blockBytes = 8 // big-endian: slab in 2, block in 2, CRC in 4
)

// PackKeys puts keys one behind the other.
func PackKeys(keys []Key) []byte {
	b := make([]byte, 0, len(keys)*keyBytes)
	for i := range keys {
		b = append(b, keys[i][:]...)
	}
	return b
}

// UnpackKeys is the reverse of PackKeys: mem.ErrInvalid for half a key or more than MaxBlocks.
func UnpackKeys(b []byte) ([]Key, error) {
	if len(b)%keyBytes != 0 || len(b) > MaxBlocks*keyBytes {
		return nil, fmt.Errorf("%d bytes of keys of %d: %w", len(b), keyBytes, mem.ErrInvalid)
	}
	keys := make([]Key, len(b)/keyBytes)
	for i := range keys {
		copy(keys[i][:], b[i*keyBytes:])
	}
	return keys, nil
}

// PackBlocks puts blocks one behind the other. Slabs and blocks are below 64 Ki.
func PackBlocks(blocks []Block) []byte {
	b := make([]byte, 0, len(blocks)*blockBytes)
	for _, x := range blocks {
		b = binary.BigEndian.AppendUint16(b, uint16(x.Slab))
		b = binary.BigEndian.AppendUint16(b, uint16(x.Block))
		b = binary.BigEndian.AppendUint32(b, x.CRC)
	}
	return b
}

// UnpackBlocks is the reverse of PackBlocks: mem.ErrInvalid for half a block or more than MaxBlocks.
func UnpackBlocks(b []byte) ([]Block, error) {
	if len(b)%blockBytes != 0 || len(b) > MaxBlocks*blockBytes {
		return nil, fmt.Errorf("%d bytes of blocks of %d: %w", len(b), blockBytes, mem.ErrInvalid)
	}
	blocks := make([]Block, len(b)/blockBytes)
	for i := range blocks {
		p := b[i*blockBytes:]
		blocks[i] = Block{
			Slab: int(binary.BigEndian.Uint16(p)), Block: int(binary.BigEndian.Uint16(p[2:])), CRC: binary.BigEndian.Uint32(p[4:]),
		}
	}
	return blocks, nil
}
