package cpu

import (
	"trireme.dev/shared/kernel"
	"trireme.dev/shared/kernel/check"
	"trireme.dev/shared/model"
)

// Attention runs an online softmax over spans of 16 positions, counted from position 0 of the sequence (or of the
// segment): one KV block is one span. A span of keys and values is read once for a group of queries, from the cache
// after that.

// queryGroup is how many queries (rows times heads that share a KV head) go through the spans together.
const queryGroup = 32

// flow passes the queries of a worker through spans. Their numbers of positions never fall from one to the next.
type flow struct {
	vec   vector
	w     *worker
	scale float32
	dim   int
}

// start makes room for n queries of the given width.
func (w *worker) start(vec vector, n, dim int) flow {
	if cap(w.queries) < n {
		w.queries = make([]query, n)
	}
	if cap(w.acc) < n*dim {
		w.acc = make([]float32, n*dim)
	}
	w.queries, w.acc = w.queries[:0], w.acc[:n*dim]
	clear(w.acc)
	return flow{vec: vec, w: w, scale: rsqrt(float64(dim)), dim: dim}
}

func (f *flow) add(q, out []float32, n int) {
	acc := f.w.acc[len(f.w.queries)*f.dim:][:f.dim]
	f.w.queries = append(f.w.queries, query{q: q, acc: acc, out: out, n: n, top: table[cNegInf]})
}

// span lets all queries attend to the positions from first on whose keys and values begin at k and v; there are at
// most 16.
func (f *flow) span(first int, k, v []float32, stride int) {
	queries := f.w.queries
	for len(queries) > 0 && queries[0].n <= first {
		queries = queries[1:]
	}
	for len(queries) > 0 {
		n := min(span, queries[0].n-first)
		alike := 1
		for alike < len(queries) && min(span, queries[alike].n-first) == n {
			alike++
		}
		f.vec.attend(queries[:alike], k, v, stride, n, f.scale)
		queries = queries[alike:]
	}
}

// finish writes the results.
func (f *flow) finish() {
	for i := range f.w.queries {
		q := &f.w.queries[i]
		inv := 1 / q.total
		for j, v := range q.acc {
			q.out[j] = v * inv
		}
	}
	clear(f.w.queries)
}

func (c *compute) StoreKV(layer int, shape kernel.AttnShape, k, v []float32, seqs []kernel.Seq) {
	check.StoreKV(layer, shape, k, v, seqs)
	width := shape.KVHeads * shape.Dim
	for i := range seqs {
		s := &seqs[i]
		for r := range s.Rows {
			pos := s.Pos + r
			keys, values := cached(layer, width, s.Blocks[pos/span])
			at := pos % span * width
			copy(keys[at:][:width], k[(s.Row+r)*width:][:width])
			copy(values[at:][:width], v[(s.Row+r)*width:][:width])
		}
	}
}

// cached returns the keys and the values of one layer in a KV block, [16, KVHeads, Dim] each (model.Text.BlockFloats).
func cached(layer, width int, block []float32) (keys, values []float32) {
	plane := model.BlockTokens * width
	return block[layer*2*plane:][:plane], block[(layer*2+1)*plane:][:plane]
}

func (c *compute) Attention(layer int, shape kernel.AttnShape, out, q []float32, seqs []kernel.Seq) {
	check.Attention(layer, shape, out, q, seqs)
	t := &c.attend
	pieces := t.pieces[:0]
	group := shape.Heads / shape.KVHeads
	rows := max(1, queryGroup/group)
	flops := 0
	for i := range seqs {
		s := &seqs[i]
		flops += 4 * s.Rows * (s.Pos + s.Rows) * shape.Heads * shape.Dim
		for first := 0; first < s.Rows; first += rows {
			for kv := range shape.KVHeads {
				pieces = append(pieces, attendPiece{seq: i, first: first, end: min(first+rows, s.Rows), kv: kv})
			}
		}
	}
	*t = attendTask{c: c, layer: layer, shape: shape, out: out, q: q, seqs: seqs, pieces: pieces}
	t.parts = c.pool.pieces(flops, len(pieces))
	c.pool.do(t, t.parts)
	*t = attendTask{pieces: pieces}
}

