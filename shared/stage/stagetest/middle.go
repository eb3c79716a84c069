package stagetest

import (
	"encoding/json"
	"fmt"
	"math"
	"time"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/kernel"
)

// Middle is a moment in the middle of a computation: of the first step, or piece of a picture, that is as it says.
type Middle struct {
	Seqs  int // a step of so many sequences or more
	Rows  int // and of so many tokens or more
	After int // such steps before it
	Piece int // the so-manieth piece of a picture, from 1; then the others do not count
}

func (m *Middle) text() string {
	data, err := json.Marshal(m)
	if err != nil {
		panic("BUG: " + err.Error())
	}
	return string(data)
}

// KillInTheMiddle starts a stage process and kills it in the middle of what it computes: for what it has stored keys and values in
// the first layers, and not in the others, or has computed part of a block of a picture. It then works on so many messages of its
// stage, and has claimed all that it has taken.
func (r *Rig) KillInTheMiddle(role string, messages int, m Middle) {
	r.tb.Helper()
	p := r.ProcessWith(m)
	r.Until("the process is in the middle", p.Holds)
	r.Until("it has claimed what it has taken", func() bool {
		_, taken := r.Queue(role)
		return taken >= messages && r.Stats().Claims == taken
	})
	before := r.Stats().Connections
	p.KillAtWork(role)
	r.Until("the HMM has noticed", func() bool { return r.Stats().Connections < before })
}

// Left is what a process that has died left of parts: the claims that the next holder would have, which are given up again. It
// hands the messages of the dead back to the queue, as a sibling does.
func (r *Rig) Left(role string, parts ...hbm.Part) []*hbm.Claim {
	r.tb.Helper()
	ctx := r.tb.Context()
	orphans, err := r.HBM.Orphans(ctx, role)
	if err != nil {
		r.tb.Fatal(err)
	}
	var left []*hbm.Claim
	for _, p := range parts {
		k, err := r.HBM.Claim(ctx, p, "stagetest.nowhere")
		if err != nil {
			r.tb.Fatal(err)
		}
		if err := r.HBM.Unclaim(ctx, k); err != nil {
			r.tb.Fatal(err)
		}
		left = append(left, k)
	}
	for _, o := range orphans {
		if err := r.Bus.NakReply(o.Reply, 0); err != nil {
			r.tb.Fatal(err)
		}
	}
	return left
}

// holder is the Compute of a process that holds in the middle of something, for ever. It says so on its standard output.
type holder struct {
	kernel.Compute
	at          Middle
	steps, done int // steps of enough sequences; pieces of the picture
}

func newHolder(c kernel.Compute, text string) (*holder, error) {
	h := &holder{Compute: c}
	if err := json.Unmarshal([]byte(text), &h.at); err != nil {
		return nil, fmt.Errorf("reading when to hold: %w", err)
	}
	return h, nil
}

// layer is where steps are held: in the attention of a layer that is neither the first nor the last.
const layer = 1

// smallStep is how much longer steps are that have too few sequences. It is what keeps a sequence of some ten tokens there while
// whoever is to bring the others stands still for a few seconds.
const smallStep = 100 * time.Millisecond

// Slow is in no step: it makes each one longer, whatever the machine is, by a tenth of a second.
var Slow = Middle{Seqs: math.MaxInt}

// Attention implements kernel.Compute.
func (h *holder) Attention(l int, shape kernel.AttnShape, out, q []float32, seqs []kernel.Seq) {
	switch {
	case h.at.Piece > 0 || l != layer:
	case len(seqs) < h.at.Seqs: // who is there must not be done before the others have come, on however few cores
		time.Sleep(smallStep)
	case rows(seqs) < h.at.Rows:
	default:
		if h.steps++; h.steps > h.at.After {
			h.hold()
		}
	}
	h.Compute.Attention(l, shape, out, q, seqs)
}

func rows(seqs []kernel.Seq) (n int) {
	for i := range seqs {
		n += seqs[i].Rows
	}
	return n
}

// SegmentAttention implements kernel.Compute. There is one call a block, which is a piece.
func (h *holder) SegmentAttention(out, qkv []float32, segs []int, heads, dim int) {
	if h.at.Piece > 0 {
		if h.done++; h.done == h.at.Piece {
			h.hold()
		}
	}
	h.Compute.SegmentAttention(out, qkv, segs, heads, dim)
}

func (h *holder) hold() {
	fmt.Println("holds")
	select {}
}
