package transfer

import (
	"encoding/binary"
	"fmt"
	"math"

	"trireme.dev/shared/mem"
)

// Limits of a handle on the wire; real ones are far below.
const (
	maxNode       = 64
	maxCapability = 64
	maxShape      = 8
)

// appendHandle encodes h. ErrInvalid when it is beyond what any HMM issues.
func appendHandle(b []byte, h mem.Handle) ([]byte, error) {
	if len(h.Node) > maxNode || len(h.Capability) > maxCapability || len(h.Shape) > maxShape || h.Bytes < 0 {
		return nil, fmt.Errorf("handle with a node of %d, a capability of %d bytes, %d dimensions and %d bytes: %w",
			len(h.Node), len(h.Capability), len(h.Shape), h.Bytes, mem.ErrInvalid)
	}
	b = append(append(b, byte(len(h.Node))), h.Node...)
	b = binary.BigEndian.AppendUint64(b, h.Object)
	b = binary.BigEndian.AppendUint64(b, h.Generation)
	b = append(b, byte(h.Kind))
	b = binary.BigEndian.AppendUint16(b, uint16(h.NPU))
	b = binary.BigEndian.AppendUint64(b, uint64(h.Bytes))
	b = append(b, byte(len(h.Shape)))
	for _, d := range h.Shape {
		b = binary.BigEndian.AppendUint64(b, uint64(d))
	}
	sealed := byte(0)
	if h.Sealed {
		sealed = 1
	}
	b = binary.BigEndian.AppendUint32(append(b, sealed), h.CRC)
	return append(append(b, byte(len(h.Capability))), h.Capability...), nil
}

// parseHandle decodes exactly one handle. The result does not alias p.
func parseHandle(p []byte) (mem.Handle, error) {
	r := reader{p: p}
	h := mem.Handle{
		Node:       string(r.take(int(r.number(1)))),
		Object:     r.number(8),
		Generation: r.number(8),
		Kind:       mem.Kind(r.number(1)),
		NPU:        int16(r.number(2)),
		Bytes:      int64(r.number(8)),
	}
	dims := int(r.number(1))
	for range min(dims, maxShape) {
		h.Shape = append(h.Shape, int(r.number(8)))
	}
	sealed := r.number(1)
	h.Sealed, h.CRC = sealed == 1, uint32(r.number(4))
	if c := r.take(int(r.number(1))); len(c) > 0 {
		h.Capability = append([]byte(nil), c...)
	}
	if r.cut || len(r.p) > 0 || sealed > 1 || dims > maxShape || len(h.Node) > maxNode || len(h.Capability) > maxCapability ||
		h.Bytes < 0 || h.Bytes > math.MaxInt64-maxSpan {
		return mem.Handle{}, fmt.Errorf("%d bytes are no handle: %w", len(p), ErrFrame)
	}
	return h, nil
}

// reader takes numbers and bytes off p, and notes when p was too short.
type reader struct {
	p   []byte
	cut bool
}

func (r *reader) take(n int) []byte {
	if n > len(r.p) {
		r.cut = true
		n = len(r.p)
	}
	t := r.p[:n]
	r.p = r.p[n:]
	return t
}

func (r *reader) number(width int) uint64 {
	var wide [8]byte
	copy(wide[8-width:], r.take(width))
	return binary.BigEndian.Uint64(wide[:])
}
