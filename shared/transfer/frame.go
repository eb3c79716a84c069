package transfer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"

	"trireme.dev/shared/mem"
)

// Version is the version of the protocol. Both sides refuse another one.
const Version = 1

// ErrFrame is wrapped by errors about bytes that are no frame of this protocol: the connection is over.
var ErrFrame = errors.New("malformed transfer frame")

// kind says what a frame is.
type kind uint8

const (
	kindHello   kind = iota + 1 // both ways, first
	kindRequest                 // to the server: a span of an object is wanted
	kindData                    // from the server: the next bytes of the span
	kindFailure                 // from the server: the span, or the rest of it, does not come
)

const (
	headBytes = 24
	magic     = 0x54525846 // "TRXF"

	maxText   = 1024     // bytes of a failure's text
	maxHandle = 1024     // bytes of an encoded handle
	maxData   = 16 << 20 // bytes of one data frame
	maxSpan   = 64 << 20 // bytes of one request
)

// head is what every frame starts with. The fields mean, by kind:
//
//	hello    bytes magic, offset version
//	request  bytes and offset of the span, size of the handle that follows, crc of that
//	data     bytes that follow, their offset in the object and crc
//	failure  code, size of the text that follows, crc of that
type head struct {
	kind   kind
	code   code
	size   uint16 // bytes of the handle or text that follows
	bytes  uint32
	offset uint64
	crc    uint32 // CRC-32C of what follows
}

// put encodes h; its last four bytes are the CRC-32C of the others, as a flipped bit there must not pass for an answer.
func (h head) put(p *[headBytes]byte) {
	p[0], p[1] = byte(h.kind), byte(h.code)
	binary.BigEndian.PutUint16(p[2:], h.size)
	binary.BigEndian.PutUint32(p[4:], h.bytes)
	binary.BigEndian.PutUint64(p[8:], h.offset)
	binary.BigEndian.PutUint32(p[16:], h.crc)
	binary.BigEndian.PutUint32(p[20:], mem.Checksum(p[:20]))
}

// parseHead decodes a head and checks what can be checked without knowing what was asked for.
func parseHead(p *[headBytes]byte) (head, error) {
	if want, got := binary.BigEndian.Uint32(p[20:]), mem.Checksum(p[:20]); want != got {
		return head{}, fmt.Errorf("head has checksum %08x, it says %08x: %w", got, want, ErrFrame)
	}
	h := head{
		kind: kind(p[0]), code: code(p[1]),
		size:   binary.BigEndian.Uint16(p[2:]),
		bytes:  binary.BigEndian.Uint32(p[4:]),
		offset: binary.BigEndian.Uint64(p[8:]),
		crc:    binary.BigEndian.Uint32(p[16:]),
	}
	fits := false
	switch h.kind {
	case kindHello:
		fits = h.code == 0 && h.size == 0 && h.bytes == magic && h.crc == 0
	case kindRequest:
		fits = h.code == 0 && h.size > 0 && h.size <= maxHandle && h.bytes > 0 && h.bytes <= maxSpan && h.offset <= math.MaxInt64-maxSpan
	case kindData:
		fits = h.code == 0 && h.size == 0 && h.bytes > 0 && h.bytes <= maxData && h.offset <= math.MaxInt64-maxSpan
	case kindFailure:
		fits = h.code != 0 && h.size <= maxText && h.bytes == 0 && h.offset == 0
	}
	if !fits {
		return head{}, fmt.Errorf("head %x: %w", p[:20], ErrFrame)
	}
	return h, nil
}

// readHead reads and parses the next head: io.EOF at the end between two frames.
func readHead(r io.Reader) (head, error) {
	var p [headBytes]byte
	if _, err := io.ReadFull(r, p[:]); err != nil {
		return head{}, err
	}
	return parseHead(&p)
}

// readTail reads the handle or text that follows a head and checks it.
func readTail(r io.Reader, h head) ([]byte, error) {
	p := make([]byte, h.size)
	if _, err := io.ReadFull(r, p); err != nil {
		return nil, noEOF(err)
	}
	if crc := mem.Checksum(p); crc != h.crc {
		return nil, fmt.Errorf("%d bytes have checksum %08x, the head says %08x: %w", len(p), crc, h.crc, ErrFrame)
	}
	return p, nil
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// withTail encodes a frame of a head and the bytes that follow it.
func withTail(h head, tail []byte) []byte {
	h.size, h.crc = uint16(len(tail)), mem.Checksum(tail)
	p := make([]byte, headBytes, headBytes+len(tail))
	h.put((*[headBytes]byte)(p))
	return append(p, tail...)
}

func helloFrame() []byte {
	var p [headBytes]byte
	head{kind: kindHello, bytes: magic, offset: Version}.put(&p)
	return p[:]
}

// requestFrame asks for a span of the object that handle, as appendHandle wrote it, names.
func requestFrame(handle []byte, s span) []byte {
	return withTail(head{kind: kindRequest, bytes: uint32(s.end - s.at), offset: uint64(s.at)}, handle)
}
