package imageprep

import "testing"

// benchmarkPatches reports megapixels of the stored picture a second.
func benchmarkPatches(b *testing.B, c Config, data []byte) {
	h, err := ReadHeader(data, 1<<30)
	if err != nil {
		b.Fatal(err)
	}
	grid, err := c.Grid(h.Width, h.Height)
	if err != nil {
		b.Fatal(err)
	}
	out := make([]float32, grid.Patches()*c.PatchDim())
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Patches(data, out); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(h.Width*h.Height)*float64(b.N)/b.Elapsed().Seconds()/1e6, "MPix/s")
}

func BenchmarkPatches(b *testing.B) {
	small, large := shapesConfig(), shapesConfig()
	large.MinPixels, large.MaxPixels = 65536, 16777216 // Qwen3-VL
	photo := gradient(2000, 1500)
	b.Run("golden png 192x192", func(b *testing.B) { benchmarkPatches(b, small, readFile(b, goldenDir+"/case15_0.png")) })
	b.Run("golden png 640x480, resized", func(b *testing.B) { benchmarkPatches(b, small, readFile(b, goldenDir+"/case14_0.png")) })
	b.Run("png 2000x1500", func(b *testing.B) { benchmarkPatches(b, large, encodePNG(b, photo)) })
	b.Run("jpeg 2000x1500", func(b *testing.B) { benchmarkPatches(b, large, encodeJPEG(b, photo)) })
}

func BenchmarkReadHeader(b *testing.B) {
	for name, data := range map[string][]byte{
		"png":  readFile(b, goldenDir+"/case14_0.png"),
		"jpeg": readFile(b, "testdata/420.jpg"),
		"webp": readFile(b, "testdata/lossy.webp"),
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if _, err := ReadHeader(data, 1<<24); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkResize(b *testing.B) {
	p := newRGB(2000, 1500)
	for i := range p.pix {
		p.pix[i] = uint8(i * 7)
	}
	for b.Loop() {
		p.rows().resize(992, 736)
	}
	b.ReportMetric(2000*1500*float64(b.N)/b.Elapsed().Seconds()/1e6, "MPix/s")
}
