package stagetest

import (
	"crypto/sha256"
	"os"
	"time"
	"unsafe"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/engine"
	"trireme.dev/shared/imageprep"
	"trireme.dev/shared/wire"
)

// Picture is the content of a reference case's picture.
func (m *Model) Picture(file string) []byte {
	m.tb.Helper()
	data, err := os.ReadFile(Root("shared/testdata/golden/shapes-vl-moe/" + file))
	if err != nil {
		m.tb.Fatal(err)
	}
	return data
}

// Spec asks for a reference case's answer, greedily, and returns its pictures' embeddings, [levels, tokens, hidden] each.
func (m *Model) Spec(c *Case) (spec *wire.Spec, mm [][]float32) {
	m.tb.Helper()
	spec = m.Greedy(c.Input, 320)
	spec.Sampling.Stop = []int32{621, 619} // eos_token_id of generation_config.json
	var grids []engine.Grid
	for _, g := range c.Grids {
		grids = append(grids, engine.Grid{T: g[0], H: g[1], W: g[2]})
	}
	spans, err := engine.Spans(c.Input, grids, m.Config.Vision)
	if err != nil {
		m.tb.Fatal(err)
	}
	for i, file := range c.Images {
		data := m.Picture(file)
		spec.Pictures = append(spec.Pictures, wire.Picture{Offset: spans[i].Start, Grid: c.Grids[i], Content: sha256.Sum256(data)})
		mm = append(mm, m.Embed(data, grids[i]))
	}
	return spec, mm
}

// Embed computes a picture's embeddings, [levels, tokens, hidden].
func (m *Model) Embed(data []byte, grid engine.Grid) []float32 {
	m.tb.Helper()
	prep, err := imageprep.LoadConfig(Root("models/shapes-vl-moe"))
	if err != nil {
		m.tb.Fatal(err)
	}
	if m.vision == nil {
		if m.vision, err = engine.NewEncoder(m.Config, m.Weights, m.Compute, 1024); err != nil {
			m.tb.Fatal(err)
		}
	}
	pixels := make([]float32, grid.Patches()*prep.PatchDim())
	if got, err := prep.Patches(data, pixels); err != nil || got != imageprep.Grid(grid) {
		m.tb.Fatalf("patches of grid %v, want %v: %v", got, grid, err)
	}
	out := m.alloc(m.vision.Floats(grid))
	if err := m.vision.Encode(out, pixels, grid); err != nil {
		m.tb.Fatal(err)
	}
	return out
}

// Bytes views floats as bytes, in the machine's order, as they lie in device memory.
func Bytes(f []float32) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(f))), len(f)*4)
}

// Pull takes n messages of a stage's queue, as the next stage does, and acknowledges them.
func (r *Rig) Pull(role string, n int) []*bus.Delivery {
	r.tb.Helper()
	c, err := r.Bus.Consumer(r.tb.Context(), role)
	if err != nil {
		r.tb.Fatal(err)
	}
	var got []*bus.Delivery
	for deadline := time.Now().Add(patience); len(got) < n; {
		batch, err := c.Next(r.tb.Context(), n-len(got), time.Second)
		if err != nil {
			r.tb.Fatal(err)
		}
		for _, d := range batch {
			if err := d.Ack(r.tb.Context()); err != nil {
				r.tb.Fatal(err)
			}
		}
		got = append(got, batch...)
		if time.Now().After(deadline) {
			r.tb.Fatalf("after %v %d messages of %d of the %s queue", patience, len(got), n, role)
		}
	}
	return got
}
