package stage

import (
	"context"
	"errors"
	"fmt"

	"trireme.dev/shared/mem"
	"trireme.dev/shared/wire"
)

// Spec reads a request's spec, inline or by handle, and checks that it is for this stage's model and fits it.
func (s *Stage) Spec(ctx context.Context, inline []byte, handle *mem.Handle) (*wire.Spec, error) {
	if handle != nil {
		objs, err := s.HBM.Attach(ctx, mem.ReadOnly, -1, *handle)
		if err != nil {
			return nil, fmt.Errorf("attaching the spec: %w", err)
		}
		defer s.Free(ctx, objs...)
		if err := objs[0].Verify(); err != nil {
			return nil, fmt.Errorf("reading the spec: %w", err)
		}
		inline = objs[0].Bytes()
	}
	var spec wire.Spec
	if err := wire.Unmarshal(inline, &spec); err != nil {
		return nil, fmt.Errorf("reading the spec: %w", err)
	}
	if spec.Model != s.Model.Digest {
		return nil, &Fault{Status: 500, Err: fmt.Errorf("request is for model %x, this instance runs %x (%s)",
			spec.Model[:6], s.Model.Digest[:6], s.Model.Name)}
	}
	if err := s.checkSpec(&spec); err != nil {
		return nil, &Fault{Status: 500, Err: fmt.Errorf("spec: %w", err)}
	}
	return &spec, nil
}

// Bounds of a spec beside those that the model sets: those of the OpenAI API (n, top_logprobs), with room.
const (
	maxChoices  = 128
	maxLogprobs = 64
	maxPatches  = 1 << 15 // of one side of a picture
)

// checkSpec checks what the engine relies on, so that a malformed spec is an error and never a crash.
func (s *Stage) checkSpec(spec *wire.Spec) error {
	t := &s.Model.Text
	n, most := len(spec.Prompt), spec.Sampling.MaxTokens
	switch {
	case n == 0:
		return errors.New("no prompt tokens")
	case most < 1 || most > t.Context || n > t.Context-most:
		return fmt.Errorf("%d prompt tokens and %d more exceed the context of %d", n, most, t.Context)
	case spec.Choices < 1 || spec.Choices > maxChoices || spec.Resume != nil && len(spec.Resume) != spec.Choices:
		return fmt.Errorf("%d choices with %d resumes", spec.Choices, len(spec.Resume))
	case spec.Sampling.Logprobs < -1 || spec.Sampling.Logprobs > maxLogprobs:
		return fmt.Errorf("%d logprobs", spec.Sampling.Logprobs)
	case len(spec.Pictures) > 0 && s.Model.Vision == nil:
		return errors.New("pictures for a model without a vision encoder")
	}
	if err := s.checkIDs(spec.Prompt); err != nil {
		return err
	}
	for _, r := range spec.Resume {
		if err := s.checkIDs(r); err != nil {
			return err
		}
		if len(r) > most {
			return fmt.Errorf("resume of %d of %d tokens", len(r), most)
		}
	}
	end := 0
	for i, p := range spec.Pictures {
		for _, g := range p.Grid {
			if g < 1 || g > maxPatches {
				return fmt.Errorf("picture %d with grid %v", i, p.Grid)
			}
		}
		if p.Offset < end || p.Offset > n || s.Tokens(p.Grid) > n-p.Offset {
			return fmt.Errorf("picture %d at token %d with grid %v", i, p.Offset, p.Grid)
		}
		end = p.Offset + s.Tokens(p.Grid)
	}
	return nil
}

// checkIDs refuses ids outside the vocabulary.
func (s *Stage) checkIDs(ids []int32) error {
	for _, id := range ids {
		if id < 0 || int(id) >= s.Model.Text.Vocab {
			return fmt.Errorf("token id %d of a vocabulary of %d", id, s.Model.Text.Vocab)
		}
	}
	return nil
}

// Tokens is the number of multimodal tokens of a grid of patches.
func (s *Stage) Tokens(grid [3]int) int {
	m := s.Model.Vision.Merge
	return grid[0] * (grid[1] / m) * (grid[2] / m)
}
