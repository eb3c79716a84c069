package engine

import (
	"sync/atomic"

	"trireme.dev/shared/kernel"
	"trireme.dev/shared/model"
)

// part is what one NPU has of a Text and does in a batch. Parts run beside each other, each on a goroutine of its own; that of
// the first NPU is the caller of Forward. They meet twice in each mixture-of-experts layer, and at the end.
type part struct {
	t     *Text
	npu   int // its slot
	place int // in Text.parts
	w     *model.Weights
	c     kernel.Compute
	meter kernel.Meter  // c, if it is one
	wake  chan struct{} // a token a batch; not for the first NPU

	// Device scratch for lim.Rows rows; with behind them what comes from other NPUs for experts here.
	memory scratch
	hidden []float32 // [rows, Hidden]: the residual stream
	normed []float32 // [rows of all NPUs, Hidden]
	query  []float32 // [rows, Heads, HeadDim]
	key    []float32 // [rows, KVHeads, HeadDim]
	value  []float32 // [rows, KVHeads, HeadDim]
	mixed  []float32 // [rows, Heads, HeadDim]: attention's output
	delta  []float32 // [rows, Hidden]: what a sublayer adds to hidden
	router []float32 // [rows, Experts]
	slots  []float32 // [rows of all NPUs * TopK, Hidden]: experts' outputs
	gate   []float32 // [rows, DenseHidden]
	up     []float32 // [rows, DenseHidden]
	logits []float32 // [lim.Seqs, Vocab]

	// Host scratch.
	ids       []int32
	cos, sin  []float32 // [rows, HeadDim/2]
	experts   []int32   // [rows of all NPUs, TopK]
	weights   []float32 // [rows, TopK]
	hostLogit []float32 // [lim.Seqs, Vocab]
	exchange

	// The batch being computed.
	own    []int        // its sequences of this NPU
	rows   int          // rows of hidden in use
	wanted int          // rows whose logits are wanted
	planes int          // most planes of a Visual
	seqs   []kernel.Seq // the kernels' view of own; fewer once narrowed

	load []atomic.Uint64 // [Layers, Experts]: rows that went to each expert from here, ever
}

// newPart allocates the scratch of npus[npu], which are count without the empty slots.
func newPart(t *Text, npu int, npus []NPU, count int) *part {
	n := &npus[npu]
	m, c, lim := &t.cfg, n.Compute, t.lim
	p := &part{
		t: t, npu: npu, place: len(t.parts), c: c, wake: make(chan struct{}, 1), memory: scratch{c: c},

		ids:       make([]int32, 0, lim.Rows),
		cos:       make([]float32, lim.Rows*m.HeadDim/2),
		sin:       make([]float32, lim.Rows*m.HeadDim/2),
		hostLogit: make([]float32, lim.Seqs*m.Vocab),
		own:       make([]int, 0, lim.Seqs),
		seqs:      make([]kernel.Seq, 0, lim.Seqs),
	}
	p.hidden = p.memory.alloc(lim.Rows * m.Hidden)
	p.normed = p.memory.alloc(count * lim.Rows * m.Hidden)
	p.query = p.memory.alloc(lim.Rows * m.Heads * m.HeadDim)
	p.key = p.memory.alloc(lim.Rows * m.KVHeads * m.HeadDim)
	p.value = p.memory.alloc(lim.Rows * m.KVHeads * m.HeadDim)
	p.mixed = p.memory.alloc(lim.Rows * m.Heads * m.HeadDim)
	p.delta = p.memory.alloc(lim.Rows * m.Hidden)
	p.logits = p.memory.alloc(lim.Seqs * m.Vocab)
	p.meter, _ = c.(kernel.Meter)
	for _, d := range m.Dense {
		if d && p.gate == nil {
			p.gate, p.up = p.memory.alloc(lim.Rows*m.DenseHidden), p.memory.alloc(lim.Rows*m.DenseHidden)
		}
	}
	if m.Experts > 0 {
		p.router = p.memory.alloc(lim.Rows * m.Experts)
		p.slots = p.memory.alloc(count * lim.Rows * m.TopK * m.Hidden)
		p.experts = make([]int32, count*lim.Rows*m.TopK)
		p.weights = make([]float32, lim.Rows*m.TopK)
		p.load = make([]atomic.Uint64, m.Layers*m.Experts)
		if count > 1 {
			p.exchange = newExchange(npus, count*lim.Rows, lim.Rows, m.TopK)
		}
	}
	return p
}

// begin empties the part of the batch; take adds sequence i of it.
func (p *part) begin() {
	p.own, p.seqs = p.own[:0], p.seqs[:0]
	p.rows, p.wanted, p.planes = 0, 0, 0
}

func (p *part) take(i int, s *Seq) {
	p.own = append(p.own, i)
	p.seqs = append(p.seqs, kernel.Seq{Row: p.rows, Rows: len(s.Tokens), Pos: s.Pos, Blocks: s.Blocks})
	p.rows += len(s.Tokens)
	p.wanted += s.wanted()
	for j := range s.Visual {
		p.planes = max(p.planes, len(s.Visual[j].Planes))
	}
}

// forget drops the caller's slices.
func (p *part) forget() { clear(p.seqs[:cap(p.seqs)]) }

