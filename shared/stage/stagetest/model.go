package stagetest

import (
	"encoding/json"
	"os"
	"slices"
	"testing"

	"trireme.dev/shared/engine"
	"trireme.dev/shared/engine/sample"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/hf"
	"trireme.dev/shared/kernel"
	"trireme.dev/shared/kv"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/model"
	"trireme.dev/shared/npu"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/wire"
)

// Model is the bundled model, opened for the test.
type Model struct {
	Config  model.Config
	Weights *model.Weights
	Compute kernel.Compute

	tb     testing.TB
	text   *engine.Text
	vision *engine.Encoder // made by Embed
}

func openModel(tb testing.TB) *Model {
	tb.Helper()
	f, err := hf.Open(Root("models/shapes-vl-moe"))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { f.Close() })
	m := &Model{Config: f.Config, tb: tb}
	if m.Weights, err = f.Weights(); err != nil {
		tb.Fatal(err)
	}
	if m.Compute, err = npu.Open(npu.Options{Threads: 1}); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { m.Compute.Close() })
	if m.text, err = engine.NewText(m.Config, []engine.NPU{{Compute: m.Compute, Weights: m.Weights}}, engine.Limits{Rows: 2048, Seqs: 8}); err != nil {
		tb.Fatal(err)
	}
	return m
}

// Case is one reference case of the bundled model: a prompt with its greedy answer.
type Case struct {
	Name   string   `json:"name"`
	Images []string `json:"images"` // file names
	Input  []int32  `json:"input_ids"`
	Output []int32  `json:"output_ids"`
	Grids  [][3]int `json:"image_grid_thw"`
}

// Cases are the reference cases.
func Cases(tb testing.TB) []Case {
	tb.Helper()
	data, err := os.ReadFile(Root("shared/testdata/golden/shapes-vl-moe/cases.json"))
	if err != nil {
		tb.Fatal(err)
	}
	var cases []Case
	if err := json.Unmarshal(data, &cases); err != nil {
		tb.Fatal(err)
	}
	if len(cases) < 24 {
		tb.Fatalf("%d reference cases", len(cases))
	}
	return cases
}

// Greedy asks for at most tokens greedily, with no end before.
func (m *Model) Greedy(prompt []int32, tokens int) *wire.Spec {
	return &wire.Spec{Model: m.Config.Digest, Prompt: prompt, Choices: 1, Sampling: wire.Sampling{
		MaxTokens: tokens, TopP: 1, Repetition: 1, Logprobs: -1,
	}}
}

// Random asks for at most tokens drawn at random from a seed, with penalties that need the answer so far.
func (m *Model) Random(prompt []int32, tokens, choices int) *wire.Spec {
	s := m.Greedy(prompt, tokens)
	s.Choices = choices
	s.Sampling.Temperature, s.Sampling.TopP, s.Sampling.Seed = 1.5, 0.95, 7
	s.Sampling.Frequency, s.Sampling.Logprobs = 0.1, 2
	return s
}

// Sequence is a request's choice as the reference computes it, alone and the prompt in one piece.
type Sequence struct {
	IDs      []int32
	Logprobs []wire.Logprob // nil unless asked for
	Finish   wire.Finish
	Blocks   [][]float32 // KV of every token but the last
}

// Answer computes a choice of a request alone. mm holds the pictures' embeddings, each [levels, tokens, hidden].
func (m *Model) Answer(spec *wire.Spec, choice int, mm ...[]float32) Sequence {
	m.tb.Helper()
	out, logits := m.prompt(spec, m.blocks(len(spec.Prompt)+spec.Sampling.MaxTokens), mm)
	_, delta := m.positions(spec)
	smp := sample.New(stage.SampleParams(&spec.Sampling, choice), nil, spec.Prompt, nil)
	for {
		n := len(out.IDs)
		rec, lp, err := stage.Draw("the reference", smp, &spec.Sampling, logits, n)
		if err != nil {
			m.tb.Fatal(err)
		}
		out.IDs, out.Logprobs = append(out.IDs, rec.Token), append(out.Logprobs, lp...)
		if out.Finish = stage.FinishOf(&spec.Sampling, n, rec.Token); out.Finish != wire.FinishNone {
			return out
		}
		got, err := m.text.Forward([]engine.Seq{{
			Tokens: []int32{rec.Token}, Pos: len(spec.Prompt) + n, Delta: delta, Blocks: out.Blocks, Want: true,
		}})
		if err != nil {
			m.tb.Fatal(err)
		}
		logits = got[0]
	}
}

// Prompt computes a prompt and returns KV and nothing else.
func (m *Model) Prompt(spec *wire.Spec, mm ...[]float32) [][]float32 {
	m.tb.Helper()
	s, _ := m.prompt(spec, m.blocks(len(spec.Prompt)), mm)
	return s.Blocks
}

