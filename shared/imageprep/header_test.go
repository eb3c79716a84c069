package imageprep

import (
	"encoding/binary"
	"errors"
	"fmt"
	"image"
	"image/color"
	"image/gif"
	"testing"
)

var red = color.NRGBA{200, 10, 20, 255}

func TestReadHeader(t *testing.T) {
	palette := color.Palette{color.Black, color.White}
	for _, c := range []struct {
		name string
		data []byte
		want Header
	}{
		{"png", encodePNG(t, gradient(7, 5)), Header{"png", 7, 5}},
		{"jpeg", encodeJPEG(t, gradient(9, 4)), Header{"jpeg", 9, 4}},
		{"gif", encodeGIF(t, &gif.GIF{Image: []*image.Paletted{image.NewPaletted(image.Rect(0, 0, 3, 2), palette)}, Delay: []int{0}}), Header{"gif", 3, 2}},
		{"webp", riff(solid(6, 8, red)), Header{"webp", 6, 8}},
		{"extended webp", riff(extended(0, 6, 8), solid(6, 8, red)), Header{"webp", 6, 8}},
		{"lossy webp", readFile(t, "testdata/lossy.webp"), Header{"webp", 61, 47}},
	} {
		got, err := ReadHeader(c.data, 1000*1000)
		if err != nil || got != c.want {
			t.Errorf("%s: %+v, %v; want %+v", c.name, got, err, c.want)
		}
	}
}

func TestTooLarge(t *testing.T) {
	for name, data := range map[string][]byte{
		"png":           hugePNG(50_000, 50_000),
		"largest png":   hugePNG(1<<31-1, 1<<31-1),
		"webp":          riff(solid(1<<14, 1<<14, red)),
		"extended webp": riff(extended(0, 1<<14, 1<<14), solid(1<<14, 1<<14, red)),
		"one too many":  encodePNG(t, gradient(101, 100)),
	} {
		if _, err := ReadHeader(data, 100*100); !errors.Is(err, ErrTooLarge) && !(name == "largest png" && errors.Is(err, ErrNotImage)) {
			t.Errorf("%s: %v, want ErrTooLarge", name, err)
		}
		if _, err := shapesConfig().Patches(data, nil); err == nil {
			t.Errorf("%s: patches of it", name)
		}
	}
	if _, err := ReadHeader(encodePNG(t, gradient(100, 100)), 100*100); err != nil {
		t.Errorf("exactly as many as are allowed: %v", err)
	}
	if _, err := ReadHeader(encodePNG(t, gradient(1, 1)), -1); !errors.Is(err, ErrTooLarge) {
		t.Errorf("nothing allowed: %v", err)
	}
}

func TestNotImage(t *testing.T) {
	whole := encodeJPEG(t, gradient(9, 4))
	for name, data := range map[string][]byte{
		"nothing":           nil,
		"text":              []byte("<svg xmlns='http://www.w3.org/2000/svg'/>"),
		"bmp":               []byte("BM\x00\x00\x00\x00"),
		"bare png":          []byte("\x89PNG\r\n\x1a\n"),
		"bare jpeg":         whole[:20],
		"bare gif":          []byte("GIF89a\x01"),
		"bare webp":         []byte("RIFF\x04\x00\x00\x00WEBP"),
		"empty png":         hugePNG(0, 5),
		"animated webp":     riff(extended(0x02, 6, 8), solid(6, 8, red)),
		"webp of two sizes": riff(extended(0, 6, 8), solid(6, 9, red)),
		"cut webp":          riff(extended(0, 6, 8), solid(6, 8, red))[:40],
	} {
		if _, err := ReadHeader(data, 1<<24); !errors.Is(err, ErrNotImage) {
			t.Errorf("%s: %v, want ErrNotImage", name, err)
		}
	}
}

func TestOrientation(t *testing.T) {
	for o := range uint16(10) {
		want := int(o)
		if o == 0 || o == 9 {
			want = 1
		}
		for _, order := range []binary.AppendByteOrder{binary.LittleEndian, binary.BigEndian} {
			exif := tiff(order, o)
			if got := orientation(exif); got != want {
				t.Errorf("%v, orientation %d: %d", order, o, got)
			}
			marked := append([]byte("Exif\x00\x00"), exif...)
			width, height := 9, 4
			if want >= 5 {
				width, height = 4, 9
			}
			for format, data := range map[string][]byte{
				"jpeg": segment(segment(encodeJPEG(t, gradient(9, 4)), marked), []byte("http://ns.adobe.com/xap/1.0/\x00")),
				"png":  chunk(encodePNG(t, gradient(9, 4)), "eXIf", exif),
				"webp": riff(extended(0x08, 9, 4), solid(9, 4, red), webpChunk("EXIF", exif)),
			} {
				h, err := ReadHeader(data, 1000)
				if err != nil || h != (Header{format, width, height}) {
					t.Errorf("%s, orientation %d: %+v, %v; want %d x %d", format, o, h, err, width, height)
				}
				if p := decodeFile(t, data); p.width != width || p.height != height {
					t.Errorf("%s, orientation %d: decoded to %d x %d", format, o, p.width, p.height)
				}
			}
		}
	}
	for i := range 32 {
		if got := orientation(tiff(binary.LittleEndian, 6)[:i]); got != 1 {
			t.Errorf("%d bytes of EXIF data: orientation %d", i, got)
		}
	}
}

// TestTurn draws the letter F in each orientation (EXIF 2.3, figure of tag 0x0112) and turns it upright.
func TestTurn(t *testing.T) {
	upright := []string{"###", "#..", "##.", "#.."}
	stored := map[int][]string{
		1: {"###", "#..", "##.", "#.."},
		2: {"###", "..#", ".##", "..#"},
		3: {"..#", ".##", "..#", "###"},
		4: {"#..", "##.", "#..", "###"},
		5: {"####", "#.#.", "#..."},
		6: {"#...", "#.#.", "####"},
		7: {"...#", ".#.#", "####"},
		8: {"####", ".#.#", "...#"},
	}
	for o, rows := range stored {
		p := newRGB(len(rows[0]), len(rows))
		for y, row := range rows {
			for x, c := range row {
				p.pix[3*(y*p.width+x)] = uint8(c)
			}
		}
		p = p.rows().turn(o).whole()
		var got []string
		for y := range p.height {
			line := ""
			for x := range p.width {
				line += string(rune(p.pix[3*(y*p.width+x)]))
			}
			got = append(got, line)
		}
		if fmt.Sprint(got) != fmt.Sprint(upright) {
			t.Errorf("orientation %d: %v, want %v", o, got, upright)
		}
	}
}
