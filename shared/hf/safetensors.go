package hf

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"slices"
	"strings"
	"unicode/utf8"
)

// ErrDamaged is returned by OpenSafetensors and Open when a safetensors file breaks the rules of its format: cut,
// overlapping tensors, impossible sizes. The message names the file and, where there is one, the tensor.
var ErrDamaged = errors.New("damaged safetensors file")

// maxHeader is the most bytes that a header may have (safetensors, MAX_HEADER_SIZE in src/tensor.rs).
const maxHeader = 100_000_000

// lfsPointer begins the text that git leaves in place of a file that Git LFS has not fetched.
const lfsPointer = "version https://git-lfs"

// dtypeBits is the size of one element of each dtype of the format, in bits (safetensors, enum Dtype).
var dtypeBits = map[string]uint64{
	"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
	"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
	"I16": 16, "U16": 16, "F16": 16, "BF16": 16,
	"I32": 32, "U32": 32, "F32": 32,
	"I64": 64, "U64": 64, "F64": 64, "C64": 64,
}

// Tensor is one tensor of a safetensors file, row-major and little-endian.
type Tensor struct {
	DType string // as the file spells it: BF16, F32, I64, ...
	Shape []int  // elements along each axis; empty for a single number
	Data  []byte // a view into the file's mapping: read-only, valid until the file is closed, of any alignment
}

// Len is the number of elements.
func (t Tensor) Len() int {
	n := 1
	for _, d := range t.Shape {
		n *= d
	}
	return n
}

// Safetensors is an open safetensors file, mapped read-only. Its methods may be called from several goroutines.
type Safetensors struct {
	path     string
	file     *os.File
	mapping  mapping
	tensors  map[string]Tensor
	names    []string
	metadata map[string]string
}

// OpenSafetensors maps the file at path and checks its header: JSON, dtypes, shapes, and that the tensors fill the rest
// of the file without gap or overlap, as the format demands. Tensor data is not touched. The file must not be
// truncated while it is open. It returns an ErrDamaged or the error of the operating system, both with the path.
func OpenSafetensors(path string) (*Safetensors, error) {
	m, file, err := mapFile(path)
	if err != nil {
		return nil, err
	}
	tensors, metadata, err := parseSafetensors(m)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), m.close(), file.Close())
	}
	return &Safetensors{
		path:     path,
		file:     file,
		mapping:  m,
		tensors:  tensors,
		names:    slices.Sorted(maps.Keys(tensors)),
		metadata: metadata,
	}, nil
}

// Path is the file's path as it was given to OpenSafetensors.
func (s *Safetensors) Path() string { return s.path }

// Names returns the names of all tensors, sorted.
func (s *Safetensors) Names() []string { return slices.Clone(s.names) }

// Metadata returns the free-form strings of the header, or nil.
func (s *Safetensors) Metadata() map[string]string { return maps.Clone(s.metadata) }

// Tensor returns the tensor of that name. Its data is valid until Close.
func (s *Safetensors) Tensor(name string) (Tensor, bool) {
	t, ok := s.tensors[name]
	return t, ok
}

// Close unmaps the file. Tensors that were taken from it must not be used any more. Closing twice is harmless.
func (s *Safetensors) Close() error {
	m, f := s.mapping, s.file
	s.mapping, s.file, s.tensors, s.names = nil, nil, nil, nil
	if f == nil {
		return nil
	}
	return errors.Join(m.close(), f.Close())
}

// read copies the data of t, a tensor of the file or a part of one, to dst, past the mapping: large reads need neither page
// faults here nor addresses that will not be used again.
func (s *Safetensors) read(dst []byte, t Tensor) error {
	if len(dst) != len(t.Data) {
		panic(fmt.Sprintf("BUG: %d bytes for a tensor of %d", len(dst), len(t.Data)))
	}
	if len(dst) == 0 {
		return nil
	}
	if _, err := s.file.ReadAt(dst, int64(offset(s.mapping, t.Data))); err != nil {
		return fmt.Errorf("reading %d bytes: %w", len(dst), err)
	}
	return nil
}

// entry is the header's description of one tensor.
type entry struct {
	DType   *string   `json:"dtype"`
	Shape   *[]uint64 `json:"shape"`
	Offsets []uint64  `json:"data_offsets"`
}

// span is the place of one tensor behind the header, in bytes.
type span struct {
	name       string
	begin, end uint64
}

// parseSafetensors checks file, the whole content of a safetensors file, and returns its tensors as views into it and
// its metadata. Errors wrap ErrDamaged.
func parseSafetensors(file []byte) (map[string]Tensor, map[string]string, error) {
	header, data, err := splitHeader(file)
	if err != nil {
		return nil, nil, err
	}
	entries, metadata, err := decodeHeader(header)
	if err != nil {
		return nil, nil, err
	}
	spans := make([]span, 0, len(entries))
	shapes := make(map[string][]int, len(entries))
	for name, e := range entries {
		shape, err := checkEntry(name, e)
		if err != nil {
			return nil, nil, err
		}
		shapes[name] = shape
		spans = append(spans, span{name, e.Offsets[0], e.Offsets[1]})
	}
	if err := checkSpans(spans, uint64(len(data))); err != nil {
		return nil, nil, err
	}
	tensors := make(map[string]Tensor, len(entries))
	for _, s := range spans {
		tensors[s.name] = Tensor{
			DType: *entries[s.name].DType,
			Shape: shapes[s.name],
			Data:  data[s.begin:s.end:s.end],
		}
	}
	return tensors, metadata, nil
}

