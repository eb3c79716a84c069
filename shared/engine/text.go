package engine

import (
	"fmt"
	"sync/atomic"

	"trireme.dev/shared/kernel"
	"trireme.dev/shared/model"
)

// Text is the language model: a decoder with grouped-query attention over paged KV and mixture-of-experts layers
// (Qwen3VLMoeTextModel, Qwen3MoeModel). It is used by one goroutine at a time.
type Text struct {
	cfg    model.Text
	w      *model.Weights
	c      kernel.Compute
	meter  kernel.Meter // c, if it is one
	lim    Limits
	shape  kernel.AttnShape
	rotary rotary

	table  atomic.Pointer[[][]model.Expert] // where the experts lie: [Layers][Experts]
	placed [][]model.Expert                 // the table of the batch being computed

	// Device scratch for lim.Rows rows.
	hidden []float32 // [rows, Hidden]: the residual stream
	normed []float32 // [rows, Hidden]
	query  []float32 // [rows, Heads, HeadDim]
	key    []float32 // [rows, KVHeads, HeadDim]
	value  []float32 // [rows, KVHeads, HeadDim]
	mixed  []float32 // [rows, Heads, HeadDim]: attention's output
	delta  []float32 // [rows, Hidden]: what a sublayer adds to hidden
	router []float32 // [rows, Experts]
	slots  []float32 // [rows*TopK, Hidden]: experts' outputs
	gate   []float32 // [rows, DenseHidden]
	up     []float32 // [rows, DenseHidden]
	logits []float32 // [lim.Seqs, Vocab]

	// Host scratch.
	ids       []int32
	cos, sin  []float32 // [rows, HeadDim/2]
	experts   []int32   // [rows, TopK]
	weights   []float32 // [rows, TopK]
	hostLogit []float32 // [lim.Seqs, Vocab]
	out       [][]float32

	// The batch being computed.
	rows   int          // rows of hidden in use
	planes int          // most planes of a Visual
	seqs   []kernel.Seq // its sequences; fewer once narrowed

	observe     func(layer int, routerLogits []float32)
	routerLogit []float32 // host, for observe
}

// NewText prepares the language model for batches within lim. It allocates its scratch from c, which must outlive it,
// and keeps w. It returns ErrModel when the weights do not fit the configuration.
func NewText(cfg model.Config, w *model.Weights, c kernel.Compute, lim Limits) (*Text, error) {
	if err := checkText(&cfg.Text, w); err != nil {
		return nil, fmt.Errorf("language model of %s: %w", cfg.Name, err)
	}
	if lim.Rows <= 0 || lim.Seqs <= 0 {
		return nil, fmt.Errorf("language model of %s: batches of %d rows and %d sequences", cfg.Name, lim.Rows, lim.Seqs)
	}
	m := cfg.Text
	dense := false
	for _, d := range m.Dense {
		dense = dense || d
	}
	t := &Text{
		cfg: m, w: w, c: c, lim: lim,
		shape:  kernel.AttnShape{Layers: m.Layers, Heads: m.Heads, KVHeads: m.KVHeads, Dim: m.HeadDim},
		rotary: newRotary(m.Rope, m.HeadDim),

		hidden: c.Alloc(lim.Rows * m.Hidden),
		normed: c.Alloc(lim.Rows * m.Hidden),
		query:  c.Alloc(lim.Rows * m.Heads * m.HeadDim),
		key:    c.Alloc(lim.Rows * m.KVHeads * m.HeadDim),
		value:  c.Alloc(lim.Rows * m.KVHeads * m.HeadDim),
		mixed:  c.Alloc(lim.Rows * m.Heads * m.HeadDim),
		delta:  c.Alloc(lim.Rows * m.Hidden),
		logits: c.Alloc(lim.Seqs * m.Vocab),

		ids:       make([]int32, 0, lim.Rows),
		cos:       make([]float32, lim.Rows*m.HeadDim/2),
		sin:       make([]float32, lim.Rows*m.HeadDim/2),
		hostLogit: make([]float32, lim.Seqs*m.Vocab),
		out:       make([][]float32, 0, lim.Seqs),
		seqs:      make([]kernel.Seq, 0, lim.Seqs),
	}
	if dense {
		t.gate, t.up = c.Alloc(lim.Rows*m.DenseHidden), c.Alloc(lim.Rows*m.DenseHidden)
	}
	if m.Experts > 0 {
		t.router = c.Alloc(lim.Rows * m.Experts)
		t.slots = c.Alloc(lim.Rows * m.TopK * m.Hidden)
		t.experts = make([]int32, lim.Rows*m.TopK)
		t.weights = make([]float32, lim.Rows*m.TopK)
	}
	table := make([][]model.Expert, m.Layers)
	for i := range w.Layers {
		table[i] = w.Layers[i].Experts
	}
	t.table.Store(&table)
	t.meter, _ = c.(kernel.Meter)
	return t, nil
}

