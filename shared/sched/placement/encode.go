package placement

import (
	"errors"
	"fmt"
)

// ErrEncoded is returned by Decode for bytes that are no layout of that shape.
var ErrEncoded = errors.New("not an encoded placement of experts")

// last marks the last copy of an expert. NPUs are below MaxNPUs.
const last = 0x80

// Encode is the layout as bytes: for each expert of each layer the NPUs that have a copy, a byte each, the last one marked. Every
// expert must be somewhere, or all nowhere: that layout, of an instance without NPUs, is no bytes. 58 layers of 256 experts without second copies take 15 KB.
func (p Layout) Encode() []byte {
	if p.Check(0) == nil {
		return nil
	}
	var data []byte
	for l, layer := range p {
		for e, s := range layer {
			if s == 0 {
				panic(fmt.Sprintf("BUG: expert %d of layer %d is nowhere", e, l))
			}
			for n := range s.All() {
				data = append(data, byte(n))
			}
			data[len(data)-1] |= last
		}
	}
	return data
}

// Decode is the layout that Encode has made, of layers with so many experts each.
func Decode(data []byte, experts []int) (Layout, error) {
	p := make(Layout, len(experts))
	for l, count := range experts {
		p[l] = make([]Set, count)
		for e := range p[l] {
			for more := true; more; {
				if len(data) == 0 {
					return nil, fmt.Errorf("%w: it ends at expert %d of layer %d", ErrEncoded, e, l)
				}
				n := int(data[0] &^ last)
				more = data[0]&last == 0
				data = data[1:]
				if n >= MaxNPUs || p[l][e].Has(n) {
					return nil, fmt.Errorf("%w: expert %d of layer %d is on NPU %d", ErrEncoded, e, l, n)
				}
				p[l][e] = p[l][e].With(n)
			}
		}
	}
	if len(data) > 0 {
		return nil, fmt.Errorf("%w: %d bytes too many", ErrEncoded, len(data))
	}
	return p, nil
}
