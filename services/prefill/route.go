package prefill

import (
	"context"
	"sync"
	"time"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/hbm"
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

// offered offers a prompt to the instance that has its cached beginning, or its MM objects, in its memory domain, if that is worth
// the wait there, and reports whether that one has taken it. What is wrong with the message, whoever works on it will say.
func (p *prefill) offered(ctx context.Context, d *bus.Delivery, m *wire.Prefill) bool {
	if d.Count > 1 || !p.Travels() || p.Ended(m.Request, -1) {
		return false
	}
	spec, err := p.Spec(ctx, m.Inline, m.Spec)
	if err != nil || len(m.MM) != len(spec.Pictures) {
		return false
	}
	keys := p.BlockKeys(spec, spec.Prompt)
	keys = keys[:min(len(keys), stage.Reusable(spec))]
	most := int64(len(keys)) * p.BlockBytes()
	var mm []mem.Handle
	var ends []int // in the prompt, of each
	for i, h := range m.MM {
		if h.Kind != 0 && h.Node == p.HBM.Node() {
			pic := &spec.Pictures[i]
			mm, ends = append(mm, h), append(ends, pic.Offset+p.Tokens(pic.Grid))
			most += h.Bytes
		}
	}
	if p.CopyTime(most) < p.Routing().Least {
		return false
	}
	at, err := p.HBM.Locate(ctx, stage.Prefill, keys, mm...)
	if err != nil {
		return false
	}
	cached := at.Blocks * model.BlockTokens
	ready := func(site *hbm.Site) time.Duration {
		bytes := int64(at.Blocks-site.Blocks) * p.BlockBytes()
		near := site.Near
		for i, h := range mm {
			if len(near) > 0 && near[0] == i {
				near = near[1:]
			} else if ends[i] > cached { // else it is not needed
				bytes += h.Bytes
			}
		}
		return p.CopyTime(bytes)
	}
	own, others, instances := p.Sites(&at, ready)
	to, wait := p.Routing().Offer(own, p.ahead(), others)
	if to < 0 {
		return false
	}
	part := hbm.Part{Request: m.Request.ID, Attempt: m.Request.Attempt, Stage: stage.Prefill}
	return p.Offer(ctx, d, part, instances[to], wire.Offer{Wait: wait, Tokens: len(spec.Prompt) - cached})
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
	return func(ctx context.Context, d *bus.Delivery) { p.handle(ctx, d, &m, o.Tokens) }
}

// owe says how many of the job's tokens are to be computed; the loop, or before and after it the handler, calls it.
func (p *prefill) owe(j *job, tokens int) {
	p.owed.Add(int64(tokens - j.owes))
	j.owes = tokens
}
