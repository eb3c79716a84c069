package imageprep

import (
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// rows reads p as if it were a decoded picture.
func (p *rgb) rows() rows {
	return rows{p.width, p.height, func(y int, row []uint8) { copy(row, p.pix[3*p.width*y:]) }}
}

// TestResizeConstant: a picture of one colour keeps it at any size.
func TestResizeConstant(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		side := rapid.IntRange(1, 90)
		p := newRGB(side.Draw(t, "width"), side.Draw(t, "height"))
		want := [3]uint8{rapid.Uint8().Draw(t, "red"), rapid.Uint8().Draw(t, "green"), rapid.Uint8().Draw(t, "blue")}
		for i := range p.pix {
			p.pix[i] = want[i%3]
		}
		out := p.rows().resize(side.Draw(t, "new width"), side.Draw(t, "new height"))
		for i, v := range out.pix {
			if v != want[i%3] {
				t.Fatalf("sample %d is %d, want %d", i, v, want[i%3])
			}
		}
	})
}

// slow resizes by the definition, in floating point, with rounding between the passes.
func slow(p *rgb, width, height int) *rgb {
	row := func(in []uint8, out int) []uint8 {
		scale := float64(len(in)) / float64(out)
		stretch := max(scale, 1)
		result := make([]uint8, out)
		for i := range result {
			center := (float64(i)+0.5)*scale - 0.5
			sum, weights := 0.0, 0.0
			for x, v := range in {
				d := math.Abs(float64(x)-center) / stretch
				w := 0.0
				if d < 1 {
					w = 1.5*d*d*d - 2.5*d*d + 1
				} else if d < 2 {
					w = -0.5*d*d*d + 2.5*d*d - 4*d + 2
				}
				sum += w * float64(v)
				weights += w
			}
			result[i] = uint8(max(0, min(math.Round(sum/weights), 255)))
		}
		return result
	}
	wide := newRGB(width, p.height)
	for y := range p.height {
		for c := range 3 {
			in := make([]uint8, p.width)
			for x := range in {
				in[x] = p.pix[3*(y*p.width+x)+c]
			}
			for x, v := range row(in, width) {
				wide.pix[3*(y*width+x)+c] = v
			}
		}
	}
	out := newRGB(width, height)
	for x := range width {
		for c := range 3 {
			in := make([]uint8, p.height)
			for y := range in {
				in[y] = wide.pix[3*(y*width+x)+c]
			}
			for y, v := range row(in, height) {
				out.pix[3*(y*width+x)+c] = v
			}
		}
	}
	return out
}

// TestResizeAgainstDefinition: fixed point costs at most one grey level a pass.
func TestResizeAgainstDefinition(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		side := rapid.IntRange(1, 24)
		p := newRGB(side.Draw(t, "width"), side.Draw(t, "height"))
		seed := rapid.Uint32().Draw(t, "seed")
		for i := range p.pix {
			seed = seed*1664525 + 1013904223
			p.pix[i] = uint8(seed >> 24)
		}
		width, height := side.Draw(t, "new width"), side.Draw(t, "new height")
		got, want := p.rows().resize(width, height), slow(p, width, height)
		for i := range got.pix {
			if d := int(got.pix[i]) - int(want.pix[i]); d < -2 || d > 2 {
				t.Fatalf("sample %d is %d, want about %d", i, got.pix[i], want.pix[i])
			}
		}
	})
}

func TestResizeToTheSame(t *testing.T) {
	p := newRGB(5, 4)
	for i := range p.pix {
		p.pix[i] = uint8(i * 31)
	}
	if got := p.rows().resize(5, 4); !slices.Equal(got.pix, p.pix) {
		t.Errorf("%v became %v", p.pix, got.pix)
	}
}

// TestPatchOrder numbers the pixels of a small picture and looks for them.
func TestPatchOrder(t *testing.T) {
	c := Config{PatchSize: 2, TemporalPatchSize: 2, MergeSize: 2, Std: [3]float32{1. / 255, 1. / 255, 1. / 255}}
	p := newRGB(8, 4)
	for i := range 8 * 4 {
		copy(p.pix[3*i:], []uint8{uint8(i), uint8(100 + i), uint8(200 + i)})
	}
	grid := Grid{1, 2, 4}
	out := make([]float32, grid.Patches()*c.PatchDim())
	c.cut(p, grid, out)
	// The patches' first pixels, in merge-block order.
	for i, want := range []float32{0, 2, 16, 18, 4, 6, 20, 22} {
		patch := out[i*c.PatchDim():][:c.PatchDim()]
		frame := []float32{want, want + 1, want + 8, want + 9}
		var all []float32
		for channel := range 3 {
			for range 2 { // frames
				for _, v := range frame {
					all = append(all, v+100*float32(channel))
				}
			}
		}
		for j := range patch {
			patch[j] = float32(math.Round(float64(patch[j]))) // (v - 0) / 1, but for rounding
		}
		if !slices.Equal(patch, all) {
			t.Errorf("patch %d: %v, want %v", i, patch, all)
		}
	}
}
