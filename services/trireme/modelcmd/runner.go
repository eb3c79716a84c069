package modelcmd

import (
	"errors"
	"fmt"
	"slices"

	"trireme.dev/shared/chat"
	"trireme.dev/shared/engine"
	"trireme.dev/shared/hf"
	"trireme.dev/shared/kernel"
	"trireme.dev/shared/model"
	"trireme.dev/shared/token"
)

// maxChunk is the most prompt tokens of one forward pass.
const maxChunk = 512

// runner runs cases through the engine. It is used by one goroutine.
type runner struct {
	dir      string
	cfg      model.Config
	c        kernel.Compute
	text     *engine.Text
	enc      *engine.Encoder // nil for a text model
	pictures *pictureReader  // nil for a text model
	chunk    int             // prompt tokens of one forward pass
	blocks   [][]float32     // device: KV blocks for the longest case
	planes   []float32       // device: encoder outputs of the pictures of one case
	host     []float32       // a copy of planes

	// Loaded when the first case with messages comes.
	tokenizer *token.Tokenizer
	template  *chat.Template
}

// newRunner prepares an open model for the cases. Its memory belongs to c and lives as long.
func newRunner(f *hf.Folder, c kernel.Compute, cases []goldenCase) (*runner, error) {
	w, err := f.Weights()
	if err != nil {
		return nil, err
	}
	r := &runner{dir: f.Dir, cfg: f.Config, c: c}
	if r.cfg.Vision != nil {
		if r.pictures, err = newPictureReader(f.Dir); err != nil {
			return nil, err
		}
	}
	prompt, length, patches, floats := 0, 0, 0, 0
	for i := range cases {
		c := &cases[i]
		prompt = max(prompt, len(c.Input))
		length = max(length, len(c.Input)+len(c.Output))
		if r.cfg.Vision == nil {
			continue
		}
		grids := c.grids()
		for _, path := range c.Images {
			// A picture that cannot be read is the case's fault and is reported there.
			if g, err := r.pictures.grid(path); err == nil {
				grids = append(grids, g)
			}
		}
		sum := 0 // of the golden grids and the pictures' own, which should be the same
		for _, g := range grids {
			patches = max(patches, g.Patches())
			sum += r.cfg.Vision.Levels() * g.Tokens(r.cfg.Vision.Merge) * r.cfg.Vision.Out
		}
		floats = max(floats, sum)
	}
	r.chunk = min(prompt, maxChunk)
	if r.text, err = engine.NewText(r.cfg, []engine.NPU{{Compute: c, Weights: w}}, engine.Limits{Rows: r.chunk, Seqs: r.chunk}); err != nil {
		return nil, err
	}
	if patches > 0 {
		if r.enc, err = engine.NewEncoder(r.cfg, w, c, patches); err != nil {
			return nil, err
		}
		if r.planes, err = c.Alloc(floats); err != nil {
			return nil, err
		}
		r.host = make([]float32, floats)
	}
	for at := 0; at < length; at += model.BlockTokens {
		block, err := c.Alloc(r.cfg.Text.BlockFloats())
		if err != nil {
			return nil, err
		}
		r.blocks = append(r.blocks, block)
	}
	return r, nil
}

// run compares one case.
func (r *runner) run(c *goldenCase) CaseReport {
	rep := CaseReport{Name: c.Name, Tokens: len(c.Output), Tensors: []TensorReport{}}
	if err := r.compare(c, &rep); err != nil {
		rep.fail("%v", err)
	}
	rep.settle()
	return rep
}

// compare fills in the report of a case. An error means that the case could not be run to its end.
func (r *runner) compare(c *goldenCase, rep *CaseReport) error {
	pictures, err := r.readPictures(c)
	if err != nil {
		return err
	}
	grids := make([]engine.Grid, len(pictures))
	resized := false
	for i, p := range pictures {
		grids[i] = p.grid
		resized = resized || p.resized
	}
	if c.Grids != nil && !slices.Equal(grids, c.grids()) {
		rep.fail("patch grids are %v, want %v", grids, c.grids())
	}
	if err := r.comparePrompt(c, grids, rep); err != nil {
		return err
	}
	if c.tensors != "" {
		if err := r.compareTensors(c, pictures, grids, resized, rep); err != nil {
			return err
		}
	}
	return r.compareAnswer(c, pictures, grids, resized, rep)
}

