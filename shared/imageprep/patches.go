package imageprep

import "fmt"

// Patches decodes a picture and writes its patches to out, which the caller owns and which must have exactly
// [Config.PatchDim] values for each patch of the picture's grid (see [ReadHeader] and [Config.Grid]).
//
// out is [patches, channel, temporal, patch, patch]: each patch's pixels, normalised, its only frame repeated. Patches
// stand block by block, [H/merge, W/merge, merge, merge], so that those which become one token are neighbours.
//
// Errors wrap [ErrNotImage], [ErrTooLarge], [ErrAspect] or [ErrDecode]; another error means that out has the wrong length.
func (c Config) Patches(data []byte, out []float32) (Grid, error) {
	h, err := readHeader(data, DecodeLimit)
	if err != nil {
		return Grid{}, err
	}
	width, height, err := c.resized(h.Width, h.Height)
	if err != nil {
		return Grid{}, err
	}
	grid := Grid{T: 1, H: height / c.PatchSize, W: width / c.PatchSize}
	if want := grid.Patches() * c.PatchDim(); len(out) != want {
		return Grid{}, fmt.Errorf("a picture of %d patches needs %d values, the buffer has %d", grid.Patches(), want, len(out))
	}
	p, err := decode(data, h)
	if err != nil {
		return Grid{}, err
	}
	c.cut(p.resize(width, height), grid, out)
	return grid, nil
}

// cut normalises a resized picture and writes its patches.
func (c Config) cut(p *rgb, grid Grid, out []float32) {
	var values [3][256]float32
	for i := range 3 {
		// transformers folds the division by 255 into mean and deviation.
		mean, std := c.Mean[i]*255, c.Std[i]*255
		for v := range values[i] {
			values[i][v] = (float32(v) - mean) / std
		}
	}
	side, frame := c.PatchSize, c.PatchSize*c.PatchSize
	patch := func(y, x int) {
		for channel := range 3 {
			to := out[:frame]
			for i := range side {
				from := p.pix[3*((y*side+i)*p.width+x*side)+channel:]
				for j := range side {
					to[i*side+j] = values[channel][from[3*j]]
				}
			}
			for t := 1; t < c.TemporalPatchSize; t++ {
				copy(out[t*frame:], to)
			}
			out = out[c.TemporalPatchSize*frame:]
		}
	}
	for blockY := 0; blockY < grid.H; blockY += c.MergeSize {
		for blockX := 0; blockX < grid.W; blockX += c.MergeSize {
			for y := blockY; y < blockY+c.MergeSize; y++ {
				for x := blockX; x < blockX+c.MergeSize; x++ {
					patch(y, x)
				}
			}
		}
	}
}
