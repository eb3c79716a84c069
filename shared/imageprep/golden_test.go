package imageprep

import (
	"encoding/binary"
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

const goldenDir = "../testdata/golden/shapes-vl-moe"

// shapesConfig is the demo model's processor (models/shapes-vl-moe/preprocessor_config.json).
func shapesConfig() Config {
	return Config{
		MinPixels: 4096, MaxPixels: 65536, PatchSize: 16, TemporalPatchSize: 2, MergeSize: 2,
		Mean: [3]float32{0.5, 0.5, 0.5}, Std: [3]float32{0.5, 0.5, 0.5},
	}
}

type goldenCase struct {
	Name   string   `json:"name"`
	Images []string `json:"images"`
	Grids  [][3]int `json:"image_grid_thw"`
}

func goldenCases(t testing.TB) []goldenCase {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(goldenDir, "cases.json"))
	if err != nil {
		t.Fatal(err)
	}
	var cases []goldenCase
	if err := json.Unmarshal(data, &cases); err != nil {
		t.Fatal(err)
	}
	return cases
}

// tensor reads one float32 tensor of a safetensors file, nil if the file or the tensor is not there.
func tensor(t testing.TB, path, name string) []float32 {
	t.Helper()
	data, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	n := binary.LittleEndian.Uint64(data)
	var header map[string]struct {
		DType   string `json:"dtype"`
		Offsets [2]int `json:"data_offsets"`
	}
	if err := json.Unmarshal(data[8:8+n], &header); err != nil {
		t.Fatal(err)
	}
	entry, ok := header[name]
	if !ok {
		return nil
	}
	if entry.DType != "F32" {
		t.Fatalf("%s: %s is %s", path, name, entry.DType)
	}
	raw := data[8+n:][entry.Offsets[0]:entry.Offsets[1]]
	out := make([]float32, len(raw)/4)
	for i := range out {
		out[i] = math.Float32frombits(binary.LittleEndian.Uint32(raw[4*i:]))
	}
	return out
}

// patches runs the whole way for one picture.
func patches(t testing.TB, c Config, data []byte) (Grid, []float32) {
	t.Helper()
	h, err := ReadHeader(data, 1<<24)
	if err != nil {
		t.Fatal(err)
	}
	grid, err := c.Grid(h.Width, h.Height)
	if err != nil {
		t.Fatal(err)
	}
	out := make([]float32, grid.Patches()*c.PatchDim())
	got, err := c.Patches(data, out)
	if err != nil {
		t.Fatal(err)
	}
	if got != grid {
		t.Fatalf("Patches has the grid %v, the header %v", got, grid)
	}
	return grid, out
}

// TestGolden compares grids of all pictures and pixel values where they were kept with what transformers made.
func TestGolden(t *testing.T) {
	c := shapesConfig()
	pictures, compared := 0, 0
	for _, g := range goldenCases(t) {
		var all []float32
		exact := true // no picture of the case is resized
		for i, name := range g.Images {
			data, err := os.ReadFile(filepath.Join(goldenDir, name))
			if err != nil {
				t.Fatal(err)
			}
			grid, values := patches(t, c, data)
			if got := [3]int{grid.T, grid.H, grid.W}; got != g.Grids[i] {
				t.Errorf("%s: grid %v, want %v", name, got, g.Grids[i])
			}
			h, err := ReadHeader(data, 1<<24)
			if err != nil {
				t.Fatal(err)
			}
			exact = exact && h.Width == grid.W*c.PatchSize && h.Height == grid.H*c.PatchSize
			all = append(all, values...)
			pictures++
		}
		want := tensor(t, filepath.Join(goldenDir, g.Name+".safetensors"), "pixel_values")
		if want == nil {
			continue
		}
		compared++
		compare(t, g.Name, all, want, exact)
	}
	if pictures < 20 || compared < 3 {
		t.Errorf("only %d pictures, %d of them with values", pictures, compared)
	}
}

// compare allows a difference of 1e-5; where a picture was resized one grey level, 2/255, in one of 1000 samples:
// transformers resizes with torch, whose coefficients have fewer bits.
func compare(t *testing.T, name string, got, want []float32, exact bool) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%s: %d values, want %d", name, len(got), len(want))
	}
	differ, largest := 0, 0.0
	for i := range got {
		d := math.Abs(float64(got[i] - want[i]))
		largest = max(largest, d)
		if d > 1e-5 {
			differ++
		}
	}
	share := float64(differ) / float64(len(got))
	t.Logf("%s: resized %v, %d of %d samples differ (%.4f%%), by at most %g", name, !exact, differ, len(got), 100*share, largest)
	switch {
	case exact && differ > 0:
		t.Errorf("%s: %d samples differ, by at most %g", name, differ, largest)
	case largest > 2.0/255+1e-5, share > 0.001:
		t.Errorf("%s: %.3f%% of the samples differ, by at most %g", name, 100*share, largest)
	}
}

func TestSafetensorsReaderFindsNothing(t *testing.T) {
	if v := tensor(t, filepath.Join(goldenDir, "case05.safetensors"), "pixel_values"); v != nil {
		t.Errorf("a case without pictures has %d pixel values", len(v))
	}
	if !slices.ContainsFunc(goldenCases(t), func(g goldenCase) bool { return len(g.Images) > 1 }) {
		t.Error("no golden case with several pictures")
	}
}