// forward computes the part of the batch, and other NPUs' rows for the experts that are here.
func (p *part) forward() {
	metered := p.meter != nil && p.rows > 0
	if metered {
		p.meter.Begin(p.work())
	}
	p.angles()
	p.embed()
	last := p.t.cfg.Layers - 1
	for i := range last {
		p.keys(i)
		p.attend(i)
		p.feed(i)
		p.deepStack(i)
	}
	// Behind the last layer's keys and values only the rows whose logits are wanted matter.
	p.keys(last)
	whole := p.t.observe != nil || p.planes > p.t.cfg.Layers
	if !whole {
		p.narrow()
	}
	p.attend(last)
	p.feed(last)
	if whole {
		p.deepStack(last)
		p.narrow()
	}
	p.head()
	if metered {
		p.meter.End()
	}
	p.t.meet.wait(p.place)
}

// keys normalises hidden into normed and stores the layer's keys and values.
func (p *part) keys(layer int) {
	cfg, c, l, n := &p.t.cfg, p.c, &p.w.Layers[layer], p.rows
	if n == 0 {
		return
	}
	kv := cfg.KVHeads * cfg.HeadDim
	normed, key, value := p.normed[:n*cfg.Hidden], p.key[:n*kv], p.value[:n*kv]
	c.RMSNorm(normed, p.hidden[:n*cfg.Hidden], n, l.InNorm, cfg.RMSEps)
	c.Linear(key, normed, n, l.K, l.KBias)
	c.Linear(value, normed, n, l.V, l.VBias)
	p.turn(key, cfg.KVHeads, l.KNorm)
	c.StoreKV(layer, p.t.shape, key, value, p.seqs)
}

// attend adds the layer's attention to hidden; keys has run.
func (p *part) attend(layer int) {
	cfg, c, l, n := &p.t.cfg, p.c, &p.w.Layers[layer], p.rows
	if n == 0 {
		return
	}
	width := cfg.Heads * cfg.HeadDim
	query, mixed, delta := p.query[:n*width], p.mixed[:n*width], p.delta[:n*cfg.Hidden]
	c.Linear(query, p.normed[:n*cfg.Hidden], n, l.Q, l.QBias)
	p.turn(query, cfg.Heads, l.QNorm)
	c.Attention(layer, p.t.shape, mixed, query, p.seqs)
	c.Linear(delta, mixed, n, l.O, nil)
	c.Add(p.hidden[:n*cfg.Hidden], delta)
}

// turn applies the per-head norm, where the model has one, and the rotary embedding to x [rows, heads, HeadDim].
func (p *part) turn(x []float32, heads int, norm []float32) {
	n, dim := p.rows, p.t.cfg.HeadDim
	if p.t.cfg.QKNorm {
		p.c.RMSNorm(x, x, n*heads, norm, p.t.cfg.RMSEps)
	}
	p.c.Rotate(x, n, heads*dim, heads, dim, p.cos[:n*dim/2], p.sin[:n*dim/2])
}

// feed adds the layer's MLP or mixture of experts to hidden.
func (p *part) feed(layer int) {
	t, cfg, c, l, n := p.t, &p.t.cfg, p.c, &p.w.Layers[layer], p.rows
	hidden, normed := p.hidden[:n*cfg.Hidden], p.normed[:n*cfg.Hidden]
	if n > 0 {
		c.RMSNorm(normed, hidden, n, l.PostNorm, cfg.RMSEps)
	}
	if l.Dense != nil {
		if n > 0 {
			gate, up, delta := p.gate[:n*cfg.DenseHidden], p.up[:n*cfg.DenseHidden], p.delta[:n*cfg.Hidden]
			c.Linear(gate, normed, n, l.Dense.Gate, nil)
			c.Linear(up, normed, n, l.Dense.Up, nil)
			c.SiLUMul(gate, up)
			c.Linear(delta, gate, n, l.Dense.Down, nil)
			c.Add(hidden, delta)
		}
		return
	}
	k := cfg.TopK
	weights := p.weights[:n*k]
	if n > 0 {
		router, ids := p.router[:n*cfg.Experts], p.experts[:n*k]
		c.Linear(router, normed, n, l.Router, nil)
		if t.observe != nil {
			host := t.routerLogit[:len(router)]
			c.Download(host, router)
			t.observe(layer, host)
		}
		c.Route(router, n, cfg.Experts, k, cfg.NormTopK, ids, weights)
		p.count(layer, ids)
	}
	p.dispatch(layer)
	if n > 0 {
		c.Combine(hidden, p.slots[:n*k*cfg.Hidden], n, k, weights)
	}
}

// head computes the logits of the rows left in hidden and hands them out to their sequences.
func (p *part) head() {
	cfg, c, n := &p.t.cfg, p.c, p.rows
	if n == 0 {
		return
	}
	normed, logits, host := p.normed[:n*cfg.Hidden], p.logits[:n*cfg.Vocab], p.hostLogit[:n*cfg.Vocab]
	c.RMSNorm(normed, p.hidden[:n*cfg.Hidden], n, p.w.Norm, cfg.RMSEps)
	c.Linear(logits, normed, n, p.w.LMHead, nil)
	c.Download(host, logits)
	row := 0
	for _, i := range p.own {
		if k := p.t.batch[i].wanted(); k > 0 {
			p.t.out[i] = host[row*cfg.Vocab : (row+k)*cfg.Vocab : (row+k)*cfg.Vocab]
			row += k
		}
	}
}
