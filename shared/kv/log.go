package kv

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"sync/atomic"
	"unsafe"

	"trireme.dev/shared/mem"
)

const (
	logMagic   = "TRIRELOG"
	logVersion = 2

	headerBytes = 256
	slabBytes   = 64
	blockBytes  = 16

	// Offsets in the header. Bytes [0, offCRC) are constant and covered by the CRC there.
	offVersion     = 8
	offTop         = 12
	offRequest     = 16 // 32 bytes, zero-padded
	offChoice      = 48
	offAttempt     = 52
	offPrompt      = 56 // tokens
	offMaxTokens   = 60 // records
	offMaxBlocks   = 64
	offMaxSlabs    = 68
	offCRC         = 72
	offGeneration  = 80  // claim generation of the writer
	offCommitted   = 88  // records that count
	offSlabs       = 96  // slab entries in use
	offBlocks      = 104 // block entries in use
	maxRequestName = 32

	flagSealed = 1 // of a block entry: the block is full and its CRC is set
	flagOwn    = 1 // of a slab entry: see AddSlab
)

// LogShape fixes the size of a token log.
type LogShape struct {
	Request         string // at most 32 bytes
	Choice, Attempt int
	Prompt          int // tokens of the prompt
	MaxTokens       int // tokens of the answer at most
	MaxSlabs        int
	Top             int // alternatives kept with each token
}

// maxBlocks is the number of blocks that prompt and answer need.
func (s LogShape) maxBlocks() int { return Blocks(s.Prompt + s.MaxTokens) }

func (s LogShape) recordBytes() int { return 24 + 8*s.Top }

// Bytes is the size of the log.
func (s LogShape) Bytes() int64 {
	return int64(headerBytes + s.MaxSlabs*slabBytes + s.maxBlocks()*blockBytes + s.MaxTokens*s.recordBytes())
}

func (s LogShape) validate() error {
	if s.Request == "" || len(s.Request) > maxRequestName || s.Choice < 0 || s.Attempt < 1 || s.Prompt < 1 ||
		s.MaxTokens < 1 || s.MaxSlabs < 1 || s.Top < 0 || s.Top > 64 ||
		s.Prompt > 1<<28 || s.MaxTokens > 1<<28 || s.MaxSlabs > 1<<20 {
		return fmt.Errorf("token log of %+v: %w", s, mem.ErrInvalid)
	}
	return nil
}

// Record is one token of the answer.
type Record struct {
	Index   int
	Token   int32
	Logprob float32   // NaN when not computed
	TopIDs  []int32   // at most Top, falling probability
	Top     []float32 // log probabilities of TopIDs

	// The last Covers positions before this token, all in one block that was not full yet, have KV of checksum KV. The
	// positions of a block that is not sealed are covered by one record after the other; set by Sequence.Append.
	Covers int
	KV     uint32
}

// Log is a token log in mapped memory. One process writes it (the holder of the claim); others may read committed
// records at any time. It does not own the memory.
type Log struct {
	p                                   []byte
	shape                               LogShape
	slabs, blocks, records, recordBytes int // offsets and size
}

// CreateLog lays an empty log into p, which is zeroed memory of at least shape.Bytes().
func CreateLog(p []byte, shape LogShape, generation uint64) (*Log, error) {
	if err := shape.validate(); err != nil {
		return nil, err
	}
	if int64(len(p)) < shape.Bytes() {
		return nil, fmt.Errorf("token log of %d bytes in %d: %w", shape.Bytes(), len(p), mem.ErrInvalid)
	}
	copy(p, logMagic)
	le := binary.LittleEndian
	le.PutUint32(p[offVersion:], logVersion)
	le.PutUint32(p[offTop:], uint32(shape.Top))
	copy(p[offRequest:offRequest+maxRequestName], shape.Request)
	le.PutUint32(p[offChoice:], uint32(shape.Choice))
	le.PutUint32(p[offAttempt:], uint32(shape.Attempt))
	le.PutUint32(p[offPrompt:], uint32(shape.Prompt))
	le.PutUint32(p[offMaxTokens:], uint32(shape.MaxTokens))
	le.PutUint32(p[offMaxBlocks:], uint32(shape.maxBlocks()))
	le.PutUint32(p[offMaxSlabs:], uint32(shape.MaxSlabs))
	le.PutUint32(p[offCRC:], mem.Checksum(p[:offCRC]))
	l := newLog(p, shape)
	l.SetGeneration(generation)
	return l, nil
}

