package imageprep

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// clip are the values that transformers takes when the file has none.
var clip = Config{
	PatchSize: 14, TemporalPatchSize: 2, MergeSize: 2, MinPixels: 3136, MaxPixels: 1003520,
	Mean: [3]float32{0.48145466, 0.4578275, 0.40821073}, Std: [3]float32{0.26862954, 0.26130258, 0.27577711},
}

func TestParseConfig(t *testing.T) {
	with := func(c Config, minPixels, maxPixels int) Config {
		c.MinPixels, c.MaxPixels = minPixels, maxPixels
		return c
	}
	qwen3 := shapesConfig()
	for _, c := range []struct {
		name, json string
		want       Config
	}{
		{"the demo model", `{"size":{"shortest_edge":4096,"longest_edge":65536},"patch_size":16,"temporal_patch_size":2,"merge_size":2,
			"image_mean":[0.5,0.5,0.5],"image_std":[0.5,0.5,0.5],"image_processor_type":"Qwen2VLImageProcessorFast"}`, qwen3},
		{"Qwen3-VL", `{"size":{"longest_edge":16777216,"shortest_edge":65536},"patch_size":16,"temporal_patch_size":2,"merge_size":2,
			"image_mean":[0.5,0.5,0.5],"image_std":[0.5,0.5,0.5],"processor_class":"Qwen3VLProcessor","image_processor_type":"Qwen2VLImageProcessorFast"}`,
			with(qwen3, 65536, 16777216)},
		{"Qwen2-VL", `{"min_pixels":3136,"max_pixels":12845056,"patch_size":14,"temporal_patch_size":2,"merge_size":2,
			"image_mean":[0.48145466,0.4578275,0.40821073],"image_std":[0.26862954,0.26130258,0.27577711],
			"image_processor_type":"Qwen2VLImageProcessor"}`, with(clip, 3136, 12845056)},
		{"min and max in size", `{"size":{"min_pixels":100,"max_pixels":200}}`, with(clip, 100, 200)},
		{"nulls", `{"min_pixels":null,"max_pixels":null,"size":{"shortest_edge":7,"longest_edge":8},"rescale_factor":0.00392156862745098,"resample":3}`, with(clip, 7, 8)},
		{"nothing", `{}`, clip},
	} {
		got, err := parseConfig([]byte(c.json))
		if err != nil || got != c.want {
			t.Errorf("%s: %+v, %v; want %+v", c.name, got, err, c.want)
		}
	}
	for _, c := range []struct {
		name, json string
		want       error
	}{
		{"another processor", `{"image_processor_type":"GotOcr2ImageProcessor","size":{"height":56,"width":56}}`, ErrUnsupported},
		{"no resizing", `{"do_resize":false}`, ErrUnsupported},
		{"another scale", `{"rescale_factor":1}`, ErrUnsupported},
		{"bilinear", `{"resample":2}`, ErrUnsupported},
		{"cut", `{`, ErrConfig},
		{"patch 0", `{"patch_size":0}`, ErrConfig},
		{"huge patch", `{"patch_size":1000000000}`, ErrConfig},
		{"merge 0", `{"merge_size":0}`, ErrConfig},
		{"temporal 0", `{"temporal_patch_size":0}`, ErrConfig},
		{"min above max", `{"min_pixels":10,"max_pixels":9}`, ErrConfig},
		{"min 0", `{"min_pixels":0}`, ErrConfig},
		{"two means", `{"image_mean":[1,2]}`, ErrConfig},
		{"deviation 0", `{"image_std":[0,1,1]}`, ErrConfig},
	} {
		if _, err := parseConfig([]byte(c.json)); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
}

func TestLoadConfig(t *testing.T) {
	dir := t.TempDir()
	if _, err := LoadConfig(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("empty folder: %v", err)
	}
	write := func(name, content string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("processor_config.json", `{"image_processor":{"patch_size":16}}`)
	if c, err := LoadConfig(dir); err != nil || c.PatchSize != 16 {
		t.Errorf("processor_config.json: %+v, %v", c, err)
	}
	write("preprocessor_config.json", `{"patch_size":18}`)
	if c, err := LoadConfig(dir); err != nil || c.PatchSize != 18 {
		t.Errorf("preprocessor_config.json: %+v, %v", c, err)
	}
}
