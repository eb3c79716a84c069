// Package wellformed checks msgpack bytes before they are decoded. The msgpack library allocates what an array's head
// promises before it reads the elements, so five bytes can ask for gigabytes; a walk that allocates nothing refuses
// them. It does not check that a message has the right fields: decoding does.
package wellformed

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// ErrMalformed is wrapped by the errors of Msgpack.
var ErrMalformed = errors.New("malformed msgpack")

const maxDepth = 8

// Msgpack reports with ErrMalformed bytes that are not exactly one msgpack value, or whose arrays or maps have more
// than maxElements elements. It allocates nothing but the error.
func Msgpack(p []byte, maxElements int) error {
	rest, err := skip(p, uint64(maxElements), maxDepth)
	if err != nil {
		return err
	}
	if len(rest) > 0 {
		return fmt.Errorf("%d bytes after the message: %w", len(rest), ErrMalformed)
	}
	return nil
}

// skip returns what follows the first msgpack value of p. Formats: github.com/msgpack/msgpack/blob/master/spec.md.
func skip(p []byte, most uint64, depth int) ([]byte, error) {
	if len(p) == 0 {
		return nil, fmt.Errorf("message is cut: %w", ErrMalformed)
	}
	c, p := p[0], p[1:]
	switch {
	case c <= 0x7f || c >= 0xe0 || c == 0xc0 || c == 0xc2 || c == 0xc3: // small integers, nil, false, true
		return p, nil
	case c <= 0x8f:
		return elements(p, 2*uint64(c&0x0f), most, depth)
	case c <= 0x9f:
		return elements(p, uint64(c&0x0f), most, depth)
	case c <= 0xbf:
		return after(p, uint64(c&0x1f))
	}
	switch c {
	case 0xc4, 0xd9: // bin 8, str 8
		return sized(p, 1)
	case 0xc5, 0xda:
		return sized(p, 2)
	case 0xc6, 0xdb:
		return sized(p, 4)
	case 0xcc, 0xd0: // integers and floats of 1, 2, 4 and 8 bytes
		return after(p, 1)
	case 0xcd, 0xd1:
		return after(p, 2)
	case 0xca, 0xce, 0xd2:
		return after(p, 4)
	case 0xcb, 0xcf, 0xd3:
		return after(p, 8)
	case 0xdc, 0xdd, 0xde, 0xdf: // array 16, 32, map 16, 32
		width := 2
		if c == 0xdd || c == 0xdf {
			width = 4
		}
		n, p, err := number(p, width)
		if err != nil {
			return nil, err
		}
		if c >= 0xde {
			n *= 2
		}
		return elements(p, n, most, depth)
	}
	return nil, fmt.Errorf("value of format %#x, which no message uses: %w", c, ErrMalformed)
}

func elements(p []byte, n, most uint64, depth int) ([]byte, error) {
	if n > most || n > uint64(len(p)) || depth == 0 {
		return nil, fmt.Errorf("array or map of %d elements at depth %d: %w", n, maxDepth-depth, ErrMalformed)
	}
	for range n {
		var err error
		if p, err = skip(p, most, depth-1); err != nil {
			return nil, err
		}
	}
	return p, nil
}

func sized(p []byte, width int) ([]byte, error) {
	n, p, err := number(p, width)
	if err != nil {
		return nil, err
	}
	return after(p, n)
}

func number(p []byte, width int) (uint64, []byte, error) {
	if len(p) < width {
		return 0, nil, fmt.Errorf("message is cut: %w", ErrMalformed)
	}
	var wide [8]byte
	copy(wide[8-width:], p[:width])
	return binary.BigEndian.Uint64(wide[:]), p[width:], nil
}

func after(p []byte, n uint64) ([]byte, error) {
	if uint64(len(p)) < n {
		return nil, fmt.Errorf("message is cut: %w", ErrMalformed)
	}
	return p[n:], nil
}
