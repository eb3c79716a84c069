package imageprep

import (
	"errors"
	"fmt"
	"math"
)

// ErrAspect is wrapped by [Config.Grid]'s error when one side of a picture is more than 200 times the other.
var ErrAspect = errors.New("the picture's sides differ too much")

// maxAspect is transformers' limit (smart_resize).
const maxAspect = 200

// Grid is how many patches a picture has along time, height and width. T is 1 for pictures; H and W are multiples of the
// merge size.
type Grid struct{ T, H, W int }

// Patches returns the number of patches.
func (g Grid) Patches() int { return g.T * g.H * g.W }

// Tokens returns the number of tokens that the patches become when blocks of merge × merge are merged.
func (g Grid) Tokens(merge int) int { return g.T * (g.H / merge) * (g.W / merge) }

// Grid returns the grid of a picture of width × height pixels. It wraps [ErrAspect], or [ErrNotImage] for a side that is
// not positive.
func (c Config) Grid(width, height int) (Grid, error) {
	w, h, err := c.resized(width, height)
	if err != nil {
		return Grid{}, err
	}
	return Grid{T: 1, H: h / c.PatchSize, W: w / c.PatchSize}, nil
}

// resized returns the size in pixels to which a picture is resized: both sides multiples of patch × merge, the area
// between MinPixels and MaxPixels, the aspect as near as can be. It is smart_resize of transformers
// (models/qwen2_vl/image_processing_qwen2_vl.py), which rounds halves to even as Python does.
func (c Config) resized(width, height int) (w, h int, err error) {
	if width < 1 || height < 1 {
		return 0, 0, fmt.Errorf("%w: %d x %d pixels", ErrNotImage, width, height)
	}
	if max(width, height) > maxAspect*min(width, height) {
		return 0, 0, fmt.Errorf("%w: %d x %d pixels, more than %d to 1", ErrAspect, width, height, maxAspect)
	}
	factor := float64(c.PatchSize * c.MergeSize)
	fw, fh := float64(width), float64(height)
	rw, rh := math.RoundToEven(fw/factor)*factor, math.RoundToEven(fh/factor)*factor
	switch {
	case rw*rh > float64(c.MaxPixels):
		beta := math.Sqrt(fh * fw / float64(c.MaxPixels))
		rw = max(factor, math.Floor(fw/beta/factor)*factor)
		rh = max(factor, math.Floor(fh/beta/factor)*factor)
	case rw*rh < float64(c.MinPixels):
		beta := math.Sqrt(float64(c.MinPixels) / (fh * fw))
		rw = math.Ceil(fw*beta/factor) * factor
		rh = math.Ceil(fh*beta/factor) * factor
	}
	return int(rw), int(rh), nil
}
