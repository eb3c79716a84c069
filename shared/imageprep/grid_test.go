package imageprep

import (
	"errors"
	"testing"

	"pgregory.net/rapid"
)

// TestResized has sizes that transformers' smart_resize gives.
func TestResized(t *testing.T) {
	for _, c := range []struct{ factor, minPixels, maxPixels, width, height, wantWidth, wantHeight int }{
		{32, 4096, 65536, 1, 1, 64, 64},
		{32, 4096, 65536, 16, 48, 64, 128},
		{32, 4096, 65536, 48, 16, 128, 64},
		{32, 4096, 65536, 80, 112, 64, 128},
		{32, 4096, 65536, 71, 200, 64, 192},
		{32, 4096, 65536, 640, 480, 288, 192},
		{32, 4096, 65536, 1000, 300, 448, 128},
		{32, 4096, 65536, 4000, 3000, 288, 192},
		{32, 4096, 65536, 1, 200, 32, 928},
		{32, 4096, 65536, 200, 1, 928, 32},
		{32, 4096, 65536, 5000, 25, 3616, 32},
		{32, 4096, 65536, 5103, 2122, 384, 160},
		{32, 4096, 65536, 2938, 5686, 160, 352},
		{32, 4096, 65536, 5342, 4372, 256, 224},
		{32, 4096, 65536, 238, 3844, 32, 1024},
		{32, 4096, 65536, 2041, 5346, 128, 384},
		{32, 4096, 65536, 425, 1314, 128, 448},
		{32, 65536, 16777216, 1, 1, 256, 256},
		{32, 65536, 16777216, 16, 48, 160, 448},
		{32, 65536, 16777216, 48, 16, 448, 160},
		{32, 65536, 16777216, 80, 112, 224, 320},
		{32, 65536, 16777216, 71, 200, 160, 448},
		{32, 65536, 16777216, 640, 480, 640, 480},
		{32, 65536, 16777216, 1000, 300, 992, 288},
		{32, 65536, 16777216, 4000, 3000, 4000, 3008},
		{32, 65536, 16777216, 1, 200, 32, 3648},
		{32, 65536, 16777216, 200, 1, 3648, 32},
		{32, 65536, 16777216, 5000, 25, 4992, 32},
		{32, 65536, 16777216, 928, 3075, 928, 3072},
		{32, 65536, 16777216, 3843, 2049, 3840, 2048},
		{32, 65536, 16777216, 3120, 4484, 3136, 4480},
		{32, 65536, 16777216, 836, 4731, 832, 4736},
		{32, 65536, 16777216, 2043, 137, 2048, 128},
		{32, 65536, 16777216, 5990, 1805, 5984, 1792},
		{28, 3136, 1003520, 1, 1, 56, 56},
		{28, 3136, 1003520, 16, 48, 56, 112},
		{28, 3136, 1003520, 48, 16, 112, 56},
		{28, 3136, 1003520, 80, 112, 84, 112},
		{28, 3136, 1003520, 71, 200, 84, 196},
		{28, 3136, 1003520, 640, 480, 644, 476},
		{28, 3136, 1003520, 1000, 300, 1008, 308},
		{28, 3136, 1003520, 4000, 3000, 1148, 840},
		{28, 3136, 1003520, 1, 200, 28, 812},
		{28, 3136, 1003520, 200, 1, 812, 28},
		{28, 3136, 1003520, 5000, 25, 5012, 28},
		{28, 3136, 1003520, 3344, 2319, 1176, 812},
		{28, 3136, 1003520, 1492, 3220, 672, 1456},
		{28, 3136, 1003520, 1308, 619, 1316, 616},
		{28, 3136, 1003520, 1137, 5092, 448, 2100},
		{28, 3136, 1003520, 5059, 3674, 1148, 840},
		{28, 3136, 1003520, 1038, 1113, 952, 1036},
	} {
		config := Config{PatchSize: c.factor / 2, MergeSize: 2, MinPixels: c.minPixels, MaxPixels: c.maxPixels}
		w, h, err := config.resized(c.width, c.height)
		if err != nil || w != c.wantWidth || h != c.wantHeight {
			t.Errorf("factor %d, %d to %d pixels: %d x %d becomes %d x %d, %v; want %d x %d",
				c.factor, c.minPixels, c.maxPixels, c.width, c.height, w, h, err, c.wantWidth, c.wantHeight)
		}
	}
}

func TestGridRefuses(t *testing.T) {
	c := shapesConfig()
	for _, size := range [][2]int{{201, 1}, {1, 201}, {50_000, 100}} {
		if _, err := c.Grid(size[0], size[1]); !errors.Is(err, ErrAspect) {
			t.Errorf("%v: %v, want ErrAspect", size, err)
		}
	}
	for _, size := range [][2]int{{0, 10}, {10, 0}, {-1, 5}} {
		if _, err := c.Grid(size[0], size[1]); !errors.Is(err, ErrNotImage) {
			t.Errorf("%v: %v, want ErrNotImage", size, err)
		}
	}
	if _, err := c.Grid(200, 1); err != nil {
		t.Errorf("200 to 1: %v", err)
	}
}

func TestGridProperties(t *testing.T) {
	c := shapesConfig()
	rapid.Check(t, func(t *rapid.T) {
		width := rapid.IntRange(1, 20_000).Draw(t, "width")
		height := rapid.IntRange(1, 20_000).Draw(t, "height")
		g, err := c.Grid(width, height)
		if max(width, height) > 200*min(width, height) {
			if !errors.Is(err, ErrAspect) {
				t.Fatalf("%v, want ErrAspect", err)
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if g.T != 1 || g.H < c.MergeSize || g.W < c.MergeSize || g.H%c.MergeSize != 0 || g.W%c.MergeSize != 0 {
			t.Fatalf("grid %v is not of whole blocks", g)
		}
		if area := g.Patches() * c.PatchSize * c.PatchSize; area < c.MinPixels {
			t.Fatalf("grid %v has %d pixels, fewer than %d", g, area, c.MinPixels)
		}
		if 4*g.Tokens(c.MergeSize) != g.Patches() {
			t.Fatalf("grid %v: %d tokens of %d patches", g, g.Tokens(c.MergeSize), g.Patches())
		}
	})
}