// readPictures decodes the pictures of a case.
func (r *runner) readPictures(c *goldenCase) ([]picture, error) {
	if len(c.Images) > 0 && r.pictures == nil {
		return nil, fmt.Errorf("the case has pictures but %s takes text only", r.cfg.Name)
	}
	out := make([]picture, len(c.Images))
	for i, path := range c.Images {
		p, err := r.pictures.read(path)
		if err != nil {
			return nil, err
		}
		out[i] = p
	}
	return out, nil
}

// comparePrompt renders and tokenises the messages of a case and compares the ids.
func (r *runner) comparePrompt(c *goldenCase, grids []engine.Grid, rep *CaseReport) error {
	if len(c.Messages) == 0 {
		return nil
	}
	if r.template == nil {
		var err error
		if r.tokenizer, err = token.Load(r.dir); err != nil {
			return err
		}
		if r.template, err = chat.Load(r.dir); err != nil {
			return err
		}
	}
	messages := make([]chat.Message, len(c.Messages))
	for i := range messages {
		m, err := c.Messages[i].message()
		if err != nil {
			return err
		}
		messages[i] = m
	}
	text, err := r.template.Render(messages, chat.Options{AddGenerationPrompt: true})
	if err != nil {
		return err
	}
	ids, err := r.tokenizer.Encode(text)
	if err != nil {
		return err
	}
	prompt, err := r.expand(ids, grids)
	if err != nil {
		return err
	}
	if i := firstDiff(prompt, c.Input); i >= 0 {
		rep.fail("prompt ids differ from token %d of %d on", i, len(c.Input))
	}
	return nil
}

// expand repeats each picture's placeholder as often as the picture has tokens.
func (r *runner) expand(ids []int, grids []engine.Grid) ([]int32, error) {
	var out []int32
	next := 0
	for _, id := range ids {
		n := 1
		if v := r.cfg.Vision; v != nil && id == v.ImageToken {
			if next == len(grids) {
				return nil, errors.New("the prompt has more placeholders than pictures")
			}
			n = grids[next].Tokens(v.Merge)
			next++
		}
		for range n {
			out = append(out, int32(id))
		}
	}
	if next < len(grids) {
		return nil, fmt.Errorf("the prompt has placeholders for %d of %d pictures", next, len(grids))
	}
	return out, nil
}

// encode runs the encoder over pictures, whose pixel values lie one behind the other in pixels, into r.planes.
func (r *runner) encode(pixels []float32, grids []engine.Grid) error {
	at := 0
	for _, g := range grids {
		n := g.Patches() * r.cfg.Vision.PatchDim()
		if n > len(pixels) {
			return fmt.Errorf("%d pixel values are too few for the patch grids %v", len(pixels), grids)
		}
		if err := r.enc.Encode(r.planes[at:at+r.enc.Floats(g)], pixels[:n], g); err != nil {
			return err
		}
		pixels = pixels[n:]
		at += r.enc.Floats(g)
	}
	if len(pixels) > 0 {
		return fmt.Errorf("%d pixel values more than the patch grids %v have", len(pixels), grids)
	}
	return nil
}

// compareAnswer generates the greedy answer from the pictures themselves and compares every id.
func (r *runner) compareAnswer(c *goldenCase, pictures []picture, grids []engine.Grid, resized bool, rep *CaseReport) error {
	var pixels []float32
	for _, p := range pictures {
		pixels = append(pixels, p.pixels...)
	}
	if len(grids) > 0 {
		if err := r.encode(pixels, grids); err != nil {
			return err
		}
	}
	s, err := r.sequence(c.Input, grids, r.planes)
	if err != nil {
		return err
	}
	ids, last, err := s.answer(len(c.Output))
	if err != nil {
		return err
	}
	if i := firstDiff(ids, c.Output); i >= 0 {
		rep.fail("greedy id %d is %d, want %d", i, ids[i], c.Output[i])
	} else {
		rep.IDs = true
	}
	if c.Last != nil && !resized { // a resized picture may differ by a grey level, which moves logits further
		var d difference
		for i, id := range c.Last.IDs {
			if id < 0 || id >= len(last) {
				return fmt.Errorf("last_logits_top8 names token %d, the vocabulary has %d: %w", id, len(last), ErrGolden)
			}
			d.add(last[id:id+1], []float32{float32(c.Last.Values[i])})
		}
		rep.Tensors = append(rep.Tensors, d.report("last_logits_top8", tensorTolerance+printTolerance))
	}
	return nil
}
