package protocol

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/vmihailenco/msgpack/v5"

	"trireme.dev/shared/mem"
	"trireme.dev/shared/wellformed"
)

// MaxFrame is the most bytes of a frame without its length.
const MaxFrame = 1 << 20

// maxElements bounds arrays and maps in a frame: what one call may name.
const maxElements = 4096

// ErrFrame is returned by ReadFrame and the Parse functions for bytes that are no frame of this protocol. What follows on
// the socket cannot be understood: the connection is over.
var ErrFrame = errors.New("malformed frame")

// Request encodes a request as a frame with its length in front.
func Request(id uint64, op Op, body any) ([]byte, error) {
	return frame(func(e *msgpack.Encoder) error {
		if err := errors.Join(e.EncodeArrayLen(3), e.EncodeUint(id), e.EncodeUint(uint64(op))); err != nil {
			return err
		}
		return e.Encode(body)
	})
}

// Reply encodes the answer to request id as a frame with its length in front; body counts only when failure is nil.
func Reply(id uint64, failure error, body any) ([]byte, error) {
	code, text := encodeError(failure)
	if failure != nil {
		body = nil
	}
	return frame(func(e *msgpack.Encoder) error {
		if err := errors.Join(e.EncodeArrayLen(4), e.EncodeUint(id), e.EncodeUint(uint64(code)), e.EncodeString(text)); err != nil {
			return err
		}
		return e.Encode(body)
	})
}

func frame(write func(*msgpack.Encoder) error) ([]byte, error) {
	var buf bytes.Buffer
	buf.Write(make([]byte, 4))
	e := msgpack.GetEncoder()
	defer msgpack.PutEncoder(e)
	e.Reset(&buf)
	e.UseArrayEncodedStructs(true)
	e.UseCompactInts(true)
	if err := write(e); err != nil {
		return nil, fmt.Errorf("encoding a frame: %w", err)
	}
	n := buf.Len() - 4
	if n > MaxFrame {
		return nil, fmt.Errorf("encoding a frame of %d bytes, more than %d: %w", n, MaxFrame, mem.ErrInvalid)
	}
	binary.BigEndian.PutUint32(buf.Bytes(), uint32(n))
	return buf.Bytes(), nil
}

// ReadFrame reads the next frame without its length: io.EOF at the end between two frames, ErrFrame when it is too long,
// without reading it.
func ReadFrame(r io.Reader) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > MaxFrame {
		return nil, fmt.Errorf("%d bytes, more than %d: %w", n, MaxFrame, ErrFrame)
	}
	p := make([]byte, n)
	if _, err := io.ReadFull(r, p); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return p, nil
}

// ParseRequest takes a frame of Request apart; body is for Decode and aliases p.
func ParseRequest(p []byte) (id uint64, op Op, body []byte, err error) {
	r, d, err := open(p, 3)
	if err != nil {
		return 0, 0, nil, err
	}
	defer msgpack.PutDecoder(d)
	id, err = d.DecodeUint64()
	if err != nil {
		return 0, 0, nil, fmt.Errorf("request id: %w: %w", ErrFrame, err)
	}
	code, err := d.DecodeUint8()
	if err != nil {
		return id, 0, nil, fmt.Errorf("request's op: %w: %w", ErrFrame, err)
	}
	return id, Op(code), p[len(p)-r.Len():], nil
}

// ParseReply takes a frame of Reply apart; body is for Decode and aliases p, failure is the error that Reply was given,
// with its sentinel and text. err is ErrFrame.
func ParseReply(p []byte) (id uint64, body []byte, failure, err error) {
	r, d, err := open(p, 4)
	if err != nil {
		return 0, nil, nil, err
	}
	defer msgpack.PutDecoder(d)
	id, err = d.DecodeUint64()
	if err != nil {
		return 0, nil, nil, fmt.Errorf("reply id: %w: %w", ErrFrame, err)
	}
	code, err := d.DecodeUint8()
	if err != nil {
		return 0, nil, nil, fmt.Errorf("reply's code: %w: %w", ErrFrame, err)
	}
	text, err := d.DecodeString()
	if err != nil {
		return 0, nil, nil, fmt.Errorf("reply's text: %w: %w", ErrFrame, err)
	}
	return id, p[len(p)-r.Len():], decodeError(Code(code), text), nil
}

// open checks the whole frame and starts to decode its array of n parts. The caller gives the decoder back.
func open(p []byte, n int) (*bytes.Reader, *msgpack.Decoder, error) {
	if err := wellformed.Msgpack(p, maxElements); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrFrame, err)
	}
	r := bytes.NewReader(p)
	d := msgpack.GetDecoder()
	d.Reset(r)
	got, err := d.DecodeArrayLen()
	if err == nil && got == n {
		return r, d, nil
	}
	msgpack.PutDecoder(d)
	if err != nil {
		return nil, nil, fmt.Errorf("frame's head: %w: %w", ErrFrame, err)
	}
	return nil, nil, fmt.Errorf("frame of %d parts, want %d: %w", got, n, ErrFrame)
}

// Decode decodes a body, as the Parse functions return it, into v, a pointer: ErrInvalid when it is another message.
func Decode(body []byte, v any) error {
	if err := msgpack.Unmarshal(body, v); err != nil {
		return fmt.Errorf("decoding %T: %w: %w", v, mem.ErrInvalid, err)
	}
	return nil
}
