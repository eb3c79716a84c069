package encoder

import (
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
	inLine    int           // pictures that wait for an NPU or are on it
	left      time.Duration // of one on its NPU, see progress
	prepare   time.Duration // that preparing a picture takes lately
}

// change has f change what there is and tells the stage what that means.
func (a *ahead) change(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
	switch all := a.preparing + a.inLine; {
	case all < a.npus:
		a.hold(false)
	default:
		a.hold(a.preparing > 0 || a.inLine > a.npus || a.left > a.lead())
	}
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

// ready says that the picture is prepared and about to be in line.
func (p *preparation) ready() {
	p.change(func() {
		p.off()
		p.inLine++
		if took := time.Since(p.began); p.prepare == 0 {
			p.prepare = took
		} else {
			p.prepare += (took - p.prepare) / 8
		}
	})
}

// end says that the message is done with, whether its picture came into line or not.
func (p *preparation) end() { p.change(p.off) }

// progress tells how long a piece of the picture on the NPU takes and how many are left. Time is told again after the next one
// only, so that one does not count.
func (a *ahead) progress(each time.Duration, left int) {
	a.change(func() { a.left = each * time.Duration(left-1) })
}

// out says that a picture has left the line; how long the next one takes is told when that has begun.
func (a *ahead) out() {
	a.change(func() {
		a.inLine--
		a.left = time.Hour
	})
}

func newAhead(s *stage.Stage) *ahead {
	return &ahead{hold: func(hold bool) { s.Hold(stage.Encode, hold) }, left: time.Hour, npus: 1}
}
