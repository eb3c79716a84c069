package encoder

import (
	"cmp"
	"slices"
	"sync"
	"time"

	"trireme.dev/shared/stage"
)

// ahead says when an encoder wants a picture beside those on its NPUs: so early that it is ready when an NPU gets free, and no
// earlier, for what is taken waits here even if another encoder is idle first.
type ahead struct {
	hold      func(bool) // see stage.Stage.Hold
	mu        sync.Mutex
	npus      int
	preparing int           // pictures that are fetched and decoded
	lines     []place       // by slot of the NPU
	prepare   time.Duration // that preparing a picture takes lately
}

// place is what one NPU has to encode.
type place struct {
	pictures int           // that wait for it or are on it
	left     time.Duration // of the one on it, see progress; unknown while that has not begun
}

const unknown = time.Hour

// change has f change what there is and tells the stage what that means.
func (a *ahead) change(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
	busy, queued, left := 0, 0, unknown
	for _, l := range a.lines {
		if l.pictures > 0 {
			busy++
			queued += l.pictures - 1
			left = min(left, l.left)
		}
	}
	// Pictures stay on the NPU that they are given: one that has two is no help to one that has none.
	a.hold(busy+a.preparing >= a.npus && (a.preparing > 0 || queued > 0 || left > a.lead()))
}

// line is what the NPU in a slot has.
func (a *ahead) line(slot int) *place {
	for len(a.lines) <= slot {
		a.lines = append(a.lines, place{})
	}
	return &a.lines[slot]
}

// soonest is the one of some slots whose NPU gets free first, if each has as many pictures as the others.
func (a *ahead) soonest(slots []int) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.MinFunc(slots, func(x, y int) int { return cmp.Compare(a.line(x).left, a.line(y).left) })
}

// widen says how many NPUs there are.
func (a *ahead) widen(npus int) { a.change(func() { a.npus = npus }) }

// lead is how long before the NPU gets free the next picture is asked for. Preparing takes longer now and then, and an NPU that
// waits for it costs more than a picture that waits here.
func (a *ahead) lead() time.Duration { return 4 * a.prepare }

// preparation is what one message does before its picture is in line.
type preparation struct {
	*ahead
	on    bool
	began time.Time
}

// begin says that a picture is being prepared.
func (a *ahead) begin() *preparation {
	p := &preparation{ahead: a}
	p.resume()
	return p
}

// pause says that the picture waits for somebody else: the NPU could have another one.
func (p *preparation) pause() { p.change(p.off) }

func (p *preparation) off() {
	if p.on {
		p.on = false
		p.preparing--
	}
}

// resume says that it goes on.
func (p *preparation) resume() {
	p.change(func() {
		p.on, p.began = true, time.Now()
		p.preparing++
	})
}

// ready says that the picture is prepared and about to be in line for the NPU in a slot.
func (p *preparation) ready(slot int) {
	p.change(func() {
		p.off()
		if l := p.line(slot); l.pictures == 0 {
			*l = place{1, unknown}
		} else {
			l.pictures++
		}
		if took := time.Since(p.began); p.prepare == 0 {
			p.prepare = took
		} else {
			p.prepare += (took - p.prepare) / 8
		}
	})
}

// end says that the message is done with, whether its picture came into line or not.
func (p *preparation) end() { p.change(p.off) }

// progress tells how long a piece of the picture on an NPU takes and how many are left. Time is told again after the next one
// only, so that one does not count.
func (a *ahead) progress(slot int, each time.Duration, left int) {
	a.change(func() { a.line(slot).left = each * time.Duration(left-1) })
}

// out says that a picture has left an NPU's line; how long the next one takes is told when that has begun.
func (a *ahead) out(slot int) {
	a.change(func() {
		l := a.line(slot)
		if l.pictures--; l.pictures > 0 {
			l.left = unknown
		} else {
			l.left = 0
		}
	})
}

func newAhead(s *stage.Stage) *ahead {
	return &ahead{hold: func(hold bool) { s.Hold(stage.Encode, hold) }, npus: 1}
}
