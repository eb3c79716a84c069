package cpu

import (
	"trireme.dev/shared/kernel/check"
	"trireme.dev/shared/model"
)

// panelBytes is how much of a weight matrix is kept in the second-level cache while all rows of x pass by.
const panelBytes = 256 << 10

func (c *compute) Linear(out, x []float32, rows int, w model.Matrix, bias []float32) {
	check.Linear(out, x, rows, w, bias)
	t := &c.linear
	*t = linearTask{
		c: c, bias: bias,
		product: product{x: x, out: out, w: w, rows: rows, outStride: w.Rows},
	}
	quads := (w.Rows + tileOutputs - 1) / tileOutputs
	rowQuads := (rows + tileRows - 1) / tileRows
	n := c.pool.pieces(2*rows*w.Rows*w.Cols, quads*rowQuads)
	t.outputPieces = min(n, max(1, quads/4)) // prefer to cut outputs: rows are cut when there are few outputs
	t.rowPieces = min(max(1, n/max(1, t.outputPieces)), max(1, rowQuads))
	c.pool.do(t, t.outputPieces*t.rowPieces)
	*t = linearTask{}
}

// linearTask is one Linear, cut over outputs and rows.
type linearTask struct {
	c                       *compute
	product                 product
	bias                    []float32
	outputPieces, rowPieces int
}

func (t *linearTask) run(worker, i int) {
	p := &t.product
	from, to := share(p.w.Rows, tileOutputs, i%t.outputPieces, t.outputPieces)
	first, end := share(p.rows, tileRows, i/t.outputPieces, t.rowPieces)
	p.run(t.c.vec, &t.c.workers[worker], first, end, from, to)
	if t.bias == nil {
		return
	}
	for r := first; r < end; r++ {
		t.c.vec.accumulate(p.out[r*p.outStride+from:r*p.outStride+to], t.bias[from:to], 0, one, 1)
	}
}

// share returns part i of n of the range [0, total), cut at multiples of unit.
func share(total, unit, i, n int) (from, to int) {
	units := (total + unit - 1) / unit
	return min(total, units*i/n*unit), min(total, units*(i+1)/n*unit)
}

// product is a matrix product out[r] = w x[r] over rows that lie in order or, with an index, anywhere.
type product struct {
	x, out    []float32
	w         model.Matrix
	rows      int
	xStride   int     // from one row of x to the next; 0: w.Cols
	outStride int     // from one row of out to the next
	index     []int32 // [rows], where the rows of out are; nil: in order
	share     int     // rows of out, in order of place, that have one row of x between them; 0: 1
}

// place returns the places of row r in x and in out.
func (p *product) place(r int) (x, out int) {
	at := r
	if p.index != nil {
		at = int(p.index[r])
	}
	from := at
	if p.share > 1 {
		from /= p.share
	}
	if p.xStride > 0 {
		return from * p.xStride, at * p.outStride
	}
	return from * p.w.Cols, at * p.outStride
}

// run computes outputs [from, to) of rows [first, end). The result does not depend on how a product is cut.
func (p *product) run(vec vector, w *worker, first, end, from, to int) {
	t := &w.tile
	cols := p.w.Cols
	t.stride, t.blocks = cols, cols/lanes
	whole := from + (to-from)&^(tileOutputs-1)
	panel := max(1, panelBytes/(2*max(1, cols))/tileOutputs) * tileOutputs
	if cols%lanes != 0 {
		panel = tileOutputs // the tails are padded for one tile at a time
	}
	for o := from; o < whole; o += panel {
		n := min(panel, whole-o)
		t.tiles = n / tileOutputs
		t.w = p.w.Data[o*cols : (o+n)*cols]
		p.tails(w, o, tileOutputs)
		p.rowsOf(vec, w, first, end, o, n)
	}
	for o := whole; o < to; o++ { // fewer than four outputs are left: four times the same
		t.tiles, t.stride = 1, 0
		t.w = p.w.Data[o*cols : (o+1)*cols]
		p.tails(w, o, 1)
		p.rowsOf(vec, w, first, end, o, 1)
	}
	*t = tile{} // keep no slice of the caller's
}

// tails pads the last columns of n weight rows from row o on to a block.
func (p *product) tails(w *worker, o, n int) {
	cols := p.w.Cols
	rest := cols % lanes
	if rest == 0 {
		return
	}
	w.tile.xTail, w.tile.wTail = w.xTail[:], w.wTail[:]
	for i := range tileOutputs {
		to := w.wTail[i*lanes:][:lanes]
		clear(to)
		row := o + min(i, n-1)
		copy(to, p.w.Data[(row+1)*cols-rest:(row+1)*cols])
	}
}

// rowsOf computes outputs [o, o+outputs) of rows [first, end), four, two or one at a time.
func (p *product) rowsOf(vec vector, w *worker, first, end, o, outputs int) {
	for first < end {
		n := 1
		switch rest := end - first; {
		case rest >= tileRows:
			n = tileRows
			p.aim(w, first, n, o, outputs)
			vec.tile(&w.tile)
		case rest >= 2:
			n = 2
			p.aim(w, first, n, o, outputs)
			vec.pair(&w.tile)
		default:
			p.aim(w, first, n, o, outputs)
			vec.row(&w.tile)
		}
		if outputs < tileOutputs {
			for i := range n {
				_, out := p.place(first + i)
				copy(p.out[out+o:][:outputs], w.short[i][:])
			}
		}
		first += n
	}
}

// aim points the tile of w at n rows of x from row first on and at outputs [o, o+outputs).
func (p *product) aim(w *worker, first, n, o, outputs int) {
	t := &w.tile
	cols := p.w.Cols
	rest := cols % lanes
	for i := range n {
		x, out := p.place(first + i)
		t.x[i] = p.x[x:][:cols]
		if rest > 0 {
			to := w.xTail[i*lanes:][:lanes]
			clear(to)
			copy(to, t.x[i][cols-rest:])
		}
		if outputs < tileOutputs {
			t.out[i] = w.short[i][:]
		} else {
			t.out[i] = p.out[out+o:][:outputs]
		}
	}
}
