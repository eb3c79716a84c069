package engine_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"trireme.dev/shared/engine"
	"trireme.dev/shared/engine/sample"
	"trireme.dev/shared/hf"
	"trireme.dev/shared/kernel"
	"trireme.dev/shared/model"
)

const (
	shapesModel  = "../../models/shapes-vl-moe"
	shapesGolden = "../testdata/golden/shapes-vl-moe"
	qwen3Moe     = "../testdata/families/qwen3_moe"
)

// goldenCase is one entry of cases.json, or of the golden.json of a family.
type goldenCase struct {
	Name   string   `json:"name"`
	Images []string `json:"images"`
	Input  []int32  `json:"input_ids"`
	Output []int32  `json:"output_ids"`
	Grids  [][3]int `json:"image_grid_thw"`
}

func (c *goldenCase) grids() []engine.Grid {
	var out []engine.Grid
	for _, g := range c.Grids {
		out = append(out, engine.Grid{T: g[0], H: g[1], W: g[2]})
	}
	return out
}

// readJSON decodes a file into out.
func readJSON(t testing.TB, path string, out any) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, out); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
}

// shapesCases returns the golden cases of the bundled model.
func shapesCases(t testing.TB) []goldenCase {
	t.Helper()
	var cases []goldenCase
	readJSON(t, filepath.Join(shapesGolden, "cases.json"), &cases)
	if len(cases) != 24 {
		t.Fatalf("%d golden cases, want 24", len(cases))
	}
	return cases
}

// tensors is an open golden safetensors file.
type tensors struct {
	t testing.TB
	f *hf.Safetensors
}

// openTensors opens a golden file, or returns false where a case has none.
func openTensors(t testing.TB, path string) (tensors, bool) {
	t.Helper()
	if _, err := os.Stat(path); os.IsNotExist(err) {
		return tensors{}, false
	}
	f, err := hf.OpenSafetensors(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return tensors{t, f}, true
}

// get returns a float32 tensor, or false where the case has none of that name.
func (g tensors) get(name string) ([]float32, bool) {
	g.t.Helper()
	tensor, ok := g.f.Tensor(name)
	if !ok {
		return nil, false
	}
	v, err := tensor.Float32s()
	if err != nil {
		g.t.Fatalf("%s: %v", name, err)
	}
	return v, true
}

// rig is a model on a backend, with KV blocks of its own.
type rig struct {
	t    testing.TB
	cfg  model.Config
	w    *model.Weights
	c    kernel.Compute
	text *engine.Text
	enc  *engine.Encoder
}

// newRig opens the model in dir on a backend.
func newRig(t testing.TB, dir string, c kernel.Compute, lim engine.Limits) *rig {
	t.Helper()
	f, err := hf.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	w, err := f.Weights()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		f.Close()
	})
	r := &rig{t: t, cfg: f.Config, w: w, c: c}
	if r.text, err = engine.NewText(r.cfg, []engine.NPU{{Compute: c, Weights: w}}, lim); err != nil {
		t.Fatal(err)
	}
	if r.cfg.Vision != nil {
		if r.enc, err = engine.NewEncoder(r.cfg, w, c, 1024); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

// alloc takes device memory, which lives as long as the rig.
func (r *rig) alloc(n int) []float32 {
	r.t.Helper()
	x, err := r.c.Alloc(n)
	if err != nil {
		r.t.Fatal(err)
	}
	return x
}

// blocks returns fresh KV blocks for n positions.
func (r *rig) blocks(n int) [][]float32 {
	var out [][]float32
	for at := 0; at < n; at += model.BlockTokens {
		out = append(out, r.alloc(r.cfg.Text.BlockFloats()))
	}
	return out
}

// sequence is a request as the stages would run it.
type sequence struct {
	prompt  []int32
	pos     [][3]int32
	delta   int
	visual  []engine.Visual // over the whole prompt
	blocks  [][]float32
	sampler *sample.Sampler
	done    int     // tokens in the KV blocks
	output  []int32 // generated
}

// start prepares a request; planes holds the encoder's output of each picture (device memory).
func (r *rig) start(prompt []int32, grids []engine.Grid, planes [][]float32, p sample.Params, room int) *sequence {
	r.t.Helper()
	s := &sequence{prompt: prompt, sampler: sample.New(p, nil, prompt, nil), blocks: r.blocks(len(prompt) + room)}
	s.pos, s.delta = engine.Positions(prompt, grids, r.cfg.Vision)
	spans, err := engine.Spans(prompt, grids, r.cfg.Vision)
	if err != nil {
		r.t.Fatal(err)
	}
	for i, span := range spans {
		s.visual = append(s.visual, engine.Visual{Row: span.Start, Rows: span.Len, Planes: r.split(planes[i])})
	}
	return s
}

// split cuts an encoder output [levels, tokens, Out] into its planes.
func (r *rig) split(out []float32) [][]float32 {
	n := len(out) / r.cfg.Vision.Levels()
	var planes [][]float32
	for i := range r.cfg.Vision.Levels() {
		planes = append(planes, out[i*n:(i+1)*n])
	}
	return planes
}

// chunk is the next part of s: at most n tokens of the prompt, or the last generated token.
func (r *rig) chunk(s *sequence, n int) engine.Seq {
	if s.done >= len(s.prompt) {
		return engine.Seq{
			Tokens: s.output[len(s.output)-1:], Pos: s.done, Delta: s.delta, Blocks: s.blocks, Want: true,
		}
	}
	end := min(s.done+n, len(s.prompt))
	q := engine.Seq{
		Tokens: s.prompt[s.done:end], Pos: s.done, Rope: s.pos[s.done:end], Blocks: s.blocks, Want: end == len(s.prompt),
	}
	hidden := r.cfg.Text.Hidden
	for _, v := range s.visual {
		from, to := max(v.Row, s.done), min(v.Row+v.Rows, end)
		if from >= to {
			continue
		}
		part := engine.Visual{Row: from - s.done, Rows: to - from}
		for _, p := range v.Planes {
			part.Planes = append(part.Planes, p[(from-v.Row)*hidden:(to-v.Row)*hidden])
		}
		q.Visual = append(q.Visual, part)
	}
	return q
}

// step runs one batch of the sequences' next chunks and takes their tokens.
func (r *rig) step(chunk int, seqs ...*sequence) [][]float32 {
	r.t.Helper()
	batch := make([]engine.Seq, len(seqs))
	for i, s := range seqs {
		batch[i] = r.chunk(s, chunk)
	}
	logits, err := r.text.Forward(batch)
	if err != nil {
		r.t.Fatal(err)
	}
	for i, s := range seqs {
		s.done += len(batch[i].Tokens)
		if logits[i] != nil {
			id, _, _ := s.sampler.Next(logits[i], len(s.output))
			s.output = append(s.output, id)
		}
	}
	return logits
}
