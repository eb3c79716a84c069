package imageprep

import (
	"bytes"
	"compress/zlib"
	"encoding/binary"
	"hash/crc32"
	"image"
	"image/color"
	"image/gif"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// zeroPNG is a black picture of pixels of size bytes.
func zeroPNG(t testing.TB, width, height int, depth, kind byte, size int, interlace byte) []byte {
	t.Helper()
	var packed bytes.Buffer
	z, err := zlib.NewWriterLevel(&packed, zlib.BestSpeed)
	if err != nil {
		t.Fatal(err)
	}
	row := make([]byte, 1+width*size)
	for range height {
		if _, err := z.Write(row); err != nil {
			t.Fatal(err)
		}
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	out := []byte("\x89PNG\r\n\x1a\n")
	add := func(name string, body []byte) {
		out = binary.BigEndian.AppendUint32(out, uint32(len(body)))
		typed := append([]byte(name), body...)
		out = append(out, typed...)
		out = binary.BigEndian.AppendUint32(out, crc32.ChecksumIEEE(typed))
	}
	head := binary.BigEndian.AppendUint32(nil, uint32(width))
	head = binary.BigEndian.AppendUint32(head, uint32(height))
	add("IHDR", append(head, depth, kind, 0, 0, interlace))
	add("IDAT", packed.Bytes())
	add("IEND", nil)
	return out
}

// allocated returns how many bytes Patches allocates for a picture, all together, and what Memory says.
func allocated(t *testing.T, c Config, data []byte) (got, bound int64) {
	t.Helper()
	h, err := ReadHeader(data, DecodeLimit)
	if err != nil {
		t.Fatal(err)
	}
	grid, err := c.Grid(h.Width, h.Height)
	if err != nil {
		t.Fatal(err)
	}
	if bound, err = c.Memory(data); err != nil {
		t.Fatal(err)
	}
	out := make([]float32, grid.Patches()*c.PatchDim())
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err = c.Patches(data, out)
	runtime.ReadMemStats(&after)
	if err != nil {
		t.Fatal(err)
	}
	return int64(after.TotalAlloc - before.TotalAlloc), bound
}

// TestMemoryOfLargePicture: the decoded picture is held once, and nothing else of its size.
func TestMemoryOfLargePicture(t *testing.T) {
	const width, height = 2_500, 2_500
	got, bound := allocated(t, shapesConfig(), zeroPNG(t, width, height, 16, 2, 6, 0))
	t.Logf("%d pixels: %d MiB allocated, at most %d announced", width*height, got>>20, bound>>20)
	if most := int64(width*height*8 + 8<<20); got > bound || bound > most {
		t.Errorf("%d bytes allocated, %d announced, want at most %d", got, bound, most)
	}
}

// TestMemory: no kind of picture takes more than announced.
func TestMemory(t *testing.T) {
	c := shapesConfig()
	photo := gradient(700, 500)
	palette := color.Palette{color.Black, color.White}
	pictures := map[string][]byte{
		"png":           encodePNG(t, photo),
		"jpeg":          encodeJPEG(t, photo),
		"turned jpeg":   segment(encodeJPEG(t, photo), append([]byte("Exif\x00\x00"), tiff(binary.LittleEndian, 6)...)),
		"grey jpeg":     encodeJPEG(t, image.NewGray(photo.Rect)),
		"palette":       encodePNG(t, image.NewPaletted(photo.Rect, palette)),
		"lossless webp": riff(solid(700, 500, color.NRGBA{10, 20, 30, 5})),
		"16 bit grey":   zeroPNG(t, 700, 500, 16, 0, 2, 0),
		"gif": encodeGIF(t, &gif.GIF{Image: []*image.Paletted{image.NewPaletted(photo.Rect, palette)},
			Delay: []int{0}}),
	}
	paths, err := filepath.Glob("testdata/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		if strings.Contains(path, ".jpg") || strings.Contains(path, ".webp") {
			pictures[path] = readFile(t, path)
		}
	}
	if len(pictures) < 18 {
		t.Errorf("only %d pictures", len(pictures))
	}
	for name, data := range pictures {
		if got, bound := allocated(t, c, data); got > bound {
			t.Errorf("%s: %d bytes allocated, %d announced", name, got, bound)
		}
	}
}

func TestMemoryOfNoPicture(t *testing.T) {
	for _, data := range [][]byte{nil, []byte("GIF89a"), hugePNG(8193, 8192)} {
		if n, err := shapesConfig().Memory(data); err == nil {
			t.Errorf("%d bytes for %.20q", n, data)
		}
	}
}
