package engine

import (
	"math"

	"trireme.dev/shared/model"
)

// patchTable holds what depends only on the rows and columns of a patch grid, for one frame, in merge-block order: the
// patches of one merged token side by side, merged tokens row by row (the order of the processor's pixel values).
// Host memory.
type patchTable struct {
	rows, cols int
	pos        []float32 // [rows*cols, Hidden]: interpolated position embeddings
	cos, sin   []float32 // [rows*cols, dim/2]: rotary angles over (row, column)
}

// floats is the size of the table in float32.
func (p *patchTable) floats() int { return len(p.pos) + len(p.cos) + len(p.sin) }

// patchTables computes and keeps patchTables by grid: the least recently used go when more than budget float32 are
// kept. It is used by one goroutine at a time.
type patchTables struct {
	v      *model.Vision
	embed  []float32 // host, [side*side, Hidden]
	side   int       // the learned positions are a square of this side
	inv    []float32 // [dim/4]
	budget int       // float32
	used   int
	recent []*patchTable // most recently used last
}

// get returns the table of a grid of rows*cols patches, both multiples of Merge.
func (c *patchTables) get(rows, cols int) *patchTable {
	for i, t := range c.recent {
		if t.rows == rows && t.cols == cols {
			copy(c.recent[i:], c.recent[i+1:])
			c.recent[len(c.recent)-1] = t
			return t
		}
	}
	t := c.compute(rows, cols)
	c.recent = append(c.recent, t)
	c.used += t.floats()
	for c.used > c.budget && len(c.recent) > 1 {
		c.used -= c.recent[0].floats()
		c.recent[0] = nil
		c.recent = c.recent[1:]
	}
	return t
}

func (c *patchTables) compute(rows, cols int) *patchTable {
	n, hidden, quarter := rows*cols, c.v.Hidden, len(c.inv)
	t := &patchTable{
		rows: rows, cols: cols,
		pos: make([]float32, n*hidden),
		cos: make([]float32, n*2*quarter),
		sin: make([]float32, n*2*quarter),
	}
	ys, xs := c.taps(rows), c.taps(cols)
	at := 0
	for br := 0; br < rows; br += c.v.Merge {
		for bc := 0; bc < cols; bc += c.v.Merge {
			for row := br; row < br+c.v.Merge; row++ {
				for col := bc; col < bc+c.v.Merge; col++ {
					c.interpolate(t.pos[at*hidden:(at+1)*hidden], ys[row], xs[col])
					cos, sin := t.cos[at*2*quarter:], t.sin[at*2*quarter:]
					for i, inv := range c.inv {
						s, k := math.Sincos(float64(inv * float32(row)))
						cos[i], sin[i] = float32(k), float32(s)
						s, k = math.Sincos(float64(inv * float32(col)))
						cos[quarter+i], sin[quarter+i] = float32(k), float32(s)
					}
					at++
				}
			}
		}
	}
	return t
}

// tap says which two rows (or columns) of the learned positions an index of the grid lies between.
type tap struct {
	at     [2]int
	weight [2]float32
}

// taps places size patches evenly over the learned positions, the first on the first and the last on the last
// (_interpolation_axis_taps_weights of transformers' vision_utils.py, bilinear, align_corners).
func (c *patchTables) taps(size int) []tap {
	out := make([]tap, size)
	for i := range out {
		src := float32(i) * float32(c.side-1) / float32(max(size-1, 1))
		low := int(src)
		high := src - float32(low)
		out[i] = tap{at: [2]int{low, min(low+1, c.side-1)}, weight: [2]float32{1 - high, 1 - (1 - high)}}
	}
	return out
}

// interpolate writes the position embedding between four learned ones.
func (c *patchTables) interpolate(out []float32, y, x tap) {
	hidden := len(out)
	for i, row := range y.at {
		for j, col := range x.at {
			weight := y.weight[i] * x.weight[j]
			if weight == 0 {
				continue
			}
			src := c.embed[(row*c.side+col)*hidden:][:hidden]
			for k, value := range src {
				out[k] += float32(value * weight)
			}
		}
	}
}
