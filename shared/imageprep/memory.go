package imageprep

import (
	"bytes"
	"image/color"
)

// Memory returns a bound on the bytes that [Config.Patches] allocates for a picture, garbage included: what the standard
// decoders make of it, which is nearly all, and the resized picture. It does not decode. Errors are those of
// [Config.Patches].
func (c Config) Memory(data []byte) (int64, error) {
	h, err := readHeader(data, DecodeLimit)
	if err != nil {
		return 0, err
	}
	width, height, err := c.resized(h.Width, h.Height)
	if err != nil {
		return 0, err
	}
	const (
		block = 32      // decoders round sides up to whole blocks, which have at most so many pixels along each side
		fixed = 1 << 20 // windows of decompression, code tables
	)
	pixel := h.pixelBytes(data)
	if h.orientation >= 5 {
		pixel += 3 // rows.turn
	}
	n := int64(pixel) * int64(h.Width+block) * int64(h.Height+block)
	n += int64(len(data)) + fixed
	// The resized picture, the rows that one of its rows is made of, and the kernels' weights.
	n += 3 * int64(width) * int64(height)
	n += 7 * int64(width) * int64(2*kernelSupport*max(1, h.Height/height+1)+2)
	n += 256 * int64(h.Width+h.Height+width+height)
	return n, nil
}

// pixelBytes bounds what the decoders allocate for a pixel, as read from their sources (Go 1.26, golang.org/x/image
// 0.47): all copies that they make on the way.
func (h *header) pixelBytes(data []byte) int {
	switch h.Format {
	case "png":
		n := 4
		switch h.model {
		case color.GrayModel:
			n = 1
		case color.Gray16Model:
			n = 2
		case color.RGBA64Model, color.NRGBA64Model:
			n = 8
		default:
			if _, ok := h.model.(color.Palette); ok {
				n = 1
			}
		}
		if n <= 2 && bytes.Contains(data, []byte("tRNS")) { // a transparent grey: with colours and alpha
			n *= 4
		}
		const interlace = 28 // offset of the header chunk's last byte
		if len(data) > interlace && data[interlace] != 0 {
			n *= 2 // its passes are pictures first
		}
		return n
	case "jpeg":
		samples, n := 3, 3
		switch h.model {
		case color.GrayModel:
			samples, n = 1, 1
		case color.CMYKModel:
			samples, n = 4, 3+1+4
		case color.RGBAModel:
			n = 3 + 4
		}
		if !sequential(data) {
			n += 4 * samples // coefficients of 32 bits
		}
		return n
	case "gif":
		return 2 // as it is stored, and in the order of rows if it is interlaced
	case "webp":
		if bytes.HasPrefix(data[12:], []byte("VP8 ")) {
			return 2 // 4:2:0
		}
		return 12 // lossless, or lossy with alpha: its alpha is lossless too; transforms, and the palette undone
	}
	panic("BUG: no size of format " + h.Format)
}

// sequential tells that a JPEG file is baseline or extended sequential, not progressive.
func sequential(data []byte) bool {
	for marker := range jpegSegments(data) {
		switch marker {
		case 0xC0, 0xC1:
			return true
		case 0xC2:
			return false
		}
	}
	return false
}
