package engine_test

import (
	"errors"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"trireme.dev/shared/engine"
	"trireme.dev/shared/model"
)

const image = 9

var vision = &model.Vision{Merge: 2, ImageToken: image}

func TestPositions(t *testing.T) {
	type at = [3]int32
	for _, c := range []struct {
		name   string
		tokens []int32
		grids  []engine.Grid
		v      *model.Vision
		want   []at
		delta  int
	}{
		{"nothing", nil, nil, vision, nil, 0},
		{"text", []int32{1, 2, 3}, nil, vision, []at{{0, 0, 0}, {1, 1, 1}, {2, 2, 2}}, 0},
		{"text model", []int32{1, image}, nil, nil, []at{{0, 0, 0}, {1, 1, 1}}, 0},
		{
			"wide picture", []int32{1, image, image, image, image, image, image, 2},
			[]engine.Grid{{T: 1, H: 4, W: 6}}, vision,
			[]at{{0, 0, 0}, {1, 1, 1}, {1, 1, 2}, {1, 1, 3}, {1, 2, 1}, {1, 2, 2}, {1, 2, 3}, {4, 4, 4}}, -3,
		},
		{
			"two pictures side by side", []int32{image, image, image},
			[]engine.Grid{{T: 1, H: 4, W: 2}, {T: 1, H: 2, W: 2}}, vision,
			[]at{{0, 0, 0}, {0, 1, 0}, {2, 2, 2}}, 0,
		},
		{
			"placeholders of no picture are text", []int32{image, image, 3}, nil, vision,
			[]at{{0, 0, 0}, {1, 1, 1}, {2, 2, 2}}, 0,
		},
		{
			"half a picture is text", []int32{image, image, 3}, []engine.Grid{{T: 1, H: 4, W: 4}}, vision,
			[]at{{0, 0, 0}, {1, 1, 1}, {2, 2, 2}}, 0,
		},
		{
			"frames", []int32{image, image, image, 4}, []engine.Grid{{T: 3, H: 2, W: 2}}, vision,
			[]at{{0, 0, 0}, {1, 0, 0}, {2, 0, 0}, {1, 1, 1}}, -1,
		},
	} {
		pos, delta := engine.Positions(c.tokens, c.grids, c.v)
		if !slices.Equal(pos, c.want) || delta != c.delta {
			t.Errorf("%s: %v and %d, want %v and %d", c.name, pos, delta, c.want, c.delta)
		}
	}
}

func TestSpans(t *testing.T) {
	grids := []engine.Grid{{T: 1, H: 2, W: 4}, {T: 1, H: 2, W: 2}}
	spans, err := engine.Spans([]int32{1, image, image, 2, image, 3}, grids, vision)
	if want := []engine.Span{{Start: 1, Len: 2}, {Start: 4, Len: 1}}; err != nil || !slices.Equal(spans, want) {
		t.Errorf("%v, %v, want %v", spans, err, want)
	}
	for name, tokens := range map[string][]int32{
		"none":     {1, 2},
		"one":      {image, image},
		"half":     {image, 1, image, image},
		"too many": {image, image, image, 1, image},
	} {
		if _, err := engine.Spans(tokens, grids, vision); !errors.Is(err, engine.ErrGrid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := engine.Spans([]int32{image}, grids, nil); !errors.Is(err, engine.ErrGrid) {
		t.Errorf("pictures for a text model: %v", err)
	}
}

// TestPositionsProperties checks, for prompts of text and pictures at random, that each token has a position, that text
// advances all axes alike, and that the token after the prompt stands behind everything.
func TestPositionsProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var tokens []int32
		var grids []engine.Grid
		for range rapid.IntRange(0, 6).Draw(t, "parts") {
			for range rapid.IntRange(1, 5).Draw(t, "text") {
				tokens = append(tokens, 1)
			}
			g := engine.Grid{T: 1, H: 2 * rapid.IntRange(1, 5).Draw(t, "h"), W: 2 * rapid.IntRange(1, 5).Draw(t, "w")}
			grids = append(grids, g)
			for range g.Tokens(2) {
				tokens = append(tokens, image)
			}
		}
		pos, delta := engine.Positions(tokens, grids, vision)
		if len(pos) != len(tokens) {
			t.Fatalf("%d positions for %d tokens", len(pos), len(tokens))
		}
		next := int32(len(tokens) + delta)
		for i, p := range pos {
			if tokens[i] != image && (p[0] != p[1] || p[1] != p[2]) {
				t.Fatalf("text token %d at %v", i, p)
			}
			if max(p[0], p[1], p[2]) >= next {
				t.Fatalf("token %d at %v is not before the answer at %d", i, p, next)
			}
		}
		if spans, err := engine.Spans(tokens, grids, vision); err != nil || len(spans) != len(grids) {
			t.Fatalf("spans %v, %v", spans, err)
		}
	})
}
