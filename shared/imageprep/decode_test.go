package imageprep

import (
	"bytes"
	"errors"
	"image"
	"image/color"
	"image/gif"
	"os"
	"strings"
	"testing"
)

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// decodeFile decodes a picture with its header.
func decodeFile(t testing.TB, data []byte) *rgb {
	t.Helper()
	h, err := readHeader(data, 1<<24)
	if err != nil {
		t.Fatal(err)
	}
	p, err := decode(data, h)
	if err != nil {
		t.Fatal(err)
	}
	return p.whole()
}

// TestLikeTheCLibraries compares with libjpeg-turbo 2.1.5 and libwebp 1.2.4, which Pillow uses: NAME.png is what they
// made of NAME. The pictures were drawn and encoded for this test.
func TestLikeTheCLibraries(t *testing.T) {
	entries, err := os.ReadDir("testdata")
	if err != nil {
		t.Fatal(err)
	}
	checked := 0
	for _, e := range entries {
		name := e.Name()
		if !strings.HasSuffix(name, ".jpg") && !strings.HasSuffix(name, ".webp") {
			continue
		}
		checked++
		got := decodeFile(t, readFile(t, "testdata/"+name))
		want := decodeFile(t, readFile(t, "testdata/"+name+".png"))
		if got.width != want.width || got.height != want.height {
			t.Errorf("%s: %d x %d, want %d x %d", name, got.width, got.height, want.width, want.height)
			continue
		}
		differ, largest := 0, 0
		for i := range got.pix {
			d := max(int(got.pix[i])-int(want.pix[i]), int(want.pix[i])-int(got.pix[i]))
			largest = max(largest, d)
			if d != 0 {
				differ++
			}
		}
		// Go's inverse cosine transform rounds otherwise than libjpeg's; WebP leaves no freedom.
		limit, share := 0, 0
		if strings.HasSuffix(name, ".jpg") {
			limit, share = 3, len(got.pix)/20
		}
		t.Logf("%s: %d of %d samples differ, by at most %d", name, differ, len(got.pix), largest)
		if largest > limit || differ > share {
			t.Errorf("%s: %d of %d samples differ, by at most %d", name, differ, len(got.pix), largest)
		}
	}
	if checked != 10 {
		t.Errorf("%d pictures in testdata, want 10", checked)
	}
}

// pixel returns one pixel's colours.
func (p *rgb) pixel(x, y int) [3]uint8 { return [3]uint8(p.pix[3*(y*p.width+x):]) }

// TestColours: alpha is dropped, 16 bits keep their high byte, palettes and grey become colours.
func TestColours(t *testing.T) {
	const w, h = 3, 2
	bounds := image.Rect(0, 0, w, h)
	nrgba := image.NewNRGBA(bounds)
	nrgba.SetNRGBA(1, 1, color.NRGBA{10, 20, 30, 0}) // wholly transparent, and yet there
	gray := image.NewGray(bounds)
	gray.SetGray(1, 1, color.Gray{77})
	gray16 := image.NewGray16(bounds)
	gray16.SetGray16(1, 1, color.Gray16{0x4DFF})
	rgba64 := image.NewRGBA64(bounds)
	for i := range rgba64.Pix {
		rgba64.Pix[i] = 0xFF // opaque
	}
	rgba64.SetRGBA64(1, 1, color.RGBA64{0x0AFF, 0x14FF, 0x1EFF, 0xFFFF})
	nrgba64 := image.NewNRGBA64(bounds)
	nrgba64.SetNRGBA64(1, 1, color.NRGBA64{0x0AFF, 0x14FF, 0x1EFF, 0x0001})
	paletted := image.NewPaletted(bounds, color.Palette{color.NRGBA{1, 2, 3, 255}, color.NRGBA{10, 20, 30, 40}})
	paletted.SetColorIndex(1, 1, 1)
	for name, c := range map[string]struct {
		img  image.Image
		want [3]uint8
	}{
		"with alpha":         {nrgba, [3]uint8{10, 20, 30}},
		"grey":               {gray, [3]uint8{77, 77, 77}},
		"grey of 16 bits":    {gray16, [3]uint8{0x4D, 0x4D, 0x4D}},
		"16 bits":            {rgba64, [3]uint8{10, 20, 30}},
		"16 bits with alpha": {nrgba64, [3]uint8{10, 20, 30}},
		"palette with alpha": {paletted, [3]uint8{10, 20, 30}},
	} {
		if got := decodeFile(t, encodePNG(t, c.img)).pixel(1, 1); got != c.want {
			t.Errorf("PNG %s: %v, want %v", name, got, c.want)
		}
	}
	if got := decodeFile(t, riff(solid(w, h, color.NRGBA{10, 20, 30, 5}))).pixel(1, 1); got != [3]uint8{10, 20, 30} {
		t.Errorf("WebP with alpha: %v", got)
	}
}

