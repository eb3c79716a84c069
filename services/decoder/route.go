package decoder

import (
	"context"
	"slices"
	"time"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/kv"
	"trireme.dev/shared/sched"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/wire"
)

// offered offers a sequence to the decoder in whose memory domain prefill has left its KV, that of an instance which does both, or to
// one on the node where that is, and reports whether that one has taken it. What is wrong with the message, whoever works on it will
// say.
func (d *decoder) offered(ctx context.Context, dl *bus.Delivery, m *wire.Decode) bool {
	far := m.Log.Node != d.HBM.Node()
	if dl.Count > 1 || !d.Offers() || d.Ended(m.Request, m.Choice) || !far && !d.Travels() ||
		!far && slices.ContainsFunc(d.NPUs(), func(n stage.NPU) bool { return n.Compute != nil && !d.HBM.Far(int(m.Log.NPU), n.Number) }) {
		return false
	}
	spec, err := d.Spec(ctx, m.Inline, m.Spec)
	if err != nil {
		return false
	}
	blocks := kv.Blocks(len(spec.Prompt))
	copying := func(known int) time.Duration { // of which whole slabs need not be copied
		return d.CopyTime(int64(blocks-known/kv.SlabBlocks*kv.SlabBlocks) * d.BlockBytes())
	}
	if copying(0) < d.Routing().Least {
		return false
	}
	part := hbm.Part{Request: m.Request.ID, Attempt: m.Request.Attempt, Stage: stage.Decode, Part: m.Choice}
	o := wire.Offer{Level: d.level(m.Request.ID, 1)}
	if far {
		return d.Offer(ctx, dl, part, wire.SubjectNodeOffer(m.Log.Node, stage.Decode), o)
	}
	keys := d.BlockKeys(spec, spec.Prompt)
	at, err := d.HBM.Locate(ctx, stage.Decode, keys[:min(len(keys), stage.Reusable(spec))], m.Log)
	if err != nil {
		return false
	}
	own, others, subjects := d.Sites(&at, func(site *hbm.Site) time.Duration {
		if len(site.Near) > 0 {
			return 0
		}
		return copying(site.Blocks)
	})
	to, _ := d.Routing().Offer(own, 0, others)
	if to < 0 {
		return false
	}
	return d.Offer(ctx, dl, part, subjects[to], o)
}

// level is how busy the process is with other requests than one; taken of its messages are not counted otherwise.
func (d *decoder) level(request string, taken int) int {
	return d.LoadWithout(request).Without(sched.Load{Sequences: taken}).LevelToDecode()
}

// Bid implements stage.Bidder: it takes a sequence if it is no busier than whoever has taken it from the queue, the idlest that
// there was: an answer is longer than any copy.
func (d *decoder) Bid(o *wire.Offer) func(context.Context, *bus.Delivery) {
	var m wire.Decode
	if wire.Unmarshal(o.Data, &m) != nil || d.level(m.Request.ID, 0) > o.Level {
		return nil
	}
	return func(ctx context.Context, dl *bus.Delivery) { d.handle(ctx, dl, &m) }
}
