package modelcmd

import (
	"fmt"
	"slices"

	"trireme.dev/shared/engine"
	"trireme.dev/shared/hf"
)

// tensorFile is the safetensors file of a case. It notes which tensors were asked for.
type tensorFile struct {
	file *hf.Safetensors
	used map[string]bool
}

// get returns a tensor of n elements, or nil where the file has none of that name. A tensor of another size or dtype
// is reported.
func (f *tensorFile) get(name string, n int, rep *CaseReport) []float32 {
	t, ok := f.file.Tensor(name)
	f.used[name] = true
	if !ok {
		return nil
	}
	v, err := t.Float32s()
	if err == nil && len(v) != n {
		err = fmt.Errorf("it has shape %v, want %d elements", t.Shape, n)
	}
	if err != nil {
		rep.Tensors = append(rep.Tensors, TensorReport{Name: name, Tolerance: tensorTolerance, Problem: err.Error()})
		return nil
	}
	return v
}

// compareTensors compares all tensors of a case: pixel values with those of the pictures, then, computed from the
// golden pixel values, the encoder's output, router logits and logits of every prompt token.
func (r *runner) compareTensors(c *goldenCase, pictures []picture, grids []engine.Grid, resized bool, rep *CaseReport) error {
	file, err := hf.OpenSafetensors(c.tensors)
	if err != nil {
		return err
	}
	defer file.Close()
	f := &tensorFile{file: file, used: map[string]bool{}}
	if err := compareInputs(c, f, rep); err != nil {
		return err
	}
	if len(pictures) > 0 {
		if err := r.comparePictures(f, pictures, grids, resized, rep); err != nil {
			return err
		}
	}
	if err := r.compareForward(c, f, grids, rep); err != nil {
		return err
	}
	for _, name := range file.Names() {
		if !f.used[name] {
			rep.Tensors = append(rep.Tensors, TensorReport{Name: name, Problem: "the engine has no such tensor"})
		}
	}
	return nil
}

// compareInputs compares the ids that a file may repeat with those of the case.
func compareInputs(c *goldenCase, f *tensorFile, rep *CaseReport) error {
	for name, want := range map[string][]int32{"input_ids": c.Input, "output_ids": c.Output} {
		t, ok := f.file.Tensor(name)
		if !ok {
			continue
		}
		f.used[name] = true
		ids, err := t.Ints()
		if err != nil {
			return fmt.Errorf("%s: tensor %s: %w", c.tensors, name, err)
		}
		if !slices.EqualFunc(ids, want, func(a int, b int32) bool { return a == int(b) }) {
			rep.fail("%s are not those of the JSON file", name)
		}
	}
	return nil
}

// comparePictures compares pixel values and the encoder's output. It leaves the latter, computed from the golden pixel
// values where there are any, in r.planes.
func (r *runner) comparePictures(f *tensorFile, pictures []picture, grids []engine.Grid, resized bool, rep *CaseReport) error {
	var own []float32
	for _, p := range pictures {
		own = append(own, p.pixels...)
	}
	pixels := f.get("pixel_values", len(own), rep)
	if pixels != nil {
		var d difference
		d.add(own, pixels)
		rep.Tensors = append(rep.Tensors, d.pixels(resized))
	} else {
		pixels = own
	}
	if err := r.encode(pixels, grids); err != nil {
		return err
	}
	n := 0
	for _, g := range grids {
		n += r.enc.Floats(g)
	}
	host := r.host[:n]
	r.c.Download(host, r.planes[:n])
	for level := range r.cfg.Vision.Levels() {
		name := "image_embeds"
		if level > 0 {
			name = fmt.Sprintf("deepstack_%d", level-1)
		}
		want := f.get(name, n/r.cfg.Vision.Levels(), rep)
		if want == nil {
			continue
		}
		var d difference
		at := 0
		for _, g := range grids {
			plane := r.levels(host[at : at+r.enc.Floats(g)])[level]
			d.add(plane, want[:len(plane)])
			want = want[len(plane):]
			at += r.enc.Floats(g)
		}
		rep.Tensors = append(rep.Tensors, d.report(name, tensorTolerance))
	}
	return nil
}

// compareForward compares router logits and logits. router_logits_i belongs to the i-th layer that has a router, as
// transformers records them.
func (r *runner) compareForward(c *goldenCase, f *tensorFile, grids []engine.Grid, rep *CaseReport) error {
	rows := len(c.Input)
	logits := f.get("logits", rows*r.cfg.Text.Vocab, rep)
	routers := map[int][]float32{} // by layer
	names := map[int]string{}
	routed := 0
	for layer, dense := range r.cfg.Text.Dense {
		if dense {
			continue
		}
		names[layer] = fmt.Sprintf("router_logits_%d", routed)
		routed++
		if want := f.get(names[layer], rows*r.cfg.Text.Experts, rep); want != nil {
			routers[layer] = want
		}
	}
	if logits == nil && len(routers) == 0 {
		return nil
	}
	s, err := r.sequence(c.Input, grids, r.planes)
	if err != nil {
		return err
	}
	var d difference
	byLayer := make([]difference, r.cfg.Text.Layers)
	r.text.Observe(func(layer int, got []float32) {
		if want := routers[layer]; want != nil {
			byLayer[layer].add(got, want[:len(got)])
			routers[layer] = want[len(got):]
		}
	})
	defer r.text.Observe(nil)
	err = s.each(func(from int, got []float32) {
		if logits != nil {
			d.add(got, logits[from*r.cfg.Text.Vocab:][:len(got)])
		}
	})
	if err != nil {
		return err
	}
	for layer := range r.cfg.Text.Layers {
		if _, ok := routers[layer]; ok {
			rep.Tensors = append(rep.Tensors, byLayer[layer].report(names[layer], tensorTolerance))
		}
	}
	if logits != nil {
		rep.Tensors = append(rep.Tensors, d.report("logits", tensorTolerance))
	}
	return nil
}
