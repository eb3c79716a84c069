package engine_test

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"trireme.dev/shared/engine"
	"trireme.dev/shared/engine/sample"
	"trireme.dev/shared/imageprep"
	"trireme.dev/shared/kernel"
	"trireme.dev/shared/kernel/cpu"
	"trireme.dev/shared/kernel/ref"
)

// tolerance is how far a tensor may lie from the golden one, absolute: the bar of the project for float32 activations
// over bf16 weights, against transformers on a CPU in float32.
const tolerance = 5e-4

// backends are the kernel sets that must reproduce the goldens.
var backends = map[string]func() kernel.Compute{
	"ref": ref.New,
	"cpu": serving,
}

// serving is the kernel set that serves on this machine, and that benchmarks measure.
func serving() kernel.Compute {
	c, err := cpu.New(cpu.Options{})
	if err != nil {
		panic("no kernels for this machine: " + err.Error())
	}
	return c
}

// near fails the test when got is not within tolerance of want.
func near(t *testing.T, name string, got, want []float32) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("%s: %d values, want %d", name, len(got), len(want))
		return
	}
	worst := 0.0
	for i := range got {
		d := math.Abs(float64(got[i]) - float64(want[i]))
		if math.IsNaN(d) {
			d = math.Inf(1)
		}
		worst = max(worst, d)
	}
	if worst > tolerance {
		t.Errorf("%s: off by %.2g, tolerance %.2g", name, worst, tolerance)
	}
}

// TestGoldenTensors compares every tensor of the golden cases that have them: the encoder's output from the golden
// pixel values, then router logits and logits of every prompt token.
func TestGoldenTensors(t *testing.T) {
	for name, backend := range backends {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, shapesModel, backend(), engine.Limits{Rows: 128, Seqs: 128})
			found := 0
			for _, c := range shapesCases(t) {
				g, ok := openTensors(t, filepath.Join(shapesGolden, c.Name+".safetensors"))
				if !ok {
					continue
				}
				found++
				t.Run(c.Name, func(t *testing.T) { compareTensors(t, r, &c, g) })
			}
			if found < 4 {
				t.Errorf("golden tensors of %d cases", found)
			}
		})
	}
}

func compareTensors(t *testing.T, r *rig, c *goldenCase, g tensors) {
	var planes [][]float32
	if len(c.Grids) > 0 {
		out := r.encodeGolden(t, c, g)
		planes = append(planes, out)
		host := make([]float32, len(out))
		r.c.Download(host, out)
		for i, plane := range r.split(host) {
			name := "image_embeds"
			if i > 0 {
				name = fmt.Sprintf("deepstack_%d", i-1)
			}
			want, ok := g.get(name)
			if !ok {
				t.Fatalf("no golden %s", name)
			}
			near(t, name, plane, want)
		}
	}
	seen := 0
	r.text.Observe(func(layer int, logits []float32) {
		if want, ok := g.get(fmt.Sprintf("router_logits_%d", layer)); ok {
			near(t, fmt.Sprintf("router_logits_%d", layer), logits, want)
			seen++
		}
	})
	defer r.text.Observe(nil)
	s := r.start(c.Input, c.grids(), planes, sample.Params{}, 0)
	q := r.chunk(s, len(c.Input))
	q.All = true
	logits, err := r.text.Forward([]engine.Seq{q})
	if err != nil {
		t.Fatal(err)
	}
	want, ok := g.get("logits")
	if !ok {
		t.Fatal("no golden logits")
	}
	near(t, "logits", logits[0], want)
	if r.cfg.Vision != nil && seen != r.cfg.Text.Layers {
		t.Errorf("router logits of %d layers, want %d", seen, r.cfg.Text.Layers)
	}
}

// encodeGolden runs the encoder on the golden pixel values of a case with one picture.
func (r *rig) encodeGolden(t *testing.T, c *goldenCase, g tensors) []float32 {
	t.Helper()
	pixels, ok := g.get("pixel_values")
	if !ok {
		t.Fatal("no golden pixel values")
	}
	grid := c.grids()[0]
	out := r.alloc(r.enc.Floats(grid))
	if err := r.enc.Encode(out, pixels, grid); err != nil {
		t.Fatal(err)
	}
	return out
}

// TestGoldenAnswers generates the greedy answer of each golden case, pictures from their files, and compares every token.
func TestGoldenAnswers(t *testing.T) {
	processor, err := imageprep.LoadConfig(shapesModel)
	if err != nil {
		t.Fatal(err)
	}
	for name, backend := range backends {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, shapesModel, backend(), engine.Limits{Rows: 512, Seqs: 1})
			for _, c := range shapesCases(t) {
				if name == "ref" && (len(c.Output) > 20 || len(c.Images) > 1 || len(c.Input) > 40) {
					continue // takes seconds; the other backends run it
				}
				var planes [][]float32
				for i, file := range c.Images {
					planes = append(planes, r.encodeFile(t, processor, file, c.grids()[i]))
				}
				s := r.start(c.Input, c.grids(), planes, sample.Params{}, len(c.Output))
				for len(s.output) < len(c.Output) {
					r.step(len(c.Input), s)
				}
				if !slices.Equal(s.output, c.Output) {
					t.Errorf("%s: ids %v\nwant %v", c.Name, s.output, c.Output)
				}
			}
		})
	}
}

// encodeFile runs the processor and the encoder on a golden picture.
func (r *rig) encodeFile(t *testing.T, p imageprep.Config, file string, grid engine.Grid) []float32 {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(shapesGolden, file))
	if err != nil {
		t.Fatal(err)
	}
	pixels := make([]float32, grid.Patches()*p.PatchDim())
	if got, err := p.Patches(data, pixels); err != nil || got != imageprep.Grid(grid) {
		t.Fatalf("%s: grid %v, %v, want %v", file, got, err, grid)
	}
	out := r.alloc(r.enc.Floats(grid))
	if err := r.enc.Encode(out, pixels, grid); err != nil {
		t.Fatal(err)
	}
	return out
}

// TestQwen3Moe runs the text-only family: no M-RoPE, one dense layer.
func TestQwen3Moe(t *testing.T) {
	var golden struct {
		Cases []goldenCase `json:"cases"`
	}
	readJSON(t, filepath.Join(qwen3Moe, "golden.json"), &golden)
	if len(golden.Cases) == 0 {
		t.Fatal("no golden cases")
	}
	for name, backend := range backends {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, qwen3Moe, backend(), engine.Limits{Rows: 64, Seqs: 64})
			for i, c := range golden.Cases {
				g, ok := openTensors(t, filepath.Join(qwen3Moe, fmt.Sprintf("golden%d.safetensors", i)))
				if !ok {
					t.Fatalf("no golden tensors of case %d", i)
				}
				compareTensors(t, r, &c, g)
				s := r.start(c.Input, nil, nil, sample.Params{}, len(c.Output))
				for len(s.output) < len(c.Output) {
					r.step(len(c.Input), s)
				}
				if !slices.Equal(s.output, c.Output) {
					t.Errorf("case %d: ids %v\nwant %v", i, s.output, c.Output)
				}
			}
		})
	}
}
