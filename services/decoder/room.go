package decoder

import (
	"fmt"
	"slices"
	"time"

	"trireme.dev/shared/stage"
)

// Sequences take slabs as they grow, and a gateway that does not know how long an answer gets lets in more of them than
// fit to the end. When slabs run out, each would wait with all it holds for one more, for ever. So the decoder gives up
// the youngest: its gateway lets go of its memory and starts it again where it stands when all of it fits. The oldest
// is never given up, so somebody always ends. One that finds no room to begin while another is short is given up the same
// way, and not tried again in a moment: what it shares of the prefix cache may be just what the other lacks.

// roomGrace is the least time between two sequences given up: what the first held is free only when its gateway has
// told the HMM.
const roomGrace = 300 * time.Millisecond

// short is told again and again while there is no slab for s. When s can take no step without one, room is made.
func (d *decoder) short(s *sequence) {
	if d.live[s.key()] != s || s.kv.Room() > s.position() {
		return
	}
	s.short = true
	if time.Since(d.gave) < roomGrace {
		return
	}
	v := victim(d.active)
	if v == nil {
		return // s has the NPU to itself: what is still held is of requests that end or go elsewhere
	}
	d.gave = time.Now()
	d.drop(v, fmt.Errorf("%d tokens in, giving its memory to older sequences: %w", v.answer, stage.ErrNoRoom))
}

// starving reports whether a sequence of another request can take no step for want of a slab.
func (d *decoder) starving(request string) bool {
	answer := make(chan bool, 1)
	d.do(func() { // the loop outlives all handlers
		answer <- slices.ContainsFunc(d.active, func(s *sequence) bool { return s.short && s.request.ID != request })
	})
	return <-answer
}

// victim is the youngest sequence that may be given up, nil when there is none. The request of the oldest is spared:
// it would end with any of its choices.
func victim(active []*sequence) *sequence {
	for i := len(active) - 1; i > 0; i-- {
		if active[i].request.ID != active[0].request.ID {
			return active[i]
		}
	}
	return nil
}