// SetExperts has batches from the next Forward on find the experts in other memory: table[layer] has one entry for each
// expert, none in a dense layer. A Forward that runs meanwhile ends with the table that it began with, and the memory of
// that must stay as long. It keeps table, may be called from any goroutine, and returns ErrModel, changing nothing, when the
// shapes are not the model's.
func (t *Text) SetExperts(table [][]model.Expert) error {
	if err := checkExperts(&t.cfg, table); err != nil {
		return fmt.Errorf("other experts: %w", err)
	}
	t.table.Store(&table)
	return nil
}

// Limits returns the limits the Text was made for.
func (t *Text) Limits() Limits { return t.lim }

// Observe has f called with the router logits of each mixture-of-experts layer, [rows of the batch, Experts], host
// memory valid during the call. It is for tests and verification: with f set, Forward computes all rows of the last
// layer too. A nil f ends it.
func (t *Text) Observe(f func(layer int, routerLogits []float32)) {
	t.observe = f
	if f != nil && t.routerLogit == nil {
		t.routerLogit = make([]float32, t.lim.Rows*t.cfg.Experts)
	}
}

// Forward computes one batch: it writes keys and values of all new tokens into their blocks and returns the logits
// that are wanted. logits[i] belongs to seqs[i] and is nil, [Vocab] (Want) or [len(Tokens), Vocab] (All), host memory
// valid until the next call. It returns ErrBatch, before anything is computed, when the batch is malformed or over the
// limits. It allocates nothing. The result for a sequence does not depend on the others in the batch, nor on how its
// prompt was cut into chunks (kernel, Batch invariance).
func (t *Text) Forward(seqs []Seq) (logits [][]float32, err error) {
	if err := t.plan(seqs); err != nil {
		return nil, err
	}
	defer t.forget()
	t.out = t.out[:len(seqs)]
	clear(t.out)
	if t.rows == 0 {
		return t.out, nil
	}
	if t.meter != nil {
		t.meter.Begin(work(seqs))
		defer t.meter.End()
	}
	t.placed = *t.table.Load()
	t.embed(seqs)
	last := t.cfg.Layers - 1
	for i := range last {
		t.keys(i)
		t.attend(i)
		t.feed(i)
		t.deepStack(seqs, i)
	}
	// Behind the last layer's keys and values only the rows whose logits are wanted matter.
	t.keys(last)
	whole := t.observe != nil || t.planes > t.cfg.Layers
	if !whole {
		t.narrow(seqs)
	}
	if t.rows > 0 {
		t.attend(last)
		t.feed(last)
	}
	if whole {
		t.deepStack(seqs, last)
		t.narrow(seqs)
	}
	if t.rows > 0 {
		t.head(seqs)
	}
	return t.out, nil
}

// forget drops the caller's slices.
func (t *Text) forget() { clear(t.seqs[:cap(t.seqs)]) }

