package decoder

import (
	"fmt"
	"time"

	"trireme.dev/shared/stage"
)

// Sequences take slabs as they grow, and a gateway that does not know how long an answer gets lets in more of them than
// fit to the end. When slabs run out, each would wait with all it holds for one more, for ever. So the decoder gives up
// the youngest: its gateway lets go of its memory and starts it again where it stands when all of it fits. The oldest
// is never given up, so somebody always ends. Work that finds no room to begin while a sequence is short is given up the same
// way, and not tried again in a moment (stage.Settle): what it shares of the prefix cache may be just what the other lacks, or,
// where pictures or prompts are computed on the same NPU, what it has there already.

// roomGrace is the least time between two sequences given up: what the first held is free only when its gateway has
// told the HMM.
const roomGrace = 300 * time.Millisecond

// short is told again and again while there is no slab for s. When s can take no step without one, room is made.
func (d *decoder) short(s *sequence) {
	if d.live[s.key()] != s || s.kv.Room() > s.position() {
		return
	}
	d.lacks(s, true)
	if time.Since(d.gave) < roomGrace {
		return
	}
	v := victim(d.active, s.seat.NPU)
	if v == nil {
		return // s has the NPU to itself: what is still held is of requests that end or go elsewhere
	}
	d.gave = time.Now()
	d.drop(v, fmt.Errorf("%d tokens in, giving its memory to older sequences: %w", v.answer, stage.ErrNoRoom))
}

// lacks notes whether s can take no step for want of a slab.
func (d *decoder) lacks(s *sequence, short bool) {
	if s.short != short {
		s.short = short
		d.Short(s.request.ID, short)
	}
}

// victim is the youngest sequence on an NPU that may be given up, nil when there is none. The request of the oldest one there is
// spared: it would end with any of its choices.
func victim(active []*sequence, npu int) *sequence {
	var oldest, youngest *sequence
	for _, s := range active {
		switch {
		case s.seat.NPU != npu:
		case oldest == nil:
			oldest = s
		case s.request.ID != oldest.request.ID:
			youngest = s
		}
	}
	return youngest
}
