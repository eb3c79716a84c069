// Package imageprep turns encoded pictures into the patches that Qwen2-VL, Qwen2.5-VL and Qwen3-VL vision encoders take,
// as transformers' Qwen2VLImageProcessor does: decode, turn by EXIF orientation, drop alpha, resize so that whole merge
// blocks fit, normalise, cut into patches.
//
// It is not an image library, knows no video, and does not compute anything that the model learns.
package imageprep

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
)

var (
	// ErrConfig is wrapped by [LoadConfig]'s error when the file's values cannot be used.
	ErrConfig = errors.New("invalid preprocessor_config.json")

	// ErrUnsupported is wrapped by [LoadConfig]'s error when the folder asks for another kind of image processor.
	ErrUnsupported = errors.New("unsupported image processor")
)

// Config is a model's image processor.
type Config struct {
	MinPixels, MaxPixels int // bounds of a resized picture's area in pixels
	PatchSize            int // pixels along each side of a patch
	TemporalPatchSize    int // frames in a patch; a picture repeats its only one
	MergeSize            int // patches along each side of a block that becomes one token
	Mean, Std            [3]float32
}

// file is preprocessor_config.json in the forms that the hub has: Qwen2-VL's with min_pixels and max_pixels, at the top
// or in size, and Qwen3-VL's with size's shortest_edge and longest_edge, which are areas in spite of their names.
type file struct {
	ImageProcessorType string    `json:"image_processor_type"`
	MinPixels          *int      `json:"min_pixels"`
	MaxPixels          *int      `json:"max_pixels"`
	Size               *size     `json:"size"`
	PatchSize          *int      `json:"patch_size"`
	TemporalPatchSize  *int      `json:"temporal_patch_size"`
	MergeSize          *int      `json:"merge_size"`
	Mean               []float32 `json:"image_mean"`
	Std                []float32 `json:"image_std"`
	RescaleFactor      *float64  `json:"rescale_factor"`
	Resample           *int      `json:"resample"`
	DoResize           *bool     `json:"do_resize"`
	DoRescale          *bool     `json:"do_rescale"`
	DoNormalize        *bool     `json:"do_normalize"`
}

type size struct {
	ShortestEdge *int `json:"shortest_edge"`
	LongestEdge  *int `json:"longest_edge"`
	MinPixels    *int `json:"min_pixels"`
	MaxPixels    *int `json:"max_pixels"`
}

// LoadConfig reads the image processor of a Hugging Face model folder: preprocessor_config.json, or the image_processor
// of processor_config.json, where transformers 5 may keep it. What the file leaves out is as in transformers'
// Qwen2VLImageProcessor. Errors wrap [fs.ErrNotExist], [ErrConfig] or [ErrUnsupported].
func LoadConfig(dir string) (Config, error) {
	path := filepath.Join(dir, "preprocessor_config.json")
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		if nested, nestedPath, ok := nestedConfig(dir); ok {
			data, path, err = nested, nestedPath, nil
		}
	}
	if err != nil {
		return Config{}, fmt.Errorf("loading image processor: %w", err)
	}
	c, err := parseConfig(data)
	if err != nil {
		return Config{}, fmt.Errorf("loading image processor %s: %w", path, err)
	}
	return c, nil
}

// nestedConfig returns the image_processor of processor_config.json, if there is one.
func nestedConfig(dir string) (data []byte, path string, ok bool) {
	path = filepath.Join(dir, "processor_config.json")
	whole, err := os.ReadFile(path)
	if err != nil {
		return nil, "", false
	}
	var f struct {
		ImageProcessor json.RawMessage `json:"image_processor"`
	}
	if json.Unmarshal(whole, &f) != nil || len(f.ImageProcessor) == 0 {
		return nil, "", false
	}
	return f.ImageProcessor, path, true
}

