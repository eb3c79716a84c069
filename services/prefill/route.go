package prefill

import (
	"context"
	"slices"
	"sync"
	"time"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/kv"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/model"
	"trireme.dev/shared/sched"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/wire"
)

// speed is how long steps take, by their rows, as the loop measures it.
type speed struct {
	mu   sync.Mutex
	line sched.Line
}

func (s *speed) add(rows int, took time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.line.Add(rows, took)
}

func (s *speed) at(rows int) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.line.At(rows)
}

// ahead is how long a prompt that is ready has to wait for those in work before it.
func (p *prefill) ahead() time.Duration {
	if n := p.owed.Load(); n > 0 {
		return p.pace.at(int(n))
	}
	return 0
}

// askLeast is how long what is not cached here has to take to compute, for other nodes to be asked whether they have it.
const askLeast = 50 * time.Millisecond

// needs is what a prompt could begin with, and how long it takes where some of that is missing.
type needs struct {
	*prefill
	tokens int // of the prompt
	blocks int // of it that are cached on this node
	mm     []mem.Handle
	ends   []int // of each picture, in the prompt
}

// on is how long it takes on an NPU of this node.
func (n *needs) on(site *hbm.Site) time.Duration {
	bytes := int64(n.blocks-site.Blocks) * n.BlockBytes()
	near := site.Near
	for i, h := range n.mm {
		if len(near) > 0 && near[0] == i {
			near = near[1:]
		} else if n.ends[i] > n.blocks*model.BlockTokens { // else it is not needed
			bytes += h.Bytes
		}
	}
	return n.CopyTime(bytes) + n.pace.at(n.left(n.blocks))
}

// at is how long it takes on a node that has so many blocks; which of its NPUs has them does not matter.
func (n *needs) at(node string, blocks int) time.Duration {
	bytes := int64(0)
	for i, h := range n.mm {
		if h.Node != node && n.ends[i] > blocks*model.BlockTokens {
			bytes += h.Bytes
		}
	}
	return n.CopyTime(bytes) + n.pace.at(n.left(blocks))
}

func (n *needs) left(blocks int) int { return n.tokens - blocks*model.BlockTokens }

// needs is what a prompt with certain block keys could begin with; blocks are not known yet, and reusable are the keys of those that may be cached.
func (p *prefill) needs(spec *wire.Spec, mm []mem.Handle, keys []hbm.Key) (n *needs, reusable []hbm.Key) {
	reusable = keys[:min(len(keys), stage.Reusable(spec))]
	n = &needs{prefill: p, tokens: len(spec.Prompt)}
	for i, h := range mm {
		if h.Kind != 0 {
			pic := &spec.Pictures[i]
			n.mm, n.ends = append(n.mm, h), append(n.ends, pic.Offset+p.Tokens(pic.Grid))
		}
	}
	return n, reusable
}

// most is how many bytes would have to be copied if all of it were cached in one place, elsewhere.
func (n *needs) most(keys int) int64 {
	bytes := int64(keys) * n.BlockBytes()
	for _, h := range n.mm {
		bytes += h.Bytes
	}
	return bytes
}

// near is the NPU of the instance, by its number, where a prompt has to wait least for copies, if that is worth looking for and no other
// NPU has less in work; -1: none. That way a beginning that many prompts have comes to several NPUs when one is not enough. keys are those of
// its blocks.
func (p *prefill) near(ctx context.Context, spec *wire.Spec, mm []mem.Handle, keys []hbm.Key) int {
	if !p.Travels() || len(p.NPUs()) < 2 {
		return -1
	}
	n, reusable := p.needs(spec, mm, keys)
	if p.CopyTime(n.most(len(reusable))) < p.Routing().Least {
		return -1
	}
	at, err := p.HBM.Locate(ctx, stage.Prefill, reusable, n.mm...)
	if err != nil {
		return -1
	}
	n.blocks = at.Blocks
	npu, least, most := -1, sched.Never, time.Duration(0)
	for i := range at.Sites {
		site := &at.Sites[i]
		if site.Instance != p.ID {
			continue
		}
		r := n.on(site)
		if r < least {
			npu, least = site.NPU, r
		}
		most = max(most, r)
	}
	idle := func(slot int) bool { return p.NPUs()[slot].Number == npu }
	if npu < 0 || most-least < p.Routing().Least || !slices.ContainsFunc(p.Idlest(), idle) {
		return -1
	}
	return npu
}