// attendTask is one Attention, cut over sequences, rows and KV heads.
type attendTask struct {
	c      *compute
	layer  int
	shape  kernel.AttnShape
	out, q []float32
	seqs   []kernel.Seq
	pieces []attendPiece
	parts  int
}

// attendPiece is rows [first, end) of a sequence and the heads that share KV head kv.
type attendPiece struct {
	seq, first, end, kv int
}

// run takes every parts-th piece: later rows of a sequence have more to read.
func (t *attendTask) run(worker, i int) {
	for ; i < len(t.pieces); i += t.parts {
		t.piece(&t.c.workers[worker], t.pieces[i])
	}
}

func (t *attendTask) piece(w *worker, p attendPiece) {
	s := &t.seqs[p.seq]
	dim, width, group := t.shape.Dim, t.shape.KVHeads*t.shape.Dim, t.shape.Heads/t.shape.KVHeads
	f := w.start(t.c.vec, (p.end-p.first)*group, dim)
	for r := p.first; r < p.end; r++ {
		for h := p.kv * group; h < (p.kv+1)*group; h++ {
			at := ((s.Row+r)*t.shape.Heads + h) * dim
			f.add(t.q[at:][:dim], t.out[at:][:dim], s.Pos+r+1)
		}
	}
	for first := 0; first < s.Pos+p.end; first += span {
		keys, values := cached(t.layer, width, s.Blocks[first/span])
		f.span(first, keys[p.kv*dim:], values[p.kv*dim:], width)
	}
	f.finish()
}

func (c *compute) SegmentAttention(out, qkv []float32, segs []int, heads, dim int) {
	check.SegmentAttention(out, qkv, segs, heads, dim)
	t := &c.segment
	pieces := t.pieces[:0]
	at, flops := 0, 0
	for _, n := range segs {
		flops += 4 * n * n * heads * dim
		for first := 0; first < n; first += queryGroup {
			for h := range heads {
				pieces = append(pieces, segmentPiece{at: at, n: n, first: first, end: min(first+queryGroup, n), head: h})
			}
		}
		at += n
	}
	*t = segmentTask{c: c, out: out, qkv: qkv, heads: heads, dim: dim, pieces: pieces}
	t.parts = c.pool.pieces(flops, len(pieces))
	c.pool.do(t, t.parts)
	*t = segmentTask{pieces: pieces}
}

// segmentTask is one SegmentAttention, cut over segments, rows and heads.
type segmentTask struct {
	c          *compute
	out, qkv   []float32
	heads, dim int
	pieces     []segmentPiece
	parts      int
}

// segmentPiece is rows [first, end) of one head of the segment of n rows that begins at row at.
type segmentPiece struct {
	at, n, first, end, head int
}

func (t *segmentTask) run(worker, i int) {
	for ; i < len(t.pieces); i += t.parts {
		t.piece(&t.c.workers[worker], t.pieces[i])
	}
}

func (t *segmentTask) piece(w *worker, p segmentPiece) {
	width := t.heads * t.dim
	f := w.start(t.c.vec, p.end-p.first, t.dim)
	for r := p.at + p.first; r < p.at+p.end; r++ {
		f.add(t.qkv[r*3*width+p.head*t.dim:][:t.dim], t.out[r*width+p.head*t.dim:][:t.dim], p.n)
	}
	for first := 0; first < p.n; first += span {
		row := t.qkv[(p.at+first)*3*width:]
		f.span(first, row[width+p.head*t.dim:], row[2*width+p.head*t.dim:], 3*width)
	}
	f.finish()
}