// parseConfig reads the contents of preprocessor_config.json.
func parseConfig(data []byte) (Config, error) {
	var f file
	if err := json.Unmarshal(data, &f); err != nil {
		return Config{}, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	switch f.ImageProcessorType {
	case "", "Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2_5_VLImageProcessor",
		"Qwen3VLImageProcessor", "Qwen3VLImageProcessorFast":
	default:
		return Config{}, fmt.Errorf("%w: %s", ErrUnsupported, f.ImageProcessorType)
	}
	off := func(b *bool) bool { return b != nil && !*b }
	switch {
	case off(f.DoResize) || off(f.DoRescale) || off(f.DoNormalize):
		return Config{}, fmt.Errorf("%w: do_resize, do_rescale or do_normalize is off", ErrUnsupported)
	case f.RescaleFactor != nil && math.Abs(*f.RescaleFactor*255-1) > 1e-6:
		return Config{}, fmt.Errorf("%w: rescale_factor %g is not 1/255", ErrUnsupported, *f.RescaleFactor)
	case f.Resample != nil && *f.Resample != 3:
		return Config{}, fmt.Errorf("%w: resample %d is not bicubic", ErrUnsupported, *f.Resample)
	}
	if f.Size == nil {
		f.Size = &size{}
	}
	c := Config{
		MinPixels:         first(56*56, f.MinPixels, f.Size.ShortestEdge, f.Size.MinPixels),
		MaxPixels:         first(28*28*1280, f.MaxPixels, f.Size.LongestEdge, f.Size.MaxPixels),
		PatchSize:         first(14, f.PatchSize),
		TemporalPatchSize: first(2, f.TemporalPatchSize),
		MergeSize:         first(2, f.MergeSize),
		// OPENAI_CLIP_MEAN and OPENAI_CLIP_STD of transformers
		Mean: [3]float32{0.48145466, 0.4578275, 0.40821073},
		Std:  [3]float32{0.26862954, 0.26130258, 0.27577711},
	}
	for _, v := range []struct {
		from []float32
		to   *[3]float32
	}{{f.Mean, &c.Mean}, {f.Std, &c.Std}} {
		if v.from == nil {
			continue
		}
		if len(v.from) != 3 {
			return Config{}, fmt.Errorf("%w: image_mean or image_std has %d values, not 3", ErrConfig, len(v.from))
		}
		*v.to = [3]float32(v.from)
	}
	return c, c.validate()
}

// first returns the first value that is there.
func first(otherwise int, values ...*int) int {
	for _, v := range values {
		if v != nil {
			return *v
		}
	}
	return otherwise
}

// Bounds that no real processor comes near, so that arithmetic on sizes cannot overflow.
const (
	maxSide = 1 << 12 // of a patch, in pixels, and of a merge block, in patches
	maxArea = 1 << 30 // of a resized picture, in pixels
)

// validate returns an error that wraps [ErrConfig] for values that cannot be used.
func (c Config) validate() error {
	switch {
	case c.PatchSize < 1 || c.PatchSize > maxSide:
		return fmt.Errorf("%w: patch_size %d", ErrConfig, c.PatchSize)
	case c.TemporalPatchSize < 1 || c.TemporalPatchSize > 64:
		return fmt.Errorf("%w: temporal_patch_size %d", ErrConfig, c.TemporalPatchSize)
	case c.MergeSize < 1 || c.MergeSize > 64:
		return fmt.Errorf("%w: merge_size %d", ErrConfig, c.MergeSize)
	case c.MinPixels < 1 || c.MaxPixels < c.MinPixels || c.MaxPixels > maxArea:
		return fmt.Errorf("%w: %d to %d pixels", ErrConfig, c.MinPixels, c.MaxPixels)
	}
	for i := range 3 {
		if !(c.Std[i] > 0) || math.IsInf(float64(c.Std[i]), 0) || math.IsNaN(float64(c.Mean[i])) || math.IsInf(float64(c.Mean[i]), 0) {
			return fmt.Errorf("%w: image_mean %v, image_std %v", ErrConfig, c.Mean, c.Std)
		}
	}
	return nil
}

// PatchDim returns the length of one patch: 3 channels, each TemporalPatchSize × PatchSize × PatchSize.
func (c Config) PatchDim() int { return 3 * c.TemporalPatchSize * c.PatchSize * c.PatchSize }
