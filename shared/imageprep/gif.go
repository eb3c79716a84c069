package imageprep

import (
	"fmt"
	"image"
)

// onScreen puts the first frame of a GIF on its logical screen as Pillow does: where the frame leaves the screen bare it
// has the frame's transparent colour, else the first of the palette.
func onScreen(img image.Image, data []byte, h header) rows {
	frame, ok := img.(*image.Paletted)
	if !ok {
		panic(fmt.Sprintf("BUG: a GIF decoded to %T", img))
	}
	palette, bare := gifPalette(data)
	b := frame.Rect.Intersect(image.Rect(0, 0, h.Width, h.Height))
	return rows{width: h.Width, height: h.Height, read: func(y int, row []uint8) {
		for i := 0; i < len(row); i += 3 {
			copy(row[i:i+3], palette[bare][:])
		}
		if y >= b.Min.Y && y < b.Max.Y {
			paint(row[3*b.Min.X:], frame.Pix[frame.PixOffset(b.Min.X, y):][:b.Dx()], &palette)
		}
	}}
}

// gifPalette returns the colours of a GIF's first frame and the index of its transparent one, 0 if it has none.
// image/gif, which has found the file well formed this far, forgets the colour of the transparent index.
func gifPalette(data []byte) (palette [256][3]uint8, transparent uint8) {
	const (
		screen     = 13 // header and logical screen descriptor
		extension  = 0x21
		control    = 0xF9 // graphic control extension
		descriptor = 0x2C // image descriptor
	)
	// table reads a colour table if flags announce one, and returns what follows it.
	table := func(flags byte, rest []byte) []byte {
		if flags&0x80 == 0 {
			return rest
		}
		n := min(3<<(1+flags&7), len(rest))
		for i := 0; i+3 <= n; i += 3 {
			copy(palette[i/3][:], rest[i:])
		}
		return rest[n:]
	}
	if len(data) < screen {
		return palette, 0
	}
	for rest := table(data[10], data[screen:]); len(rest) >= 2; {
		if rest[0] == descriptor {
			if len(rest) >= 10 {
				table(rest[9], rest[10:])
			}
			break
		}
		if rest[0] != extension {
			break
		}
		if rest[1] == control && len(rest) >= 7 && rest[3]&1 != 0 {
			transparent = rest[6]
		}
		for rest = rest[2:]; len(rest) > 0 && rest[0] != 0; { // sub-blocks end with an empty one
			rest = rest[min(1+int(rest[0]), len(rest)):]
		}
		rest = rest[min(1, len(rest)):]
	}
	return palette, transparent
}
