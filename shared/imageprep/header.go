package imageprep

import (
	"bytes"
	"errors"
	"fmt"
	"image"
	"image/color"
	"image/gif"
	"image/jpeg"
	"image/png"

	"golang.org/x/image/webp"
)

var (
	// ErrNotImage is wrapped when the bytes are no picture in a known format, or one whose header is broken.
	ErrNotImage = errors.New("not a PNG, JPEG, WebP or GIF picture")

	// ErrTooLarge is wrapped when a picture has more pixels than the caller allows.
	ErrTooLarge = errors.New("the picture is too large")

	// ErrDecode is wrapped by [Config.Patches]'s error when the header is that of a picture but the rest is cut off or
	// broken.
	ErrDecode = errors.New("the picture is truncated or damaged")
)

// DecodeLimit is the most pixels of a picture that [Config.Patches] decodes: 8192 x 8192. A picture of 16 bits a sample
// takes 8 bytes a pixel, 512 MiB at this size. (Pillow refuses more than 178,956,970 as a "decompression bomb".)
const DecodeLimit = 64 << 20

// Header is what a picture's header says.
type Header struct {
	Format        string // "png", "jpeg", "webp" or "gif"
	Width, Height int    // in pixels, after EXIF orientation
}

// header is Header with what decoding needs.
type header struct {
	Header
	orientation int         // EXIF, 1 to 8: how the stored pixels are to be turned
	model       color.Model // of the stored pixels
}

// ReadHeader reads a picture's header without decoding its pixels. Its error wraps [ErrNotImage], or [ErrTooLarge] if
// the picture has more than maxPixels pixels. data is not kept.
func ReadHeader(data []byte, maxPixels int) (Header, error) {
	h, err := readHeader(data, maxPixels)
	return h.Header, err
}

func readHeader(data []byte, maxPixels int) (header, error) {
	format := sniff(data)
	var (
		config image.Config
		exif   []byte
		err    error
	)
	switch format {
	case "png":
		config, err = png.DecodeConfig(bytes.NewReader(data))
		exif = pngExif(data)
	case "jpeg":
		config, err = jpeg.DecodeConfig(bytes.NewReader(data))
		exif = jpegExif(data)
	case "gif":
		config, err = gif.DecodeConfig(bytes.NewReader(data))
	case "webp":
		if exif, err = scanWebP(data); err == nil {
			config, err = webp.DecodeConfig(bytes.NewReader(data))
		}
	default:
		return header{}, ErrNotImage
	}
	switch {
	case err != nil:
		return header{}, fmt.Errorf("%w: %w", ErrNotImage, err)
	case config.Width < 1 || config.Height < 1:
		return header{}, fmt.Errorf("%w: %d x %d pixels", ErrNotImage, config.Width, config.Height)
	case uint64(config.Width)*uint64(config.Height) > uint64(max(maxPixels, 0)):
		return header{}, fmt.Errorf("%w: %d x %d pixels, at most %d are allowed", ErrTooLarge, config.Width, config.Height, maxPixels)
	}
	h := header{Header: Header{Format: format, Width: config.Width, Height: config.Height},
		orientation: orientation(exif), model: config.ColorModel}
	if h.orientation >= 5 {
		h.Width, h.Height = h.Height, h.Width
	}
	return h, nil
}

// sniff tells the format by its first bytes, "" if it is none of the known ones.
func sniff(data []byte) string {
	switch {
	case bytes.HasPrefix(data, []byte("\x89PNG\r\n\x1a\n")):
		return "png"
	case bytes.HasPrefix(data, []byte("\xff\xd8\xff")):
		return "jpeg"
	case bytes.HasPrefix(data, []byte("GIF87a")), bytes.HasPrefix(data, []byte("GIF89a")):
		return "gif"
	case len(data) >= 12 && string(data[:4]) == "RIFF" && string(data[8:12]) == "WEBP":
		return "webp"
	}
	return ""
}