// prompt computes a prompt in one piece.
func (m *Model) prompt(spec *wire.Spec, blocks [][]float32, mm [][]float32) (Sequence, []float32) {
	m.tb.Helper()
	rope, _ := m.positions(spec)
	seq := engine.Seq{Tokens: spec.Prompt, Rope: rope, Blocks: blocks, Want: true}
	for i, all := range mm {
		p := spec.Pictures[i]
		tokens := engine.Grid{T: p.Grid[0], H: p.Grid[1], W: p.Grid[2]}.Tokens(m.Config.Vision.Merge)
		v := engine.Visual{Row: p.Offset, Rows: tokens}
		for plane := range slices.Chunk(all, tokens*m.Config.Text.Hidden) {
			v.Planes = append(v.Planes, plane)
		}
		seq.Visual = append(seq.Visual, v)
	}
	logits, err := m.text.Forward([]engine.Seq{seq})
	if err != nil {
		m.tb.Fatal(err)
	}
	return Sequence{Blocks: blocks}, logits[0]
}

func (m *Model) positions(spec *wire.Spec) ([][3]int32, int) {
	var grids []engine.Grid
	for _, p := range spec.Pictures {
		grids = append(grids, engine.Grid{T: p.Grid[0], H: p.Grid[1], W: p.Grid[2]})
	}
	return engine.Positions(spec.Prompt, grids, m.Config.Vision)
}

func (m *Model) alloc(n int) []float32 {
	x, err := m.Compute.Alloc(n)
	if err != nil {
		m.tb.Fatal(err)
	}
	return x
}

func (m *Model) blocks(positions int) [][]float32 {
	blocks := make([][]float32, kv.Blocks(positions))
	for i := range blocks {
		blocks[i] = m.alloc(m.Config.Text.BlockFloats())
	}
	return blocks
}

// Spec encodes a spec as messages carry it: inline, or by handle.
func (r *Rig) Spec(req wire.Request, spec *wire.Spec) (inline []byte, handle *mem.Handle) {
	r.tb.Helper()
	data, err := wire.MarshalSpec(spec)
	if err != nil {
		r.tb.Fatal(err)
	}
	if len(data) <= wire.MaxInline {
		return data, nil
	}
	h := r.Put(req, mem.KindSpec, data)
	return nil, &h
}

// Prefilled does what a prefill does for one choice of a text request, up to its decode message, which it returns:
// KV in the HMM's memory and a token log with the first token.
func (r *Rig) Prefilled(req wire.Request, spec *wire.Spec, choice int) wire.Decode {
	r.tb.Helper()
	m := r.Model
	shape := kv.LogShape{
		Request: req.ID, Attempt: req.Attempt, Choice: choice, Prompt: len(spec.Prompt), MaxTokens: spec.Sampling.MaxTokens,
		MaxSlabs: kv.Slabs(len(spec.Prompt)+spec.Sampling.MaxTokens) + 2, Top: max(spec.Sampling.Logprobs, 0),
	}
	specs := []hbm.Spec{{Kind: mem.KindLog, NPU: r.HBM.NPUs()[0], Bytes: shape.Bytes(), Ref: stage.Ref(req)}}
	for range kv.Slabs(len(spec.Prompt) + 1) {
		specs = append(specs, hbm.Spec{Kind: mem.KindKV, NPU: r.HBM.NPUs()[0], Bytes: kv.SlabBytes(&m.Config.Text), Ref: stage.Ref(req)})
	}
	objs, err := r.HBM.Alloc(r.tb.Context(), specs...)
	if err != nil {
		r.tb.Fatal(err)
	}
	defer r.Free(objs...)
	log, err := kv.CreateLog(objs[0].Bytes(), shape, 1)
	if err != nil {
		r.tb.Fatal(err)
	}
	seq := kv.NewSequence(&m.Config.Text, log)
	for _, o := range objs[1:] {
		if err := seq.AddSlab(o); err != nil {
			r.tb.Fatal(err)
		}
	}
	if err := seq.Grow(len(spec.Prompt)); err != nil {
		r.tb.Fatal(err)
	}
	_, logits := m.prompt(spec, seq.Blocks, nil)
	seq.Seal(0, len(spec.Prompt))
	smp := sample.New(stage.SampleParams(&spec.Sampling, choice), nil, spec.Prompt, nil)
	rec, _, err := stage.Draw("the reference", smp, &spec.Sampling, logits, 0)
	if err != nil {
		r.tb.Fatal(err)
	}
	if err := seq.Append(rec); err != nil {
		r.tb.Fatal(err)
	}
	d := wire.Decode{Request: req, Choice: choice, Log: objs[0].Handle()}
	d.Inline, d.Spec = r.Spec(req, spec)
	return d
}
