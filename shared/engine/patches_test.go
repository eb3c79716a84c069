package engine

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"trireme.dev/shared/model"
)

// newTables returns tables over a random 5x5 square of positions, 3 wide, with room for budget float32.
func newTables(budget int) *patchTables {
	r := rand.New(rand.NewPCG(1, 1))
	c := &patchTables{
		v: &model.Vision{Hidden: 3, Merge: 2}, side: 5, embed: make([]float32, 5*5*3),
		inv: inverseFrequencies(10_000, 8), budget: budget,
	}
	for i := range c.embed {
		c.embed[i] = r.Float32()
	}
	return c
}

// TestInterpolation compares the position of each patch with bilinear interpolation in float64.
func TestInterpolation(t *testing.T) {
	c := newTables(1 << 20)
	for _, size := range [][2]int{{2, 2}, {4, 6}, {10, 4}, {20, 20}} {
		rows, cols := size[0], size[1]
		table := c.get(rows, cols)
		at := 0
		for br := 0; br < rows; br += 2 {
			for bc := 0; bc < cols; bc += 2 {
				for _, p := range [][2]int{{br, bc}, {br, bc + 1}, {br + 1, bc}, {br + 1, bc + 1}} {
					y, x := float64(p[0])*4/float64(rows-1), float64(p[1])*4/float64(cols-1)
					for k := range 3 {
						if got, want := float64(table.pos[at*3+k]), c.bilinear(y, x, k); math.Abs(got-want) > 1e-5 {
							t.Fatalf("patch (%d, %d) of %v: %v, want %v", p[0], p[1], size, got, want)
						}
					}
					angle := float64(p[1]) * math.Pow(10_000, -2.0/8)
					if got := float64(table.cos[at*8+4+1]); math.Abs(got-math.Cos(angle)) > 1e-5 {
						t.Fatalf("column angle of patch (%d, %d): cosine %v, want %v", p[0], p[1], got, math.Cos(angle))
					}
					at++
				}
			}
		}
	}
}

// bilinear interpolates element k of the learned positions.
func (c *patchTables) bilinear(y, x float64, k int) float64 {
	value := func(row, col float64) float64 {
		return float64(c.embed[(int(min(row, 4))*5+int(min(col, 4)))*3+k])
	}
	y0, x0 := math.Floor(y), math.Floor(x)
	top := value(y0, x0)*(1-x+x0) + value(y0, x0+1)*(x-x0)
	low := value(y0+1, x0)*(1-x+x0) + value(y0+1, x0+1)*(x-x0)
	return top*(1-y+y0) + low*(y-y0)
}

// TestTablesAreBounded checks that the least recently used tables go, and that one too large for the budget still works.
func TestTablesAreBounded(t *testing.T) {
	per := newTables(1<<20).get(2, 2).floats()
	c := newTables(3 * per)
	first := c.get(2, 2)
	c.get(4, 2)
	if c.get(2, 2) != first {
		t.Error("a table in use was computed again")
	}
	c.get(2, 4) // 5 units with the budget at 3: (4, 2) goes
	var sizes [][2]int
	used := 0
	for _, r := range c.recent {
		sizes = append(sizes, [2]int{r.rows, r.cols})
		used += r.floats()
	}
	if want := [][2]int{{2, 2}, {2, 4}}; !slices.Equal(sizes, want) || used != c.used {
		t.Errorf("kept %v of %d float32 (booked %d), want %v", sizes, used, c.used, want)
	}
	big := c.get(20, 20)
	if len(c.recent) != 1 || c.recent[0] != big || c.used != big.floats() {
		t.Errorf("%d tables kept beside one over the budget", len(c.recent))
	}
}

// TestInterleavedAxes pins which position each rotary frequency follows (apply_interleaved_mrope, sections 6, 5, 5).
func TestInterleavedAxes(t *testing.T) {
	r := newRotary(model.Rope{Theta: 1e5, Sections: []int{6, 5, 5}}, 32)
	want := []uint8{0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0}
	if !slices.Equal(r.axis, want) {
		t.Errorf("axes %v, want %v", r.axis, want)
	}
	r = newRotary(model.Rope{Theta: 5e6, Sections: []int{24, 20, 20}}, 128)
	var count [3]int
	for _, a := range r.axis {
		count[a]++
	}
	if count != [3]int{24, 20, 20} || r.axis[60] != 0 || r.axis[59] != 2 {
		t.Errorf("axes %v", r.axis)
	}
}
