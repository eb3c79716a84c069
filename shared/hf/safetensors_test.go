package hf

import (
	"encoding/binary"
	"errors"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// file returns a safetensors file with that header and n bytes of data.
func file(header string, n int) []byte {
	b := binary.LittleEndian.AppendUint64(nil, uint64(len(header)))
	return append(append(b, header...), make([]byte, n)...)
}

const (
	one  = `"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}`
	next = `"b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]}`
)

var badFiles = []struct {
	name string
	file []byte
	text string
}{
	{"empty", nil, "0 bytes are too few"},
	{"seven bytes", make([]byte, 7), "7 bytes are too few"},
	{"no header", make([]byte, 8), "does not begin with {"},
	{"header over the limit", binary.LittleEndian.AppendUint64(nil, maxHeader+1), "more than 100000000"},
	{"header length overflows", binary.LittleEndian.AppendUint64(nil, math.MaxUint64), "more than 100000000"},
	{"header longer than the file", file("{}", 0)[:9], "needs 2 bytes but only 1 follow"},
	{"not an object", file("[]", 0), "does not begin with {"},
	{"not UTF-8", file("{\"\xff\":{}}", 0), "not UTF-8"},
	{"not JSON", file(`{"a":}`, 0), "invalid character"},
	{"unfinished", file(`{`+one, 24), "EOF"},
	{"more after the object", file(`{} {}`, 0), "goes on after its object"},
	{"name twice", file(`{`+one+`,`+one+`}`, 24), "tensor a comes twice"},
	{"metadata twice", file(`{"__metadata__":{},"__metadata__":{}}`, 0), "__metadata__ comes twice"},
	{"metadata not of strings", file(`{"__metadata__":{"a":1}}`, 0), "__metadata__: json"},
	{"tensor is a number", file(`{"a":1}`, 0), "tensor a: json"},
	{"no dtype", file(`{"a":{"shape":[1],"data_offsets":[0,4]}}`, 4), "tensor a lacks dtype"},
	{"no shape", file(`{"a":{"dtype":"F32","data_offsets":[0,4]}}`, 4), "tensor a lacks dtype, shape"},
	{"one offset", file(`{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}`, 4), "two data_offsets"},
	{"three offsets", file(`{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}}`, 4), "two data_offsets"},
	{"unknown dtype", file(`{"a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}}`, 4), `unknown dtype "F33"`},
	{"negative size", file(`{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}`, 4), "tensor a: json"},
	{"fractional size", file(`{"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}}`, 4), "tensor a: json"},
	{"shape overflows", file(`{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}`, 4), "too large"},
	{"shape overflows after zero", file(`{"a":{"dtype":"F32","shape":[0,9223372036854775807],"data_offsets":[0,0]}}`, 0), "too large"},
	{"bytes do not fit the shape", file(`{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}`, 4), "F32 of shape [2] does not fit bytes 0 to 4"},
	{"offsets fall", file(`{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}`, 4), "does not fit bytes 4 to 0"},
	{"half a byte", file(`{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}`, 1), "does not fit bytes 0 to 1"},
	{"overlap", file(`{`+one+`,"b":{"dtype":"U8","shape":[4],"data_offsets":[20,24]}}`, 24), "tensors a and b overlap"},
	{"same bytes", file(`{`+one+`,"b":{"dtype":"U8","shape":[24],"data_offsets":[0,24]}}`, 24), "tensors a and b overlap"},
	{"hole", file(`{`+one+`,"b":{"dtype":"U8","shape":[4],"data_offsets":[25,29]}}`, 29), "bytes 24 to 25, before tensor b, belong to no tensor"},
	{"hole at the start", file(`{"b":{"dtype":"U8","shape":[4],"data_offsets":[1,5]}}`, 5), "bytes 0 to 1, before tensor b"},
	{"cut", file(`{`+one+`}`, 20), "need 24 bytes but only 20 follow the header, the file was cut"},
	{"too long", file(`{`+one+`}`, 25), "1 bytes after the last tensor belong to no tensor"},
}

func TestBadSafetensors(t *testing.T) {
	for _, tt := range badFiles {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "x.safetensors")
			if err := os.WriteFile(path, tt.file, 0o644); err != nil {
				t.Fatal(err)
			}
			_, err := OpenSafetensors(path)
			if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), tt.text) || !strings.HasPrefix(err.Error(), path+": ") {
				t.Errorf("error %v, want one that names the file and says: %s", err, tt.text)
			}
		})
	}
}

