// Package quantile keeps how long things took lately, in little memory and so that what several processes have seen can be put
// together: sketches (DDSketch) that are within 2% of any quantile, in a window that slides by a twelfth of its length. It has no clock.
package quantile

import (
	"fmt"
	"math"
	"time"

	"github.com/DataDog/sketches-go/ddsketch"
)

const (
	accuracy = 0.02
	bins     = 512 // of 4% each: the longest is 700 million times the shortest; what is shorter than that counts as the shortest
	parts    = 12
)

// Sketch is a set of durations. The zero Sketch is empty.
type Sketch struct{ s *ddsketch.DDSketch }

func newSketch() *ddsketch.DDSketch {
	s, err := ddsketch.LogCollapsingLowestDenseDDSketch(accuracy, bins)
	if err != nil {
		panic("BUG: a sketch with constant parameters: " + err.Error())
	}
	return s
}

// Add puts a duration in. It allocates only when the sketch has seen nothing near it before.
func (k *Sketch) Add(d time.Duration) {
	if k.s == nil {
		k.s = newSketch()
	}
	if err := k.s.Add(max(0, d.Seconds())); err != nil {
		panic("BUG: a duration does not fit a sketch: " + err.Error())
	}
}

// Count is how many durations are in it.
func (k *Sketch) Count() int {
	if k.s == nil {
		return 0
	}
	return int(math.Round(k.s.GetCount()))
}

// Quantile is the duration below which the part q of all is, as 0.9; 0 of an empty sketch.
func (k *Sketch) Quantile(q float64) time.Duration {
	if k.Count() == 0 {
		return 0
	}
	seconds, err := k.s.GetValueAtQuantile(min(1, max(0, q)))
	if err != nil {
		panic("BUG: a quantile of a sketch that is not empty: " + err.Error())
	}
	return time.Duration(seconds * float64(time.Second))
}

// Within is the part of the durations that are at most d; 1 of an empty sketch.
func (k *Sketch) Within(d time.Duration) float64 {
	all := k.Count()
	if all == 0 {
		return 1
	}
	sum := 0.0
	k.s.ForEach(func(value, count float64) (stop bool) {
		if value <= d.Seconds() {
			sum += count
		}
		return false
	})
	return min(1, sum/k.s.GetCount())
}

// Merge puts in what another one has.
func (k *Sketch) Merge(o *Sketch) {
	if o.Count() == 0 {
		return
	}
	if k.s == nil {
		k.s = newSketch()
	}
	if err := k.s.MergeWith(o.s); err != nil {
		panic("BUG: two sketches of one kind do not merge: " + err.Error())
	}
}

// Bytes is the sketch for Decode; nil of an empty one.
func (k *Sketch) Bytes() []byte {
	if k.Count() == 0 {
		return nil
	}
	var b []byte
	k.s.Encode(&b, false)
	return b
}

// Decode reads what Bytes has made. It refuses what was made with another accuracy.
func Decode(b []byte) (Sketch, error) {
	if len(b) == 0 {
		return Sketch{}, nil
	}
	k := Sketch{newSketch()}
	if err := k.s.DecodeAndMergeWith(b); err != nil {
		return Sketch{}, fmt.Errorf("reading a sketch of %d bytes: %w", len(b), err)
	}
	if n := k.s.GetCount(); !(n >= 0 && n < 1<<53) {
		return Sketch{}, fmt.Errorf("reading a sketch of %d bytes: it has %v values", len(b), n)
	}
	return k, nil
}

// Window is the durations of lately, and how many of them were judged by a target and met it. Times must not go back.
type Window struct {
	length time.Duration
	began  time.Time // of the newest part
	at     int       // its index
	parts  [parts]part
}

type part struct {
	sketch Sketch
	counts Counts
}

// Counts is what became of targets in a window.
type Counts struct {
	Judged, Met uint64 // durations that had a target, and those of them that met it
	Missed      uint64 // what never came to its end
}

// NewWindow makes a window of a length.
func NewWindow(length time.Duration) *Window { return &Window{length: length} }

// Add takes note of a duration at a time, and of its target; 0: it has none.
func (w *Window) Add(now time.Time, took, target time.Duration) {
	w.slide(now)
	p := &w.parts[w.at]
	p.sketch.Add(took)
	if target > 0 {
		p.counts.Judged++
		if took <= target {
			p.counts.Met++
		}
	}
}

// Miss takes note of something that will never come to its end.
func (w *Window) Miss(now time.Time) {
	w.slide(now)
	w.parts[w.at].counts.Missed++
}

// Read is what the window has at a time. The sketch belongs to the caller.
func (w *Window) Read(now time.Time) (s Sketch, c Counts) {
	w.slide(now)
	for i := range w.parts {
		p := &w.parts[i]
		s.Merge(&p.sketch)
		c.Judged, c.Met, c.Missed = c.Judged+p.counts.Judged, c.Met+p.counts.Met, c.Missed+p.counts.Missed
	}
	return s, c
}

// slide begins new parts, which take the place of the oldest.
func (w *Window) slide(now time.Time) {
	each := w.length / parts
	steps := int64(now.Sub(w.began) / each)
	if steps <= 0 {
		return
	}
	if steps > parts { // nothing is left, and where parts begin does not matter
		w.began = now
	} else {
		w.began = w.began.Add(time.Duration(steps) * each)
	}
	for range min(steps, parts) {
		w.at = (w.at + 1) % parts
		p := &w.parts[w.at]
		p.counts = Counts{}
		if p.sketch.s != nil {
			p.sketch.s.Clear()
		}
	}
}
