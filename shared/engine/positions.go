package engine

import (
	"fmt"

	"trireme.dev/shared/model"
)

// Grid is the patch grid of one picture: frames, rows and columns of patches, before merging.
type Grid struct{ T, H, W int }

// Patches is the number of patches of the grid.
func (g Grid) Patches() int { return g.T * g.H * g.W }

// Tokens is the number of multimodal tokens of the grid when squares of merge*merge patches become one token.
func (g Grid) Tokens(merge int) int { return g.T * (g.H / merge) * (g.W / merge) }

// Span is the run of placeholder tokens of one picture: tokens [Start, Start+Len) of the prompt.
type Span struct{ Start, Len int }

// Spans finds the placeholders of the pictures with the given grids in a prompt in which they are expanded (one
// ImageToken for each multimodal token), in order. It returns ErrGrid when a placeholder belongs to no picture or a
// picture lacks placeholders.
func Spans(tokens []int32, grids []Grid, v *model.Vision) ([]Span, error) {
	if v == nil {
		if len(grids) > 0 {
			return nil, fmt.Errorf("%w: %d pictures for a model without vision", ErrGrid, len(grids))
		}
		return nil, nil
	}
	spans := make([]Span, 0, len(grids))
	for i := 0; i < len(tokens); {
		if int(tokens[i]) != v.ImageToken {
			i++
			continue
		}
		if len(spans) == len(grids) {
			return nil, fmt.Errorf("%w: the placeholder at token %d belongs to none of %d pictures", ErrGrid, i, len(grids))
		}
		need := grids[len(spans)].Tokens(v.Merge)
		n := placeholders(tokens[i:], v.ImageToken, need)
		if n < need || need == 0 {
			return nil, fmt.Errorf("%w: picture %d has %d of its %d placeholders", ErrGrid, len(spans), n, need)
		}
		spans = append(spans, Span{Start: i, Len: n})
		i += n
	}
	if len(spans) < len(grids) {
		return nil, fmt.Errorf("%w: placeholders for %d of %d pictures", ErrGrid, len(spans), len(grids))
	}
	return spans, nil
}

// placeholders counts the leading tokens equal to image, at most limit.
func placeholders(tokens []int32, image, limit int) int {
	n := 0
	for n < len(tokens) && n < limit && int(tokens[n]) == image {
		n++
	}
	return n
}

// Positions returns the M-RoPE position (t, h, w) of each prompt token and the distance of the positions of generated
// tokens from their index: token i >= len(tokens) of the sequence stands at i+delta on all axes. Text advances all
// axes by one; a picture spans its merged grid from the current position, after which the position advances by the
// longer side of that grid (get_mrope_position_ids). Placeholders without a whole picture count as text; Spans refuses
// them. v is nil for a text-only model.
func Positions(tokens []int32, grids []Grid, v *model.Vision) (pos [][3]int32, delta int) {
	pos = make([][3]int32, 0, len(tokens))
	next, end := int32(0), int32(0)
	for i := 0; i < len(tokens); {
		if v != nil && len(grids) > 0 && int(tokens[i]) == v.ImageToken {
			g := grids[0]
			need := g.Tokens(v.Merge)
			if need > 0 && placeholders(tokens[i:], v.ImageToken, need) == need {
				pos = appendPicture(pos, next, g, v.Merge)
				end = max(end, next+int32(max(g.T, g.H/v.Merge, g.W/v.Merge)))
				next += int32(max(g.H, g.W) / v.Merge)
				grids = grids[1:]
				i += need
				continue
			}
		}
		pos = append(pos, [3]int32{next, next, next})
		next++
		end = max(end, next)
		i++
	}
	return pos, int(end) - len(tokens)
}

// appendPicture appends the positions of one picture's tokens, frames outermost, counted from position from.
func appendPicture(pos [][3]int32, from int32, g Grid, merge int) [][3]int32 {
	for t := range int32(g.T) {
		for h := range int32(g.H / merge) {
			for w := range int32(g.W / merge) {
				pos = append(pos, [3]int32{from + t, from + h, from + w})
			}
		}
	}
	return pos
}
