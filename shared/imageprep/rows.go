package imageprep

// rgb is a picture of 8-bit samples, red, green, blue, in rows without gaps.
type rgb struct {
	width, height int
	pix           []uint8 // [height, width, 3]
}

func newRGB(width, height int) *rgb {
	return &rgb{width: width, height: height, pix: make([]uint8, 3*width*height)}
}

// rows is a picture whose rows are converted to 8-bit red, green, blue when they are read, so that no second copy of a
// large picture is made.
type rows struct {
	width, height int
	read          func(y int, row []uint8) // writes row y, [width, 3]; rows may be read in any order, one at a time
}

// whole returns all rows.
func (p rows) whole() *rgb {
	out := newRGB(p.width, p.height)
	for y := range p.height {
		p.read(y, out.pix[3*p.width*y:3*p.width*(y+1)])
	}
	return out
}

// turn returns p as EXIF orientation o (1 to 8) shows it. An orientation that swaps the sides costs a copy of p.
func (p rows) turn(o int) rows {
	switch {
	case o <= 1 || o > 8:
		return p
	case o >= 5:
		return p.whole().transposed(o == 7 || o == 8, o == 6 || o == 7)
	}
	out := p
	out.read = func(y int, row []uint8) {
		if o >= 3 {
			y = p.height - 1 - y
		}
		p.read(y, row)
		if o <= 3 {
			mirror(row)
		}
	}
	return out
}

// mirror turns the order of a row's pixels.
func mirror(row []uint8) {
	for i, j := 0, len(row)-3; i < j; i, j = i+3, j-3 {
		left := [3]uint8(row[i:])
		copy(row[i:i+3], row[j:])
		copy(row[j:j+3], left[:])
	}
}

// transposed returns p with columns as rows, from the last column on if back, each read from below if up.
func (p *rgb) transposed(back, up bool) rows {
	return rows{width: p.height, height: p.width, read: func(y int, row []uint8) {
		if back {
			y = p.width - 1 - y
		}
		at, step := 3*y, 3*p.width
		if up {
			at, step = at+(p.height-1)*step, -step
		}
		for x := range p.height {
			copy(row[3*x:3*x+3], p.pix[at+x*step:])
		}
	}}
}
