package imageprep

import "image"

// Go's image/jpeg and x/image/webp leave chroma at its stored resolution and their colour conversion repeats samples.
// libjpeg and libwebp, which Pillow and so transformers use, interpolate ("fancy upsampling"); and a WebP's colours are
// in the studio range, which Go's conversion does not know. So both are done here by the C libraries' arithmetic.

// jpegRows converts as libjpeg does (jdsample.c, jdcolor.c of libjpeg-turbo): triangle filter for chroma at half
// resolution, JFIF colours in 16-bit fixed point.
func jpegRows(img *image.YCbCr, width, height int) func(y int, row []uint8) {
	cb, cr := make([]uint8, width+1), make([]uint8, width+1)
	return func(y int, row []uint8) {
		jpegChroma(cb, img, img.Cb, y, width, height)
		jpegChroma(cr, img, img.Cr, y, width, height)
		luma := img.Y[y*img.YStride:]
		for x := range width {
			yy, b, r := int32(luma[x]), int32(cb[x])-128, int32(cr[x])-128
			const round = 1 << 15
			row[3*x] = clamp(yy + (91881*r+round)>>16)            // 1.40200
			row[3*x+1] = clamp(yy + (-22554*b-46802*r+round)>>16) // 0.34414, 0.71414
			row[3*x+2] = clamp(yy + (116130*b+round)>>16)         // 1.77200
		}
	}
}

func clamp(v int32) uint8 { return uint8(max(0, min(v, 255))) }

// jpegChroma writes one full-resolution row of a chroma plane to out, which has room for width and one more.
func jpegChroma(out []uint8, img *image.YCbCr, plane []uint8, y, width, height int) {
	xRatio, yRatio := 1, 1
	switch img.SubsampleRatio {
	case image.YCbCrSubsampleRatio422:
		xRatio = 2
	case image.YCbCrSubsampleRatio420:
		xRatio, yRatio = 2, 2
	case image.YCbCrSubsampleRatio440:
		yRatio = 2
	case image.YCbCrSubsampleRatio411:
		xRatio = 4
	case image.YCbCrSubsampleRatio410:
		xRatio, yRatio = 4, 2
	}
	columns, rows := (width+xRatio-1)/xRatio, (height+yRatio-1)/yRatio
	near := plane[y/yRatio*img.CStride:][:columns]
	far := near
	if yRatio == 2 {
		far = plane[neighbour(y, rows)*img.CStride:][:columns]
	}
	switch {
	case xRatio == 1 && yRatio == 1:
		copy(out, near)
	case xRatio == 1:
		for x := range near {
			out[x] = uint8((3*int(near[x]) + int(far[x]) + 1 + y&1) >> 2)
		}
	case xRatio == 2 && columns > 2:
		triangle(out, near, far, yRatio == 2)
	default: // repeated, as libjpeg does where it has no filter
		for x := range width {
			out[x] = near[x/xRatio]
		}
	}
}

// neighbour returns the sample of n, at half resolution, that is second nearest to full-resolution sample i.
func neighbour(i, n int) int { return max(0, min(i/2+2*(i&1)-1, n-1)) }

// triangle fills out with two samples for each of near, each of them 3/4 of the nearer and 1/4 of the further sample in
// each direction that is interpolated. Rounding alternates so that it does not add up.
func triangle(out, near, far []uint8, both bool) {
	scale, down, up := 2, 1, 2
	if both {
		scale, down, up = 4, 8, 7
	}
	column := func(i int) int {
		if both {
			return 3*int(near[i]) + int(far[i])
		}
		return int(near[i])
	}
	left, this := column(0), column(0)
	for i := range near {
		right := this
		if i+1 < len(near) {
			right = column(i + 1)
		}
		out[2*i] = uint8((3*this + left + down) >> scale)
		out[2*i+1] = uint8((3*this + right + up) >> scale)
		left, this = this, right
	}
}

// webpRows converts as libwebp does (src/dsp/upsampling.c, yuv.h): bilinear chroma, studio-range BT.601 in fixed point.
func webpRows(img *image.YCbCr, width, height int) func(y int, row []uint8) {
	columns, halves := (width+1)/2, (height+1)/2
	return func(y int, row []uint8) {
		// Pairs of output rows lie between two chroma rows; the nearer one counts more.
		nearRow := y / 2
		farRow := neighbour(y, halves)
		nearB, farB := img.Cb[nearRow*img.CStride:][:columns], img.Cb[farRow*img.CStride:][:columns]
		nearR, farR := img.Cr[nearRow*img.CStride:][:columns], img.Cr[farRow*img.CStride:][:columns]
		luma := img.Y[y*img.YStride:]
		for x := range width {
			near := x / 2
			far := neighbour(x, columns)
			u := bilinear(nearB[near], nearB[far], farB[near], farB[far])
			v := bilinear(nearR[near], nearR[far], farR[near], farR[far])
			yy := 19077 * int32(luma[x]) >> 8
			row[3*x] = clip6(yy + 26149*v>>8 - 14234)
			row[3*x+1] = clip6(yy - 6419*u>>8 - 13320*v>>8 + 8708)
			row[3*x+2] = clip6(yy + 33050*u>>8 - 17685)
		}
	}
}

// bilinear returns the sample that is nearest to nn, a quarter of the way to its neighbours and to ff across.
func bilinear(nn, nf, fn, ff uint8) int32 {
	return (9*int32(nn) + 3*int32(nf) + 3*int32(fn) + int32(ff) + 8) >> 4
}

// clip6 rounds a sample with 6 fractional bits.
func clip6(v int32) uint8 { return clamp(v >> 6) }