// OpenLog reads the log in p and checks the header, every slab and block entry in use and every committed record. It
// returns an error that wraps mem.ErrCorrupt when anything does not hold together.
func OpenLog(p []byte) (*Log, error) {
	le := binary.LittleEndian
	if len(p) < headerBytes || string(p[:8]) != logMagic {
		return nil, fmt.Errorf("opening token log: no log here: %w", mem.ErrCorrupt)
	}
	if v := le.Uint32(p[offVersion:]); v != logVersion {
		return nil, fmt.Errorf("opening token log: version %d, this program knows %d: %w", v, logVersion, mem.ErrCorrupt)
	}
	if le.Uint32(p[offCRC:]) != mem.Checksum(p[:offCRC]) {
		return nil, fmt.Errorf("opening token log: header: %w", mem.ErrCorrupt)
	}
	shape := LogShape{
		Request:   string(bytes.TrimRight(p[offRequest:offRequest+maxRequestName], "\x00")),
		Choice:    int(le.Uint32(p[offChoice:])),
		Attempt:   int(le.Uint32(p[offAttempt:])),
		Prompt:    int(le.Uint32(p[offPrompt:])),
		MaxTokens: int(le.Uint32(p[offMaxTokens:])),
		MaxSlabs:  int(le.Uint32(p[offMaxSlabs:])),
		Top:       int(le.Uint32(p[offTop:])),
	}
	if err := shape.validate(); err != nil {
		return nil, fmt.Errorf("opening token log: %w: %w", mem.ErrCorrupt, err)
	}
	if int64(len(p)) < shape.Bytes() {
		return nil, fmt.Errorf("opening token log: %d bytes for a log of %d: %w", len(p), shape.Bytes(), mem.ErrCorrupt)
	}
	l := newLog(p, shape)
	if l.Committed() > shape.MaxTokens || l.SlabCount() > shape.MaxSlabs || l.BlockCount() > shape.maxBlocks() {
		return nil, fmt.Errorf("opening token log: counts over capacity: %w", mem.ErrCorrupt)
	}
	for i := range l.SlabCount() {
		if _, _, err := l.Slab(i); err != nil {
			return nil, fmt.Errorf("opening token log: %w", err)
		}
	}
	for i := range l.BlockCount() {
		b, err := l.Block(i)
		if err != nil {
			return nil, fmt.Errorf("opening token log: %w", err)
		}
		if b.Slab >= l.SlabCount() || b.Block >= SlabBlocks {
			return nil, fmt.Errorf("opening token log: block %d is in no slab: %w", i, mem.ErrCorrupt)
		}
	}
	for i := range l.Committed() {
		if _, err := l.Record(i); err != nil {
			return nil, fmt.Errorf("opening token log: %w", err)
		}
	}
	return l, nil
}

// Snapshot copies the log in p, whose writer may go on meanwhile: everything that the copy's counters count was there
// when they were read, and does not change.
func Snapshot(p []byte) []byte {
	if len(p) < headerBytes {
		return bytes.Clone(p) // OpenLog says what is wrong with it
	}
	// A record comes after the blocks that its position needs, a block after its slab.
	counters := [...]int{offGeneration, offCommitted, offBlocks, offSlabs}
	var counts [len(counters)]uint64
	live := Log{p: p}
	for i, off := range counters {
		counts[i] = live.word(off).Load()
	}
	c := Log{p: bytes.Clone(p)}
	for i, off := range counters {
		c.word(off).Store(counts[i])
	}
	return c.p
}

func newLog(p []byte, shape LogShape) *Log {
	l := &Log{p: p, shape: shape, slabs: headerBytes, recordBytes: shape.recordBytes()}
	l.blocks = l.slabs + shape.MaxSlabs*slabBytes
	l.records = l.blocks + shape.maxBlocks()*blockBytes
	return l
}

// Shape returns what the log was made with.
func (l *Log) Shape() LogShape { return l.shape }

// word is an 8-byte aligned counter of the header. Mapped memory starts on a page and the offsets are multiples of 8.
func (l *Log) word(off int) *atomic.Uint64 { return (*atomic.Uint64)(unsafe.Pointer(&l.p[off])) }