// offered offers a prompt to an instance that has its cached beginning, or its MM objects, in its memory domain or on its node, if
// that is worth the wait there, and reports whether that one has taken it; if not, keys are those of its blocks, where they had to be known.
// What is wrong with the message, whoever works on it will say.
func (p *prefill) offered(ctx context.Context, d *bus.Delivery, m *wire.Prefill) (keys []hbm.Key, taken bool) {
	if d.Count > 1 || !p.Offers() || p.Ended(m.Request, -1) {
		return nil, false
	}
	if !p.Travels() && m.Spec == nil && p.pace.at(len(m.Inline)) < askLeast { // a token is a byte at least
		return nil, false
	}
	spec, err := p.Spec(ctx, m.Inline, m.Spec)
	if err != nil || len(m.MM) != len(spec.Pictures) {
		return nil, false
	}
	keys = p.BlockKeys(spec, spec.Prompt)
	n, reusable := p.needs(spec, m.MM, keys)
	if p.CopyTime(n.most(len(reusable))) < p.Routing().Least && p.pace.at(n.tokens) < askLeast {
		return keys, false
	}
	at, err := p.HBM.Locate(ctx, stage.Prefill, reusable, n.mm...)
	if err != nil {
		return keys, false
	}
	n.blocks = at.Blocks
	own, others, subjects := p.Sites(&at, n.on)
	has := make([]int, len(others)) // blocks, of each
	for i := range has {
		has[i] = n.blocks
	}
	if p.pace.at(n.left(n.blocks)) >= askLeast {
		var ends []hbm.Key // of slabs: fewer, and what is shared is shared by slabs
		for i := kv.SlabBlocks; i <= len(reusable); i += kv.SlabBlocks {
			ends = append(ends, reusable[i-1])
		}
		if node, slabs := p.Reach(ctx, stage.Prefill, ends); slabs > 0 {
			has = append(has, slabs*kv.SlabBlocks)
			others, subjects = append(others, n.at(node, slabs*kv.SlabBlocks)), append(subjects, wire.SubjectNodeOffer(node, stage.Prefill))
		}
	}
	to, wait := p.Routing().Offer(own, p.ahead(), others)
	if to < 0 {
		return keys, false
	}
	part := hbm.Part{Request: m.Request.ID, Attempt: m.Request.Attempt, Stage: stage.Prefill}
	return keys, p.Offer(ctx, d, part, subjects[to], wire.Offer{Wait: wait, Tokens: n.left(has[to])})
}

// Bid implements stage.Bidder: it takes a prompt that has to wait no longer than the offer says, for the prompts before it. How long
// pictures of others would hold it up is not known here.
func (p *prefill) Bid(o *wire.Offer) func(context.Context, *bus.Delivery) {
	var m wire.Prefill
	if wire.Unmarshal(o.Data, &m) != nil || o.Tokens < 0 {
		return nil
	}
	if p.LoadWithout(m.Request.ID).Pictures > 0 || p.ahead() > o.Wait {
		return nil
	}
	p.owed.Add(int64(o.Tokens)) // now: the next offer may come before this one's prompt is looked at
	return func(ctx context.Context, d *bus.Delivery) { p.handle(ctx, d, &m, nil, o.Tokens) }
}

// owe says how many of the job's tokens are to be computed; the loop, or before and after it the handler, calls it.
func (p *prefill) owe(j *job, tokens int) {
	p.owed.Add(int64(tokens - j.owes))
	j.owes = tokens
}