// keys normalises hidden into normed and stores the layer's keys and values.
func (t *Text) keys(layer int) {
	c, l, n, kv := t.c, &t.w.Layers[layer], t.rows, t.cfg.KVHeads*t.cfg.HeadDim
	normed, key, value := t.normed[:n*t.cfg.Hidden], t.key[:n*kv], t.value[:n*kv]
	c.RMSNorm(normed, t.hidden[:n*t.cfg.Hidden], n, l.InNorm, t.cfg.RMSEps)
	c.Linear(key, normed, n, l.K, l.KBias)
	c.Linear(value, normed, n, l.V, l.VBias)
	t.turn(key, t.cfg.KVHeads, l.KNorm)
	c.StoreKV(layer, t.shape, key, value, t.seqs)
}

// attend adds the layer's attention to hidden; keys has run.
func (t *Text) attend(layer int) {
	c, l, n, width := t.c, &t.w.Layers[layer], t.rows, t.cfg.Heads*t.cfg.HeadDim
	query, mixed, delta := t.query[:n*width], t.mixed[:n*width], t.delta[:n*t.cfg.Hidden]
	c.Linear(query, t.normed[:n*t.cfg.Hidden], n, l.Q, l.QBias)
	t.turn(query, t.cfg.Heads, l.QNorm)
	c.Attention(layer, t.shape, mixed, query, t.seqs)
	c.Linear(delta, mixed, n, l.O, nil)
	c.Add(t.hidden[:n*t.cfg.Hidden], delta)
}

// turn applies the per-head norm, where the model has one, and the rotary embedding to x [rows, heads, HeadDim].
func (t *Text) turn(x []float32, heads int, norm []float32) {
	n, dim := t.rows, t.cfg.HeadDim
	if t.cfg.QKNorm {
		t.c.RMSNorm(x, x, n*heads, norm, t.cfg.RMSEps)
	}
	t.c.Rotate(x, n, heads*dim, heads, dim, t.cos[:n*dim/2], t.sin[:n*dim/2])
}

// feed adds the layer's MLP or mixture of experts to hidden.
func (t *Text) feed(layer int) {
	c, l, n := t.c, &t.w.Layers[layer], t.rows
	hidden, normed := t.hidden[:n*t.cfg.Hidden], t.normed[:n*t.cfg.Hidden]
	c.RMSNorm(normed, hidden, n, l.PostNorm, t.cfg.RMSEps)
	if l.Dense != nil {
		gate, up, delta := t.gate[:n*t.cfg.DenseHidden], t.up[:n*t.cfg.DenseHidden], t.delta[:n*t.cfg.Hidden]
		c.Linear(gate, normed, n, l.Dense.Gate, nil)
		c.Linear(up, normed, n, l.Dense.Up, nil)
		c.SiLUMul(gate, up)
		c.Linear(delta, gate, n, l.Dense.Down, nil)
		c.Add(hidden, delta)
		return
	}
	k := t.cfg.TopK
	router, slots := t.router[:n*t.cfg.Experts], t.slots[:n*k*t.cfg.Hidden]
	ids, weights := t.experts[:n*k], t.weights[:n*k]
	c.Linear(router, normed, n, l.Router, nil)
	if t.observe != nil {
		host := t.routerLogit[:len(router)]
		c.Download(host, router)
		t.observe(layer, host)
	}
	c.Route(router, n, t.cfg.Experts, k, t.cfg.NormTopK, ids, weights)
	c.Experts(slots, normed, n, k, ids, t.placed[layer])
	c.Combine(hidden, slots, n, k, weights)
}

// head computes the logits of the rows left in hidden and hands them out to their sequences.
func (t *Text) head(seqs []Seq) {
	c, n := t.c, t.rows
	normed, logits, host := t.normed[:n*t.cfg.Hidden], t.logits[:n*t.cfg.Vocab], t.hostLogit[:n*t.cfg.Vocab]
	c.RMSNorm(normed, t.hidden[:n*t.cfg.Hidden], n, t.w.Norm, t.cfg.RMSEps)
	c.Linear(logits, normed, n, t.w.LMHead, nil)
	c.Download(host, logits)
	row := 0
	for i := range seqs {
		if k := seqs[i].wanted(); k > 0 {
			t.out[i] = host[row*t.cfg.Vocab : (row+k)*t.cfg.Vocab : (row+k)*t.cfg.Vocab]
			row += k
		}
	}
}