// splitHeader cuts file into the JSON header and the tensor data behind it.
func splitHeader(file []byte) (header, data []byte, err error) {
	if bytes.HasPrefix(file, []byte(lfsPointer)) {
		return nil, nil, fmt.Errorf("a Git LFS pointer lies in place of the weights, fetch them with git lfs pull: %w", ErrDamaged)
	}
	if len(file) < 8 {
		return nil, nil, fmt.Errorf("%d bytes are too few for a header: %w", len(file), ErrDamaged)
	}
	n := binary.LittleEndian.Uint64(file)
	rest := file[8:]
	switch {
	case n > maxHeader:
		return nil, nil, fmt.Errorf("the header would have %d bytes, more than %d: %w", n, maxHeader, ErrDamaged)
	case n > uint64(len(rest)):
		return nil, nil, fmt.Errorf("the header needs %d bytes but only %d follow, the file was cut: %w", n, len(rest), ErrDamaged)
	case n == 0 || rest[0] != '{':
		return nil, nil, fmt.Errorf("the header does not begin with {: %w", ErrDamaged)
	case !utf8.Valid(rest[:n]):
		return nil, nil, fmt.Errorf("the header is not UTF-8: %w", ErrDamaged)
	}
	return rest[:n], rest[n:], nil
}

// decodeHeader reads the JSON object of the header. Unlike json.Unmarshal it refuses a name that comes twice.
func decodeHeader(header []byte) (map[string]entry, map[string]string, error) {
	dec := json.NewDecoder(bytes.NewReader(header))
	if _, err := dec.Token(); err != nil {
		return nil, nil, fmt.Errorf("header: %w: %w", err, ErrDamaged)
	}
	entries := map[string]entry{}
	var metadata map[string]string
	for dec.More() {
		token, err := dec.Token()
		if err != nil {
			return nil, nil, fmt.Errorf("header: %w: %w", err, ErrDamaged)
		}
		name := token.(string) // a key of an object, or Token would have failed
		if name == "__metadata__" {
			if metadata != nil {
				return nil, nil, fmt.Errorf("__metadata__ comes twice in the header: %w", ErrDamaged)
			}
			metadata = map[string]string{}
			if err := dec.Decode(&metadata); err != nil {
				return nil, nil, fmt.Errorf("header: __metadata__: %w: %w", err, ErrDamaged)
			}
			continue
		}
		if _, twice := entries[name]; twice {
			return nil, nil, fmt.Errorf("tensor %s comes twice in the header: %w", name, ErrDamaged)
		}
		var e entry
		if err := dec.Decode(&e); err != nil {
			return nil, nil, fmt.Errorf("header: tensor %s: %w: %w", name, err, ErrDamaged)
		}
		entries[name] = e
	}
	if _, err := dec.Token(); err != nil {
		return nil, nil, fmt.Errorf("header: %w: %w", err, ErrDamaged)
	}
	if len(bytes.Trim(header[dec.InputOffset():], " ")) > 0 {
		return nil, nil, fmt.Errorf("the header goes on after its object: %w", ErrDamaged)
	}
	return entries, metadata, nil
}

// checkEntry checks that a tensor's bytes are what its dtype and shape ask for, and returns the shape.
func checkEntry(name string, e entry) ([]int, error) {
	if e.DType == nil || e.Shape == nil || len(e.Offsets) != 2 {
		return nil, fmt.Errorf("tensor %s lacks dtype, shape or two data_offsets: %w", name, ErrDamaged)
	}
	bits, ok := dtypeBits[*e.DType]
	if !ok {
		return nil, fmt.Errorf("tensor %s has the unknown dtype %q: %w", name, *e.DType, ErrDamaged)
	}
	shape := make([]int, len(*e.Shape))
	n := uint64(1)
	for i, d := range *e.Shape {
		if d > math.MaxInt64/64 || (d > 0 && n > math.MaxInt64/64/d) {
			return nil, fmt.Errorf("tensor %s: shape %v is too large: %w", name, *e.Shape, ErrDamaged)
		}
		n *= d
		shape[i] = int(d)
	}
	begin, end := e.Offsets[0], e.Offsets[1]
	if begin > end || n*bits%8 != 0 || end-begin != n*bits/8 {
		return nil, fmt.Errorf("tensor %s: %s of shape %v does not fit bytes %d to %d: %w",
			name, *e.DType, shape, begin, end, ErrDamaged)
	}
	return shape, nil
}

// checkSpans sorts spans and checks that they fill size bytes exactly.
func checkSpans(spans []span, size uint64) error {
	slices.SortFunc(spans, func(a, b span) int {
		return cmp.Or(cmp.Compare(a.begin, b.begin), cmp.Compare(a.end, b.end), strings.Compare(a.name, b.name))
	})
	at, last := uint64(0), ""
	for _, s := range spans {
		if s.begin < at {
			return fmt.Errorf("tensors %s and %s overlap: %w", last, s.name, ErrDamaged)
		}
		if s.begin > at {
			return fmt.Errorf("bytes %d to %d, before tensor %s, belong to no tensor: %w", at, s.begin, s.name, ErrDamaged)
		}
		at, last = s.end, s.name
	}
	if at > size {
		return fmt.Errorf("the tensors need %d bytes but only %d follow the header, the file was cut: %w", at, size, ErrDamaged)
	}
	if at < size {
		return fmt.Errorf("%d bytes after the last tensor belong to no tensor: %w", size-at, ErrDamaged)
	}
	return nil
}
