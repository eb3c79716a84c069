package imageprep

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
)

// orientation returns the orientation (1 to 8) that EXIF data, a TIFF structure, gives; 1, upright, if it gives none.
// EXIF 2.3, section 4.6: tag 0x0112 of the first directory, a SHORT.
func orientation(exif []byte) int {
	const (
		headerLength  = 8
		entryLength   = 12
		tag           = 0x0112
		typeShort     = 3
		uprightPixels = 1
	)
	exif = bytes.TrimPrefix(exif, []byte("Exif\x00\x00")) // some writers keep JPEG's marker in WebP and PNG
	if len(exif) < headerLength {
		return uprightPixels
	}
	var order binary.ByteOrder = binary.LittleEndian
	switch string(exif[:4]) {
	case "II*\x00":
	case "MM\x00*":
		order = binary.BigEndian
	default:
		return uprightPixels
	}
	offset := uint64(order.Uint32(exif[4:]))
	if offset+2 > uint64(len(exif)) {
		return uprightPixels
	}
	count := int(order.Uint16(exif[offset:]))
	entries := exif[offset+2:]
	for range count {
		if len(entries) < entryLength {
			break
		}
		if order.Uint16(entries) == tag && order.Uint16(entries[2:]) == typeShort && order.Uint32(entries[4:]) == 1 {
			if v := int(order.Uint16(entries[8:])); v >= 1 && v <= 8 {
				return v
			}
			break
		}
		entries = entries[entryLength:]
	}
	return uprightPixels
}

// jpegExif returns the EXIF data of a JPEG file, nil if there is none before its first scan.
func jpegExif(data []byte) []byte {
	const app1 = 0xE1
	for marker, body := range jpegSegments(data) {
		if marker == app1 && bytes.HasPrefix(body, []byte("Exif\x00\x00")) {
			return body
		}
	}
	return nil
}

// jpegSegments iterates over the segments of a JPEG file before its first scan, as far as they are whole.
func jpegSegments(data []byte) iter.Seq2[byte, []byte] {
	const (
		scan = 0xDA
		end  = 0xD9
	)
	return func(yield func(byte, []byte) bool) {
		for rest := data[min(2, len(data)):]; len(rest) >= 4 && rest[0] == 0xFF; {
			marker := rest[1]
			switch {
			case marker == 0xFF: // fill
				rest = rest[1:]
				continue
			case marker == 0x01 || marker >= 0xD0 && marker <= 0xD8: // no length
				rest = rest[2:]
				continue
			case marker == scan || marker == end:
				return
			}
			n := 2 + int(binary.BigEndian.Uint16(rest[2:]))
			if n > len(rest) || n < 4 || !yield(marker, rest[4:n]) {
				return
			}
			rest = rest[n:]
		}
	}
}

// pngExif returns the contents of a PNG file's eXIf chunk, nil if there is none.
func pngExif(data []byte) []byte {
	const signature, overhead = 8, 12 // a chunk's length, type and checksum
	for rest := data[min(signature, len(data)):]; len(rest) >= overhead; {
		n := uint64(binary.BigEndian.Uint32(rest))
		if n > uint64(len(rest)-overhead) {
			return nil
		}
		if string(rest[4:8]) == "eXIf" {
			return rest[8 : 8+n]
		}
		rest = rest[overhead+n:]
	}
	return nil
}

var (
	errAnimated = errors.New("animated WebP")
	errChunk    = fmt.Errorf("%w: a WebP chunk is cut off", ErrDecode)
)

// scanWebP goes through the chunks of a WebP file (RFC 9649). It returns the EXIF data, and an error if the file is
// animated, cut off, or holds a frame of another size than it announces.
func scanWebP(data []byte) (exif []byte, err error) {
	const fileHeader, chunkHeader = 12, 8
	var width, height uint32 // of the canvas, 0 if the file has no VP8X chunk
	for rest := data[fileHeader:]; len(rest) >= chunkHeader; {
		n := uint64(binary.LittleEndian.Uint32(rest[4:]))
		if n > uint64(len(rest)-chunkHeader) {
			return nil, errChunk
		}
		body := rest[chunkHeader : chunkHeader+n]
		switch string(rest[:4]) {
		case "VP8X":
			if n < 10 {
				return nil, errChunk
			}
			if body[0]&0x02 != 0 {
				return nil, errAnimated
			}
			width, height = 1+uint24(body[4:]), 1+uint24(body[7:])
		case "VP8 ", "VP8L":
			w, h, ok := frameSize(rest[3], body)
			if ok && width != 0 && (w != width || h != height) {
				return nil, fmt.Errorf("a WebP frame of %d x %d on a canvas of %d x %d", w, h, width, height)
			}
		case "EXIF":
			exif = body
		}
		n += n & 1 // chunks are padded to an even length
		rest = rest[min(chunkHeader+n, uint64(len(rest))):]
	}
	return exif, nil
}

func uint24(b []byte) uint32 { return uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 }

// frameSize returns the size of a lossy (kind ' ', RFC 6386 section 9.1) or lossless (kind 'L', RFC 9649 section 3.4)
// frame.
func frameSize(kind byte, body []byte) (width, height uint32, ok bool) {
	if kind == 'L' {
		if len(body) < 5 {
			return 0, 0, false
		}
		bits := binary.LittleEndian.Uint32(body[1:])
		return 1 + bits&0x3FFF, 1 + bits>>14&0x3FFF, true
	}
	if len(body) < 10 {
		return 0, 0, false
	}
	return uint32(binary.LittleEndian.Uint16(body[6:])) & 0x3FFF, uint32(binary.LittleEndian.Uint16(body[8:])) & 0x3FFF, true
}
