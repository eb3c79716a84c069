package imageprep

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// addPictures adds a picture of each kind to a fuzz target's seeds.
func addPictures(f *testing.F) {
	f.Helper()
	for _, pattern := range []string{"testdata/*", goldenDir + "/case17_0.png"} {
		paths, err := filepath.Glob(pattern)
		if err != nil || len(paths) == 0 {
			f.Fatalf("%s: %v, %d files", pattern, err, len(paths))
		}
		for _, path := range paths {
			if info, err := os.Stat(path); err == nil && !info.IsDir() {
				f.Add(readFile(f, path))
			}
		}
	}
	f.Add(riff(extended(0x08, 9, 4), solid(9, 4, red), webpChunk("EXIF", tiff(binary.BigEndian, 6))))
	f.Add(chunk(encodePNG(f, gradient(9, 4)), "eXIf", tiff(binary.LittleEndian, 8)))
	f.Add(segment(encodeJPEG(f, gradient(9, 4)), append([]byte("Exif\x00\x00"), tiff(binary.LittleEndian, 3)...)))
	f.Add(hugePNG(50_000, 50_000))
	f.Add([]byte("GIF89a"))
}

// FuzzReadHeader: any bytes give a header within the limit or one of the errors, and a picture that decodes has the
// announced size.
func FuzzReadHeader(f *testing.F) {
	const limit = 1 << 14
	c := Config{MinPixels: 1, MaxPixels: 1 << 10, PatchSize: 2, TemporalPatchSize: 1, MergeSize: 1, Std: [3]float32{1, 1, 1}}
	addPictures(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		h, err := ReadHeader(data, limit)
		if err != nil {
			if !errors.Is(err, ErrNotImage) && !errors.Is(err, ErrTooLarge) {
				t.Fatal(err)
			}
			return
		}
		if h.Width < 1 || h.Height < 1 || h.Width*h.Height > limit || h.Format == "" {
			t.Fatalf("%+v", h)
		}
		grid, err := c.Grid(h.Width, h.Height)
		if errors.Is(err, ErrAspect) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		got, err := c.Patches(data, make([]float32, grid.Patches()*c.PatchDim()))
		if err != nil && !errors.Is(err, ErrDecode) {
			t.Fatal(err)
		}
		if err == nil && got != grid {
			t.Fatalf("grid %v, header %+v", got, h)
		}
	})
}

// FuzzOrientation: EXIF data and its containers, however broken, give an orientation.
func FuzzOrientation(f *testing.F) {
	f.Add(tiff(binary.LittleEndian, 6))
	f.Add(append([]byte("Exif\x00\x00"), tiff(binary.BigEndian, 8)...))
	f.Add([]byte("II*\x00\xff\xff\xff\xff\xff\xff"))
	addPictures(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		webp, _ := scanWebP(append([]byte("RIFF\x00\x00\x00\x00WEBP"), data...))
		gifPalette(data)
		for _, exif := range [][]byte{data, jpegExif(data), pngExif(data), webp} {
			if o := orientation(exif); o < 1 || o > 8 {
				t.Fatalf("orientation %d", o)
			}
		}
	})
}
