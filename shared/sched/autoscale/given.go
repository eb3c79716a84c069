package autoscale

import (
	"fmt"
	"math"
	"slices"
	"time"
)

// given is how many NPUs a stage has since some were moved for its sake, and what arrived then.
type given struct {
	at       time.Duration
	stage    Stage
	npus     int
	arriving amounts
}

// givenMemory is how long that is remembered, of at most mostGiven moves: what NPUs can do may have changed by then.
const (
	givenMemory = time.Hour
	mostGiven   = 32
)

// give notes that NPUs are moved from now on, and that the fleet is f then.
func (s *State) give(now time.Duration, c Change, f *fleet, arriving amounts) {
	s.given = slices.Delete(s.given, 0, max(0, len(s.given)-mostGiven+1))
	s.given = append(s.given, given{now, c.Stage, f.with(c.Stage), arriving})
}

// keeps says why NPUs are not to be moved so that the fleet is f: a stage for whose sake others were moved lately would have fewer than it had
// from then on, and as much arrives as then, within twice the band. Where all stages have too little each looks better off with an NPU
// of another one, as what a stage is seen to need depends on what it has: sequences are in work for longer where fewer NPUs decode. To
// move NPUs to and fro would help nobody. Empty: nothing is said against it.
func (s *State) keeps(now time.Duration, f *fleet, arriving amounts) string {
	for _, g := range slices.Backward(s.given) {
		if is := f.with(g.stage); now-g.at <= givenMemory && is < g.npus && g.arriving.near(arriving, 2*s.policy.Band) {
			return fmt.Sprintf("%s would have %d NPUs and was given so many that it had %d, %v ago, when as much arrived", g.stage, is, g.npus, (now - g.at).Round(time.Second))
		}
	}
	return ""
}

// near reports whether nothing differs by more than a part of the larger.
func (a amounts) near(b amounts, part float64) bool {
	for k := range a {
		if math.Abs(a[k]-b[k]) > part*max(a[k], b[k]) {
			return false
		}
	}
	return true
}
