package engine

import (
	"cmp"
	"fmt"

	"trireme.dev/shared/kernel"
	"trireme.dev/shared/model"
)

// patchTableBudget bounds the cached position tables of an Encoder, in float32 (64 MiB).
const patchTableBudget = 16 << 20

// Encoder is the vision encoder: it turns the patches of one picture into multimodal tokens, the merged embeddings and
// one plane for each DeepStack tap (Qwen3VLMoeVisionModel). It is used by one goroutine at a time.
type Encoder struct {
	v      *model.Vision
	w      *model.VisionWeights
	c      kernel.Compute
	meter  kernel.Meter // c, if it is one
	limit  int          // patches
	tables *patchTables
	segs   []int

	// The picture being computed.
	out   []float32
	grid  Grid
	table *patchTable
	next  int // the block that comes next; len(w.Blocks): what follows the last

	// Device scratch for limit patches.
	memory  scratch
	pixels  []float32 // [patches, PatchDim]
	hidden  []float32 // [patches, Hidden]: the residual stream
	normed  []float32 // [patches, Hidden]
	qkv     []float32 // [patches, 3*Hidden]
	mixed   []float32 // [patches, Hidden]: attention's output
	inner   []float32 // [patches, MLP]
	joined  []float32 // [tokens, Hidden*Merge*Merge]: a merger's input after its norm
	squeeze []float32 // [tokens, Hidden*Merge*Merge]: a merger's inner layer
}

// NewEncoder prepares an encoder for pictures of at most maxPatches patches. It allocates its scratch from c, which
// must outlive it, and keeps w. It returns ErrModel when the model has no vision part or its weights do not fit, and
// kernel.ErrNoMemory when there is no room.
func NewEncoder(cfg model.Config, w *model.Weights, c kernel.Compute, maxPatches int) (*Encoder, error) {
	v := cfg.Vision
	if v == nil || w.Vision == nil {
		return nil, fmt.Errorf("%w: %s has no vision encoder", ErrModel, cfg.Name)
	}
	side, err := checkVision(v, w.Vision)
	if err != nil {
		return nil, fmt.Errorf("vision encoder of %s: %w", cfg.Name, err)
	}
	if maxPatches < v.Merge*v.Merge {
		return nil, fmt.Errorf("vision encoder of %s: room for %d patches is less than one token", cfg.Name, maxPatches)
	}
	n := maxPatches
	e := &Encoder{
		v: v, w: w.Vision, c: c, limit: n, memory: scratch{c: c},
	}
	e.pixels = e.memory.alloc(n * v.PatchDim())
	e.hidden = e.memory.alloc(n * v.Hidden)
	e.normed = e.memory.alloc(n * v.Hidden)
	e.qkv = e.memory.alloc(n * 3 * v.Hidden)
	e.mixed = e.memory.alloc(n * v.Hidden)
	e.inner = e.memory.alloc(n * v.MLP)
	e.joined = e.memory.alloc(n * v.Hidden)
	e.squeeze = e.memory.alloc(n * v.Hidden)
	table, err := widen(c, w.Vision.PosEmbed)
	if err = cmp.Or(e.memory.err, err); err != nil {
		e.Close()
		return nil, fmt.Errorf("vision encoder of %s: %w", cfg.Name, err)
	}
	e.tables = &patchTables{
		v: v, side: side, embed: table,
		inv:    inverseFrequencies(v.Theta, v.Hidden/v.Heads/2),
		budget: patchTableBudget,
	}
	e.meter, _ = c.(kernel.Meter)
	return e, nil
}

// Close gives the scratch back. No call may follow.
func (e *Encoder) Close() { e.memory.free() }

// widen brings a device matrix to the host as float32.
func widen(c kernel.Compute, m model.Matrix) ([]float32, error) {
	ids := make([]int32, m.Rows)
	for i := range ids {
		ids[i] = int32(i)
	}
	device, err := c.Alloc(m.Rows * m.Cols)
	if err != nil {
		return nil, err
	}
	defer c.Free(device)
	host := make([]float32, m.Rows*m.Cols)
	c.Embed(device, m, ids)
	c.Download(host, device)
	return host, nil
}

// Tokens is the number of multimodal tokens of a picture.
func (e *Encoder) Tokens(grid Grid) int { return grid.Tokens(e.v.Merge) }

// Floats is the size of Encode's output for a picture, in float32.
func (e *Encoder) Floats(grid Grid) int { return e.v.Levels() * e.Tokens(grid) * e.v.Out }

// Encode computes the multimodal tokens of one picture: Begin, and Next to the end.
func (e *Encoder) Encode(out, pixels []float32, grid Grid) error {
	if err := e.Begin(out, pixels, grid); err != nil {
		return err
	}
	for e.Next() {
	}
	return nil
}

