package imageprep

import "math"

// Resizing is that of torch for 8-bit pictures, which transformers' fast processors use: separable convolution with the
// bicubic kernel of a = -0.5, widened by the scale when shrinking (antialias), horizontally and then vertically, each
// pass rounded to 8 bits. It is Pillow's (src/libImaging/Resample.c) but for the coefficients, which have 16 bits instead
// of 22 after the point (ATen, UpSampleKernel.cpp, "_compute_index_ranges_int16_weights"): the results differ by one
// grey level in about one sample of 10,000.
const (
	coefficientBits = 16 // with the sign
	maxPrecision    = 22
	kernelSupport   = 2.0
)

// bicubic is the kernel (Keys 1981, with a = -0.5).
func bicubic(x float64) float64 {
	const a = -0.5
	x = math.Abs(x)
	switch {
	case x < 1:
		return ((a+2)*x-(a+3))*x*x + 1
	case x < 2:
		return (((x-5)*x+8)*x - 4) * a
	}
	return 0
}

// window says which input samples make an output sample.
type window struct {
	first   int
	weights []int32 // fixed point; they add up to about 1
}

// end is the index after the last input sample.
func (w *window) end() int { return w.first + len(w.weights) }

// pass is the resizing of one side.
type pass struct {
	windows   []window
	precision uint // bits after the point of the weights
}

// newPass returns the windows from in samples to out.
func newPass(in, out int) pass {
	scale := float64(in) / float64(out)
	stretch := max(scale, 1)
	support := kernelSupport * stretch
	p := pass{windows: make([]window, out)}
	exact := make([][]float64, out)
	largest := 0.0
	for i := range exact {
		center := (float64(i) + 0.5) * scale
		first := max(int(center-support+0.5), 0)
		last := min(int(center+support+0.5), in)
		weights := make([]float64, last-first)
		sum := 0.0
		for k := range weights {
			weights[k] = bicubic((float64(first+k) - center + 0.5) / stretch)
			sum += weights[k]
		}
		for k := range weights {
			weights[k] /= sum
			largest = max(largest, weights[k])
		}
		p.windows[i].first, exact[i] = first, weights
	}
	for p.precision < maxPrecision && int(0.5+largest*float64(int(2)<<p.precision)) < 1<<(coefficientBits-1) {
		p.precision++
	}
	one := float64(int(1) << p.precision)
	for i, weights := range exact {
		fixed := make([]int32, len(weights))
		for k, w := range weights {
			fixed[k] = int32(math.Copysign(0.5, w) + w*one) // half away from zero
		}
		p.windows[i].weights = fixed
	}
	return p
}

// clip8 rounds a fixed-point sample, a half already added, to 8 bits.
func clip8(v int32, precision uint) uint8 {
	v >>= precision
	if uint32(v) > 255 {
		if v < 0 {
			return 0
		}
		return 255
	}
	return uint8(v)
}

// resize returns p at another size. It holds no more of p than the rows that make one row of the result.
func (p rows) resize(width, height int) *rgb {
	out := newRGB(width, height)
	in := make([]uint8, 3*p.width)
	across := newPass(p.width, width)
	narrow := func(y int, to []uint8) { // writes row y of p, resized horizontally
		if width == p.width {
			p.read(y, to)
			return
		}
		p.read(y, in)
		across.row(in, to)
	}
	stride := 3 * width
	if height == p.height {
		for y := range height {
			narrow(y, out.pix[stride*y:][:stride])
		}
		return out
	}
	down := newPass(p.height, height)
	depth := 0
	for _, w := range down.windows {
		depth = max(depth, len(w.weights))
	}
	ring := make([]uint8, depth*stride) // row y of p is at y % depth
	kept := func(y int) []uint8 { return ring[y%depth*stride:][:stride] }
	sums := make([]int32, stride)
	next := 0 // row of out; windows begin and end in order
	for y := range p.height {
		narrow(y, kept(y))
		for ; next < height && down.windows[next].end() <= y+1; next++ {
			w := down.windows[next]
			for i := range sums {
				sums[i] = int32(1) << down.precision >> 1
			}
			for k, weight := range w.weights {
				for i, v := range kept(w.first + k)[:len(sums)] {
					sums[i] += weight * int32(v)
				}
			}
			to := out.pix[stride*next:][:len(sums)]
			for i, s := range sums {
				to[i] = clip8(s, down.precision)
			}
		}
	}
	return out
}

// row resizes one row of pixels.
func (p *pass) row(from, to []uint8) {
	half := int32(1) << p.precision >> 1
	for x := range p.windows {
		w := &p.windows[x]
		in := from[3*w.first : 3*w.end()]
		r, g, b := half, half, half
		for _, k := range w.weights {
			r += k * int32(in[0])
			g += k * int32(in[1])
			b += k * int32(in[2])
			in = in[3:]
		}
		to[3*x], to[3*x+1], to[3*x+2] = clip8(r, p.precision), clip8(g, p.precision), clip8(b, p.precision)
	}
}
