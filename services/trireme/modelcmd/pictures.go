package modelcmd

import (
	"fmt"
	"os"

	"trireme.dev/shared/engine"
	"trireme.dev/shared/imageprep"
)

// maxPixels bounds a picture of the reference.
const maxPixels = 1 << 28

// picture is a picture as the vision encoder takes it.
type picture struct {
	pixels  []float32 // [patches, PatchDim]
	grid    engine.Grid
	resized bool // its size was changed, so its pixel values went through interpolation
}

// pictureReader decodes pictures for one model.
type pictureReader struct{ config imageprep.Config }

// newPictureReader reads the image processor of a model folder.
func newPictureReader(dir string) (*pictureReader, error) {
	c, err := imageprep.LoadConfig(dir)
	if err != nil {
		return nil, err
	}
	return &pictureReader{c}, nil
}

// grid returns the patch grid of a picture from its header.
func (r *pictureReader) grid(path string) (engine.Grid, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return engine.Grid{}, err
	}
	g, _, err := r.measure(data)
	return g, err
}

// measure returns a picture's patch grid and whether the picture has to be resized to fit it.
func (r *pictureReader) measure(data []byte) (g engine.Grid, resized bool, err error) {
	h, err := imageprep.ReadHeader(data, maxPixels)
	if err != nil {
		return g, false, err
	}
	grid, err := r.config.Grid(h.Width, h.Height)
	if err != nil {
		return g, false, err
	}
	side := r.config.PatchSize
	return engine.Grid(grid), h.Width != grid.W*side || h.Height != grid.H*side, nil
}

// read decodes a picture.
func (r *pictureReader) read(path string) (picture, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return picture{}, err
	}
	grid, resized, err := r.measure(data)
	if err != nil {
		return picture{}, fmt.Errorf("%s: %w", path, err)
	}
	p := picture{pixels: make([]float32, grid.Patches()*r.config.PatchDim()), grid: grid, resized: resized}
	if _, err := r.config.Patches(data, p.pixels); err != nil {
		return picture{}, fmt.Errorf("%s: %w", path, err)
	}
	return p, nil
}