// Generation is the claim generation of the last writer.
func (l *Log) Generation() uint64 { return l.word(offGeneration).Load() }

// SetGeneration records a new writer.
func (l *Log) SetGeneration(g uint64) { l.word(offGeneration).Store(g) }

// Committed is the number of records that count.
func (l *Log) Committed() int { return int(min(l.word(offCommitted).Load(), math.MaxInt32)) }

// SlabCount and BlockCount are the entries in use.
func (l *Log) SlabCount() int { return int(min(l.word(offSlabs).Load(), math.MaxInt32)) }

// BlockCount is the number of block entries in use.
func (l *Log) BlockCount() int { return int(min(l.word(offBlocks).Load(), math.MaxInt32)) }

// errTakenOver is what a writer sees when a counter has moved under it: a log has one writer, so that must not happen.
func errTakenOver(what string, i int) error {
	return fmt.Errorf("committing %s %d, which another writer has committed: %w", what, i, mem.ErrFenced)
}

// Append writes record r and commits it. r.Index must be Committed(); the caller has checked its claim. mem.ErrFenced
// when another writer has committed that index meanwhile.
func (l *Log) Append(r Record) error {
	n := l.Committed()
	if r.Index >= 0 && r.Index < n {
		return errTakenOver("token", r.Index)
	}
	if r.Index != n || n >= l.shape.MaxTokens {
		return fmt.Errorf("appending token %d to a log of %d of %d: %w", r.Index, n, l.shape.MaxTokens, mem.ErrInvalid)
	}
	p := l.record(r.Index)
	le := binary.LittleEndian
	le.PutUint32(p, uint32(r.Index))
	le.PutUint32(p[4:], uint32(r.Token))
	le.PutUint32(p[8:], math.Float32bits(r.Logprob))
	le.PutUint32(p[12:], uint32(r.Covers))
	le.PutUint32(p[16:], r.KV)
	for i := range l.shape.Top {
		id, lp := int32(-1), float32(0)
		if i < len(r.TopIDs) {
			id, lp = r.TopIDs[i], r.Top[i]
		}
		le.PutUint32(p[20+8*i:], uint32(id))
		le.PutUint32(p[24+8*i:], math.Float32bits(lp))
	}
	le.PutUint32(p[l.recordBytes-4:], mem.Checksum(p[:l.recordBytes-4]))
	if !l.word(offCommitted).CompareAndSwap(uint64(r.Index), uint64(r.Index+1)) {
		return errTakenOver("token", r.Index)
	}
	return nil
}

func (l *Log) record(i int) []byte {
	at := l.records + i*l.recordBytes
	return l.p[at : at+l.recordBytes]
}

// Record reads committed record i, with an error that wraps mem.ErrCorrupt when its CRC or index is wrong.
func (l *Log) Record(i int) (Record, error) {
	p := l.record(i)
	le := binary.LittleEndian
	if le.Uint32(p[l.recordBytes-4:]) != mem.Checksum(p[:l.recordBytes-4]) || le.Uint32(p) != uint32(i) {
		return Record{}, fmt.Errorf("token record %d: %w", i, mem.ErrCorrupt)
	}
	r := Record{
		Index: i, Token: int32(le.Uint32(p[4:])), Logprob: math.Float32frombits(le.Uint32(p[8:])),
		Covers: int(le.Uint32(p[12:])), KV: le.Uint32(p[16:]),
	}
	for k := range l.shape.Top {
		id := int32(le.Uint32(p[20+8*k:]))
		if id < 0 {
			break
		}
		r.TopIDs = append(r.TopIDs, id)
		r.Top = append(r.Top, math.Float32frombits(le.Uint32(p[24+8*k:])))
	}
	return r, nil
}