// Begin begins the computation of the multimodal tokens of one picture, of which Next does a piece at a time. pixels is
// host memory, [patches, PatchDim] in merge-block order, as the processor of transformers gives them. out is device memory,
// [levels, tokens, Out], complete after the last Next: plane 0 holds the merged embeddings, plane i the DeepStack tap i-1.
// Both belong to the caller and have to stay until then, or until another picture is begun: this one is given up then. Begin returns ErrGrid when
// the grid is empty, not a multiple of Merge, or larger than the encoder, or when a buffer has another length. It allocates
// only for a grid it has not seen lately.
func (e *Encoder) Begin(out, pixels []float32, grid Grid) error {
	n := grid.Patches()
	switch {
	case grid.T <= 0 || grid.H <= 0 || grid.W <= 0 || grid.H%e.v.Merge != 0 || grid.W%e.v.Merge != 0:
		return fmt.Errorf("%w: %d x %d x %d patches, merged by %d", ErrGrid, grid.T, grid.H, grid.W, e.v.Merge)
	case n > e.limit:
		return fmt.Errorf("%w: %d patches, the encoder has room for %d", ErrGrid, n, e.limit)
	case len(pixels) != n*e.v.PatchDim():
		return fmt.Errorf("%w: %d samples for %d patches of %d", ErrGrid, len(pixels), n, e.v.PatchDim())
	case len(out) != e.Floats(grid):
		return fmt.Errorf("%w: room for %d float32, %d needed", ErrGrid, len(out), e.Floats(grid))
	}
	e.out, e.grid, e.next = out, grid, 0
	e.table = e.tables.get(grid.H, grid.W)
	e.segs = e.segs[:0]
	for range grid.T {
		e.segs = append(e.segs, grid.H*grid.W)
	}
	e.embed(pixels, n, e.table)
	return nil
}

// Pieces is how often Next is called for a picture.
func (e *Encoder) Pieces() int { return len(e.w.Blocks) + 1 }

// Next does the next piece of the picture that was begun, a transformer block with its DeepStack tap or the last merger,
// and reports whether there is more to do.
func (e *Encoder) Next() (more bool) {
	n, tokens := e.grid.Patches(), e.Tokens(e.grid)
	plane := tokens * e.v.Out
	if e.meter != nil {
		e.meter.Begin(kernel.Work{Tokens: tokens, Parts: e.Pieces()})
		defer e.meter.End()
	}
	if i := e.next; i < len(e.w.Blocks) {
		e.block(&e.w.Blocks[i], n, e.table)
		for tap, after := range e.v.DeepStack {
			if after == i {
				e.mergeTap(e.out[(1+tap)*plane:(2+tap)*plane], &e.w.DeepStack[tap], tokens)
			}
		}
		e.next++
		return true
	}
	e.mergeMain(e.out[:plane], n, tokens)
	e.out, e.table = nil, nil
	return false
}

// embed fills hidden with patch embeddings plus position embeddings.
func (e *Encoder) embed(pixels []float32, n int, table *patchTable) {
	c, hidden := e.c, e.hidden[:n*e.v.Hidden]
	c.Upload(e.pixels[:len(pixels)], pixels)
	c.Linear(hidden, e.pixels[:len(pixels)], n, e.w.PatchEmbed, e.w.PatchBias)
	pos := e.normed[:n*e.v.Hidden]
	for at := 0; at < len(pos); at += len(table.pos) {
		c.Upload(pos[at:at+len(table.pos)], table.pos)
	}
	c.Add(hidden, pos)
}

// block runs one transformer block over hidden: attention inside each frame, then the MLP, both pre-norm
// (Qwen3VLMoeVisionBlock).
func (e *Encoder) block(b *model.VisionBlock, n int, table *patchTable) {
	c, v := e.c, e.v
	dim := v.Hidden / v.Heads
	hidden, normed, mixed := e.hidden[:n*v.Hidden], e.normed[:n*v.Hidden], e.mixed[:n*v.Hidden]
	qkv, inner := e.qkv[:n*3*v.Hidden], e.inner[:n*v.MLP]

	c.LayerNorm(normed, hidden, n, b.Norm1, b.Norm1Bias, v.LayerEps)
	c.Linear(qkv, normed, n, b.QKV, b.QKVBias)
	frame := table.rows * table.cols
	for at := 0; at < n; at += frame { // queries and keys lie side by side and turn alike
		c.Rotate(qkv[at*3*v.Hidden:(at+frame)*3*v.Hidden], frame, 3*v.Hidden, 2*v.Heads, dim, table.cos, table.sin)
	}
	c.SegmentAttention(mixed, qkv, e.segs, v.Heads, dim)
	c.Linear(normed, mixed, n, b.Proj, b.ProjBias)
	c.Add(hidden, normed)

	c.LayerNorm(normed, hidden, n, b.Norm2, b.Norm2Bias, v.LayerEps)
	c.Linear(inner, normed, n, b.FC1, b.FC1Bias)
	c.GELU(inner, true)
	c.Linear(normed, inner, n, b.FC2, b.FC2Bias)
	c.Add(hidden, normed)
}

// mergeMain writes the merged embeddings of hidden: norm of each patch, then join.
func (e *Encoder) mergeMain(out []float32, n, tokens int) {
	m := &e.w.Merger
	e.c.LayerNorm(e.joined[:n*e.v.Hidden], e.hidden[:n*e.v.Hidden], n, m.Norm, m.NormBias, e.v.LayerEps)
	e.squash(out, m, tokens)
}

// mergeTap writes one DeepStack plane from hidden: join, then norm of the joined patches (use_postshuffle_norm).
func (e *Encoder) mergeTap(out []float32, m *model.Merger, tokens int) {
	n := tokens * len(m.Norm)
	e.c.LayerNorm(e.joined[:n], e.hidden[:n], tokens, m.Norm, m.NormBias, e.v.LayerEps)
	e.squash(out, m, tokens)
}

// squash runs the two layers of a merger over joined.
func (e *Encoder) squash(out []float32, m *model.Merger, tokens int) {
	n := tokens * m.FC1.Rows
	e.c.Linear(e.squeeze[:n], e.joined[:n], tokens, m.FC1, m.FC1Bias)
	e.c.GELU(e.squeeze[:n], false)
	e.c.Linear(out, e.squeeze[:n], tokens, m.FC2, m.FC2Bias)
}