// TestGIF: the first frame only, on its screen, whose bare parts have the transparent colour.
func TestGIF(t *testing.T) {
	palette := color.Palette{color.RGBA{1, 2, 3, 255}, color.RGBA{0, 0, 0, 0}, color.RGBA{7, 8, 9, 255}, color.RGBA{4, 4, 4, 255}}
	first := image.NewPaletted(image.Rect(1, 1, 3, 3), palette)
	first.SetColorIndex(1, 1, 2)
	second := image.NewPaletted(image.Rect(0, 0, 4, 4), palette)
	for i := range second.Pix {
		second.Pix[i] = 3
	}
	data := encodeGIF(t, &gif.GIF{
		Image: []*image.Paletted{first, second}, Delay: []int{1, 1},
		Config: image.Config{Width: 4, Height: 4, ColorModel: palette}, BackgroundIndex: 3,
	})
	// Go writes the transparent colour as black; give it one that must come back.
	at := bytes.Index(data, []byte{1, 2, 3, 0, 0, 0, 7, 8, 9})
	if at < 0 {
		t.Fatal("no palette in the GIF")
	}
	copy(data[at+3:], []byte{50, 60, 70})
	p := decodeFile(t, data)
	for _, c := range []struct {
		x, y int
		want [3]uint8
	}{{0, 0, [3]uint8{50, 60, 70}}, {1, 1, [3]uint8{7, 8, 9}}, {2, 2, [3]uint8{1, 2, 3}}, {3, 3, [3]uint8{50, 60, 70}}} {
		if got := p.pixel(c.x, c.y); got != c.want {
			t.Errorf("pixel (%d, %d): %v, want %v", c.x, c.y, got, c.want)
		}
	}
}

// TestTruncated cuts pictures at every length: an error, never a panic or a grey rest.
func TestTruncated(t *testing.T) {
	c := shapesConfig()
	for name, data := range map[string][]byte{
		"png":  encodePNG(t, gradient(40, 30)),
		"jpeg": encodeJPEG(t, gradient(40, 30)),
		"webp": readFile(t, "testdata/lossy.webp"),
		"gif":  encodeGIF(t, &gif.GIF{Image: []*image.Paletted{image.NewPaletted(image.Rect(0, 0, 40, 30), color.Palette{color.Black, color.White})}, Delay: []int{0}}),
	} {
		h, err := ReadHeader(data, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		grid, err := c.Grid(h.Width, h.Height)
		if err != nil {
			t.Fatal(err)
		}
		out := make([]float32, grid.Patches()*c.PatchDim())
		if _, err := c.Patches(data, out); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for n := range len(data) - 20 {
			if _, err := c.Patches(data[:n], out); !errors.Is(err, ErrNotImage) && !errors.Is(err, ErrDecode) {
				t.Errorf("%s, %d of %d bytes: %v", name, n, len(data), err)
				break
			}
		}
	}
}

func TestBufferLength(t *testing.T) {
	c := shapesConfig()
	data := encodePNG(t, gradient(64, 64))
	for _, n := range []int{0, 16*c.PatchDim() - 1, 16*c.PatchDim() + 1} {
		if _, err := c.Patches(data, make([]float32, n)); err == nil {
			t.Errorf("a buffer of %d values was taken", n)
		}
	}
	if _, err := c.Patches(data, make([]float32, 16*c.PatchDim())); err != nil {
		t.Error(err)
	}
}