// AddSlab appends a slab to the table and returns its number. own says that blocks of it which are not in the block
// table are this sequence's reserve; other slabs are there for shared blocks only. Node and Shape are not kept: slabs
// lie on the log's node, and their layout follows from the model. mem.ErrFenced as with Append.
func (l *Log) AddSlab(h mem.Handle, own bool) (int, error) {
	i := l.SlabCount()
	if i >= l.shape.MaxSlabs {
		return 0, fmt.Errorf("adding slab %d to a log of %d: %w", i, l.shape.MaxSlabs, mem.ErrInvalid)
	}
	if h.Kind != mem.KindKV || len(h.Capability) != 16 {
		return 0, fmt.Errorf("adding a %s object as slab %d: %w", h.Kind, i, mem.ErrInvalid)
	}
	p := l.p[l.slabs+i*slabBytes:][:slabBytes]
	le := binary.LittleEndian
	le.PutUint64(p, h.Object)
	le.PutUint64(p[8:], h.Generation)
	le.PutUint64(p[16:], uint64(h.Bytes))
	le.PutUint16(p[24:], uint16(h.NPU))
	copy(p[32:48], h.Capability)
	if own {
		le.PutUint32(p[48:], flagOwn)
	}
	le.PutUint32(p[60:], mem.Checksum(p[:60]))
	if !l.word(offSlabs).CompareAndSwap(uint64(i), uint64(i+1)) {
		return 0, errTakenOver("slab", i)
	}
	return i, nil
}

// Slab reads entry i: the handle, without node, and whether the slab is the sequence's own (see AddSlab).
func (l *Log) Slab(i int) (h mem.Handle, own bool, err error) {
	p := l.p[l.slabs+i*slabBytes:][:slabBytes]
	le := binary.LittleEndian
	if le.Uint32(p[60:]) != mem.Checksum(p[:60]) {
		return mem.Handle{}, false, fmt.Errorf("slab entry %d: %w", i, mem.ErrCorrupt)
	}
	h = mem.Handle{
		Object: le.Uint64(p), Generation: le.Uint64(p[8:]), Kind: mem.KindKV, Bytes: int64(le.Uint64(p[16:])),
		NPU: int16(le.Uint16(p[24:])), Capability: bytes.Clone(p[32:48]),
	}
	return h, le.Uint32(p[48:])&flagOwn != 0, nil
}

// BlockRef says where one block of a sequence lies.
type BlockRef struct {
	Slab, Block int    // number of the slab in the log's table, block in the slab
	Sealed      bool   // full, never written again
	CRC         uint32 // of a sealed block's bytes
}

// AddBlock appends an open block to the table. mem.ErrFenced as with Append.
func (l *Log) AddBlock(slab, block int) error {
	i := l.BlockCount()
	if i >= l.shape.maxBlocks() {
		return fmt.Errorf("adding block %d to a log of %d: %w", i, l.shape.maxBlocks(), mem.ErrInvalid)
	}
	l.putBlock(i, BlockRef{Slab: slab, Block: block})
	if !l.word(offBlocks).CompareAndSwap(uint64(i), uint64(i+1)) {
		return errTakenOver("block", i)
	}
	return nil
}

// SealBlock records that block i is full and its CRC-32C. The entry's own checksum is written last: see Block.
func (l *Log) SealBlock(i int, crc uint32) {
	b, _ := l.Block(i) // OpenLog has checked the entry, or this process wrote it
	b.Sealed, b.CRC = true, crc
	l.putBlock(i, b)
}

func (l *Log) putBlock(i int, b BlockRef) {
	p := l.p[l.blocks+i*blockBytes:][:blockBytes]
	le := binary.LittleEndian
	le.PutUint32(p, uint32(b.Slab))
	le.PutUint16(p[4:], uint16(b.Block))
	var flags uint16
	if b.Sealed {
		flags = flagSealed
	}
	le.PutUint16(p[6:], flags)
	le.PutUint32(p[8:], b.CRC)
	le.PutUint32(p[12:], mem.Checksum(p[:12]))
}

// Block reads entry i, with an error that wraps mem.ErrCorrupt when its CRC is wrong.
func (l *Log) Block(i int) (BlockRef, error) {
	p := l.p[l.blocks+i*blockBytes:][:blockBytes]
	le := binary.LittleEndian
	ref := BlockRef{
		Slab: int(le.Uint32(p)), Block: int(le.Uint16(p[4:])), CRC: le.Uint32(p[8:]),
		Sealed: le.Uint16(p[6:])&flagSealed != 0,
	}
	if crc := le.Uint32(p[12:]); crc != mem.Checksum(p[:12]) {
		// A writer that was stopped in the middle of SealBlock has left the checksum of the open block.
		var open [12]byte
		copy(open[:6], p)
		if crc != mem.Checksum(open[:]) {
			return ref, fmt.Errorf("block entry %d: %w", i, mem.ErrCorrupt)
		}
		ref.Sealed, ref.CRC = false, 0
	}
	return ref, nil
}