func TestGoodSafetensors(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.safetensors")
	header := `{"__metadata__":{"format":"pt"},` + next + `,` + one +
		`,"none":{"dtype":"I64","shape":[0,7],"data_offsets":[32,32]},"n":{"dtype":"I64","shape":[],"data_offsets":[32,40]}}   `
	b := file(header, 40)
	data := b[len(b)-40:]
	binary.LittleEndian.PutUint32(data[20:], math.Float32bits(1.5))
	binary.LittleEndian.PutUint16(data[30:], uint16(math.Float32bits(-2)>>16))
	binary.LittleEndian.PutUint64(data[32:], math.MaxUint64)
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	s, err := OpenSafetensors(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := s.Names(); !slices.Equal(got, []string{"a", "b", "n", "none"}) {
		t.Errorf("names %q", got)
	}
	if s.Metadata()["format"] != "pt" || s.Path() != path {
		t.Errorf("metadata %q, path %q", s.Metadata(), s.Path())
	}
	a, _ := s.Tensor("a")
	if got, err := a.Float32s(); err != nil || !slices.Equal(got, []float32{0, 0, 0, 0, 0, 1.5}) || !slices.Equal(a.Shape, []int{2, 3}) {
		t.Errorf("a of shape %v is %v, %v", a.Shape, got, err)
	}
	bb, _ := s.Tensor("b")
	if got, err := bb.Float32s(); err != nil || !slices.Equal(got, []float32{0, 0, 0, -2}) {
		t.Errorf("b is %v, %v", got, err)
	}
	n, _ := s.Tensor("n")
	if got, err := n.Ints(); err != nil || !slices.Equal(got, []int{-1}) {
		t.Errorf("n is %v, %v", got, err)
	}
	none, _ := s.Tensor("none")
	if got, err := none.Ints(); err != nil || len(got) != 0 {
		t.Errorf("none is %v, %v", got, err)
	}
	if _, err := n.Float32s(); !errors.Is(err, ErrDType) {
		t.Errorf("integers as float32: %v", err)
	}
	if _, err := a.Ints(); !errors.Is(err, ErrDType) {
		t.Errorf("float32 as integers: %v", err)
	}
	if _, ok := s.Tensor("c"); ok {
		t.Error("there is a tensor c")
	}
	for range 2 {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestHalf checks binary16 at the edges of its ranges (IEEE 754-2019, 3.6).
func TestHalf(t *testing.T) {
	for h, want := range map[uint16]float32{
		0x0000: 0, 0x3c00: 1, 0xc000: -2, 0x3555: 0.333251953125, 0x7bff: 65504, 0x0400: 0x1p-14,
		0x0001: 0x1p-24, 0x03ff: 1023 * 0x1p-24, 0x8001: -0x1p-24, 0x7c00: float32(math.Inf(1)), 0xfc00: float32(math.Inf(-1)),
	} {
		if got := halfToFloat32(h); got != want {
			t.Errorf("%#04x is %g, want %g", h, got, want)
		}
	}
	if !math.Signbit(float64(halfToFloat32(0x8000))) || !math.IsNaN(float64(halfToFloat32(0x7e00))) {
		t.Error("minus zero or not a number is lost")
	}
}

// FuzzSafetensors checks that whatever parses has tensors that lie in the file, apart from each other, and fill it.
func FuzzSafetensors(f *testing.F) {
	for _, bad := range badFiles {
		f.Add(bad.file)
	}
	f.Add(file(`{}`, 0))
	f.Add(file(`{`+one+`,`+next+`}  `, 32))
	f.Add(file(`{"__metadata__":{"format":"pt"},`+next+`,`+one+`}`, 32))
	f.Fuzz(func(t *testing.T, b []byte) {
		tensors, _, err := parseSafetensors(b)
		if err != nil {
			if !errors.Is(err, ErrDamaged) {
				t.Fatalf("%v does not wrap ErrDamaged", err)
			}
			return
		}
		header := int(binary.LittleEndian.Uint64(b))
		owner := make([]int, len(b)-8-header)
		for name, x := range tensors {
			if uint64(x.Len())*dtypeBits[x.DType] != uint64(len(x.Data))*8 {
				t.Errorf("%s: %d elements of %s in %d bytes", name, x.Len(), x.DType, len(x.Data))
			}
			if len(x.Data) == 0 {
				continue
			}
			at := offset(b, x.Data) - 8 - header
			for i := range x.Data {
				owner[at+i]++
			}
		}
		for i, n := range owner {
			if n != 1 {
				t.Fatalf("byte %d of the data belongs to %d tensors", i, n)
			}
		}
	})
}
