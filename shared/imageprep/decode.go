package imageprep

import (
	"bytes"
	"fmt"
	"image"
	"image/color"
	"image/gif"
	"image/jpeg"
	"image/png"

	"golang.org/x/image/webp"
)

// decode decodes the whole picture. Its rows come turned upright. Errors wrap [ErrDecode].
func decode(data []byte, h header) (rows, error) {
	var (
		img image.Image
		err error
		p   rows
	)
	switch h.Format {
	case "png":
		img, err = png.Decode(bytes.NewReader(data))
	case "jpeg":
		img, err = jpeg.Decode(bytes.NewReader(data))
	case "webp":
		img, err = webp.Decode(bytes.NewReader(data))
	case "gif":
		img, err = gif.Decode(bytes.NewReader(data)) // the first frame
	default:
		panic("BUG: no decoder for format " + h.Format)
	}
	if err != nil {
		return rows{}, fmt.Errorf("%w: %w", ErrDecode, err)
	}
	if h.Format == "gif" {
		p = onScreen(img, data, h)
	} else {
		p = toRGB(img, h.Format == "webp")
	}
	p = p.turn(h.orientation)
	if p.width != h.Width || p.height != h.Height {
		return rows{}, fmt.Errorf("%w: the header says %d x %d pixels, the data %d x %d", ErrDecode, h.Width, h.Height, p.width, p.height)
	}
	return p, nil
}

// toRGB returns a picture's colours as Pillow's convert("RGB") does: alpha is dropped, not composited; of 16 bits the
// high 8 are kept (Pillow clips 16-bit grey instead, which leaves it white).
func toRGB(img image.Image, webp bool) rows {
	b := img.Bounds()
	out := rows{width: b.Dx(), height: b.Dy()}
	// packed reads pixels of size bytes each, the colours at the offsets r, g and b.
	packed := func(pix []uint8, stride, size, r, g, b int) func(int, []uint8) {
		return func(y int, row []uint8) { spread(row, pix[y*stride:], size, r, g, b) }
	}
	switch img := img.(type) {
	case *image.YCbCr:
		if webp {
			out.read = webpRows(img, out.width, out.height)
		} else {
			out.read = jpegRows(img, out.width, out.height)
		}
	case *image.NYCbCrA:
		out.read = webpRows(&img.YCbCr, out.width, out.height)
	case *image.Gray:
		out.read = packed(img.Pix, img.Stride, 1, 0, 0, 0)
	case *image.Gray16:
		out.read = packed(img.Pix, img.Stride, 2, 0, 0, 0)
	case *image.RGBA: // PNG without alpha
		out.read = packed(img.Pix, img.Stride, 4, 0, 1, 2)
	case *image.NRGBA:
		out.read = packed(img.Pix, img.Stride, 4, 0, 1, 2)
	case *image.RGBA64: // PNG of 16 bits without alpha
		out.read = packed(img.Pix, img.Stride, 8, 0, 2, 4)
	case *image.NRGBA64:
		out.read = packed(img.Pix, img.Stride, 8, 0, 2, 4)
	case *image.Paletted:
		palette := colours(img.Palette)
		out.read = func(y int, row []uint8) { paint(row, img.Pix[y*img.Stride:][:out.width], &palette) }
	case *image.CMYK:
		out.read = func(y int, row []uint8) {
			from := img.Pix[y*img.Stride:]
			for x := range out.width {
				c := from[4*x : 4*x+4]
				for i := range 3 {
					row[3*x+i] = inkless(c[i], c[3])
				}
			}
		}
	default:
		panic(fmt.Sprintf("BUG: no conversion of %T", img))
	}
	return out
}

// spread copies one row of pixels of size bytes each, the colours at the offsets r, g and b.
func spread(to, from []uint8, size, r, g, b int) {
	for i := 0; i < len(to); i += 3 {
		to[i], to[i+1], to[i+2] = from[r], from[g], from[b]
		from = from[min(size, len(from)):]
	}
}

// inkless returns one colour of CMYK as RGB, as Pillow does: what is left of white after the ink and the black.
func inkless(ink, black uint8) uint8 {
	t := int(ink)*int(255-black) + 128
	return uint8(max(0, int(255-black)-(t>>8+t)>>8))
}

// colours returns a PNG's palette without alpha. Indices beyond the palette are black.
func colours(palette color.Palette) (out [256][3]uint8) {
	for i, c := range palette[:min(len(palette), 256)] {
		n := color.NRGBAModel.Convert(c).(color.NRGBA) // as it is for what image/png has in palettes
		out[i] = [3]uint8{n.R, n.G, n.B}
	}
	return out
}

// paint fills one row from a palette.
func paint(to, indices []uint8, palette *[256][3]uint8) {
	for x, i := range indices {
		copy(to[3*x:3*x+3], palette[i][:])
	}
}
