package modelcmd

import (
	"trireme.dev/shared/engine"
	"trireme.dev/shared/engine/sample"
)

// sequence is one prompt on its way through the engine.
type sequence struct {
	r      *runner
	prompt []int32
	pos    [][3]int32
	delta  int
	visual []engine.Visual // over the whole prompt
}

// sequence prepares a prompt whose pictures have those grids. planes is the encoder's output for them, one behind the
// other, device memory.
func (r *runner) sequence(prompt []int32, grids []engine.Grid, planes []float32) (*sequence, error) {
	s := &sequence{r: r, prompt: prompt}
	s.pos, s.delta = engine.Positions(prompt, grids, r.cfg.Vision)
	spans, err := engine.Spans(prompt, grids, r.cfg.Vision)
	if err != nil {
		return nil, err
	}
	for i, span := range spans {
		n := r.enc.Floats(grids[i])
		s.visual = append(s.visual, engine.Visual{Row: span.Start, Rows: span.Len, Planes: r.levels(planes[:n])})
		planes = planes[n:]
	}
	return s, nil
}

// levels cuts an encoder output [levels, tokens, Out] into its planes.
func (r *runner) levels(out []float32) [][]float32 {
	n := len(out) / r.cfg.Vision.Levels()
	planes := make([][]float32, r.cfg.Vision.Levels())
	for i := range planes {
		planes[i] = out[i*n : (i+1)*n]
	}
	return planes
}

// chunk is the part [from, to) of the prompt as a batch of one.
func (s *sequence) chunk(from, to int) engine.Seq {
	q := engine.Seq{Tokens: s.prompt[from:to], Pos: from, Rope: s.pos[from:to], Blocks: s.r.blocks}
	hidden := s.r.cfg.Text.Hidden
	for _, v := range s.visual {
		a, b := max(v.Row, from), min(v.Row+v.Rows, to)
		if a >= b {
			continue
		}
		part := engine.Visual{Row: a - from, Rows: b - a}
		for _, p := range v.Planes {
			part.Planes = append(part.Planes, p[(a-v.Row)*hidden:(b-v.Row)*hidden])
		}
		q.Visual = append(q.Visual, part)
	}
	return q
}

// each runs the prompt in chunks and calls do with the logits of all tokens of each, [to-from, Vocab], valid during
// the call.
func (s *sequence) each(do func(from int, logits []float32)) error {
	for from := 0; from < len(s.prompt); from += s.r.chunk {
		q := s.chunk(from, min(from+s.r.chunk, len(s.prompt)))
		q.All = true
		logits, err := s.r.text.Forward([]engine.Seq{q})
		if err != nil {
			return err
		}
		do(from, logits[0])
	}
	return nil
}

// answer runs the prompt and n greedy tokens, whichever they are, and returns them and the logits behind the prompt.
func (s *sequence) answer(n int) (ids []int32, last []float32, err error) {
	sampler := sample.New(sample.Params{}, nil, s.prompt, nil)
	var logits [][]float32
	for from := 0; from < len(s.prompt); from += s.r.chunk {
		to := min(from+s.r.chunk, len(s.prompt))
		q := s.chunk(from, to)
		q.Want = to == len(s.prompt)
		if logits, err = s.r.text.Forward([]engine.Seq{q}); err != nil {
			return nil, nil, err
		}
	}
	last = append(last, logits[0]...)
	for {
		id, _, _ := sampler.Next(logits[0], len(ids))
		if ids = append(ids, id); len(ids) == n {
			return ids, last, nil
		}
		logits, err = s.r.text.Forward([]engine.Seq{{
			Tokens: []int32{id}, Pos: len(s.prompt) + len(ids) - 1, Delta: s.delta, Blocks: s.r.blocks, Want: true,
		}})
		if err != nil {
			return nil, nil, err
		}
	}
}
