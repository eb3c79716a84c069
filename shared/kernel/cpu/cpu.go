// Package cpu does the arithmetic of a host NPU: AVX-512 and AVX2 assembly on amd64, plain Go elsewhere, spread over
// worker threads. All of them sum in the one order that the interface vector states, so they share a Digest and give
// bit-equal results for any instruction set, number of threads, batch and chunking. It is not the oracle (kernel/ref
// is) and knows nothing of models or of where memory comes from.
package cpu

import (
	"errors"
	"fmt"
	"math"
	"runtime"

	"trireme.dev/shared/kernel"
	"trireme.dev/shared/kernel/check"
	"trireme.dev/shared/model"
)

// Digest is what Compute.Digest returns here, for every ISA: float32 arithmetic with fused multiply-add in the order
// of summation of version 1. Any change of a result's bits must change it.
const Digest = "cpu-f32-v1"

// ErrNotSupported is wrapped by the error of New when this machine lacks the instruction set asked for.
var ErrNotSupported = errors.New("instruction set not supported")

// ISA is an instruction set. The choice changes speed only, never a result.
type ISA int

// The instruction sets.
const (
	Auto     ISA = iota // the fastest that this machine has
	Portable            // plain Go, with fused multiply-add emulated in float64; slow
	AVX2                // amd64 with AVX2 and FMA
	AVX512              // amd64 with AVX-512 F, BW, DQ and VL
)

// String returns the name of i.
func (i ISA) String() string {
	switch i {
	case Auto:
		return "auto"
	case Portable:
		return "portable"
	case AVX2:
		return "avx2"
	case AVX512:
		return "avx512"
	}
	return fmt.Sprintf("ISA(%d)", int(i))
}

// Options choose how to compute, never what.
type Options struct {
	Threads int // goroutines that compute, the caller's included; 0: GOMAXPROCS
	ISA     ISA
}

// compute implements kernel.Compute. The tasks are kept here so that a call allocates nothing.
type compute struct {
	vec     vector
	pool    *pool
	workers []worker // [Threads]
	memory  memory

	linear   linearTask
	attend   attendTask
	segment  segmentTask
	experts  expertsTask
	rows     rowsTask
	rotation rotateTask
	scratch  routing
}

// worker is the scratch of one thread.
type worker struct {
	tile    tile
	short   [tileRows][tileOutputs]float32 // where a tile of fewer than four outputs lands
	xTail   [tileRows * lanes]float32      // last elements of the rows of x, zero-padded
	wTail   [tileOutputs * lanes]model.BF16
	queries []query
	acc     []float32 // [len(queries), dim], of queries
	sum     []float32 // [hidden], of Combine
}

// New returns a Compute for this machine. It fails with ErrNotSupported when the machine lacks options.ISA.
func New(options Options) (kernel.Compute, error) {
	if options.Threads < 0 {
		return nil, fmt.Errorf("cpu kernels: %d threads", options.Threads)
	}
	vec, err := choose(options.ISA)
	if err != nil {
		return nil, fmt.Errorf("cpu kernels: %s: %w", options.ISA, err)
	}
	n := options.Threads
	if n == 0 {
		n = runtime.GOMAXPROCS(0)
	}
	return &compute{vec: vec, pool: newPool(n), workers: make([]worker, n)}, nil
}

func (c *compute) Digest() string { return Digest }

// Close ends the worker threads and gives scratch back. It may be called more than once.
func (c *compute) Close() error {
	c.pool.close()
	c.memory.close()
	return nil
}

func (c *compute) Upload(dst, src []float32) {
	check.Same("Upload", dst, src)
	copy(dst, src)
}

func (c *compute) Download(dst, src []float32) {
	check.Same("Download", dst, src)
	copy(dst, src)
}

func (c *compute) Copy(dst, src []float32) {
	check.Same("Copy", dst, src)
	copy(dst, src)
}

func (c *compute) Fetch(dst []float32, to []int32, src []float32, from []int32, width int) {
	check.Fetch(dst, to, src, from, width)
	for i, row := range to {
		copy(dst[int(row)*width:][:width], src[int(from[i])*width:])
	}
}

// Sync has nothing to wait for: every operation returns when it is done.
func (c *compute) Sync() {}

func (c *compute) Embed(out []float32, table model.Matrix, ids []int32) {
	check.Embed(out, table, ids)
	for i, id := range ids {
		to := out[i*table.Cols:][:table.Cols]
		for j, w := range table.Data[int(id)*table.Cols:][:table.Cols] {
			to[j] = widen(w)
		}
	}
}

// one is the weight of a plain sum in vector.accumulate.
var one = []float32{1}

func (c *compute) Add(dst, src []float32) {
	check.Same("Add", dst, src)
	c.vec.accumulate(dst, src, len(dst), one, 1)
}

// widen converts a bfloat16 to the float32 of the same value.
func widen(w model.BF16) float32 { return math.Float32frombits(uint32(w) << 16) }
